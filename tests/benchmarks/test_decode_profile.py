"""benchmarks/decode_profile.py: what it times is each call of the token, and its parts add up to the token."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import decode_profile

import sparseprune as sp
from sparseprune.weights.linear import SparseLinear


def test_parts_add_up_to_the_token():
    names = [
        "kernels", "linears", "linears in attention", "linears in mlp", "attention", "mlp", "norms", "norms in blocks",
        "blocks", "head", "token", "compiled",
    ]  # fmt: skip
    medians = {name: float(index + 1) for index, name in enumerate(names)}
    medians["linears"] = medians["linears in attention"] + medians["linears in mlp"] + medians["head"]
    parts = decode_profile.shares(medians)
    total, compiled = parts.pop("eager token"), parts.pop("compiled token")
    assert sum(parts.values()) == pytest.approx(total)
    assert (total, compiled) == (11e3, 12e3)


def test_calls_are_recorded_and_their_kernels_write_what_the_layer_gives():
    model = tiny.llama()
    sp.quantize(model, "int4", "nearest", group_size=32)
    with torch.inference_mode():
        calls = decode_profile.recorded(model, lambda: model(tiny.ids(1, 1)))
        linears = [it for it in calls if isinstance(it.module, SparseLinear)]
        assert [it.module for it in linears] == [it for it in model.modules() if isinstance(it, SparseLinear)]
        assert not any(it._forward_pre_hooks for it in model.modules())
        for call in linears:
            run = decode_profile.kernel(call)
            *_, out = run.__defaults__[0]
            expected = out.clone()
            out.zero_()
            run()
            assert torch.equal(out, expected)
            assert torch.equal(call(), expected)
