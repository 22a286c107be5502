"""benchmarks/decode_profile.py: what it times is each call of the token, and its parts add up to the token."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from torch import nn

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


@pytest.mark.parametrize("biased", [False, True])
def test_calls_are_recorded_and_their_kernels_write_what_the_layer_gives(biased):
    model = tiny.llama(attention_bias=biased)
    for it in model.modules():
        if getattr(it, "bias", None) is not None:
            nn.init.normal_(it.bias)
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


def test_a_model_with_dense_linears_is_refused(tmp_path):
    """Their time would be that of attention and the MLP "without linears"."""
    sp.save(tiny.llama(), tmp_path)
    with pytest.raises(
        ValueError, match=r"every linear must be a SparseLinear, model\.layers\.0\..* is dense; quantize"
    ):
        decode_profile._loaded(tmp_path)


def test_what_is_timed_covers_the_token(monkeypatch):
    """Each linear is in attention, in the MLP, or the head."""
    model = tiny.llama()
    sp.quantize(model, "int4", "nearest", group_size=32, embeddings="int8")
    monkeypatch.setattr(decode_profile, "compile_decoding", lambda it: None)
    with torch.inference_mode():
        timed = decode_profile._candidates(model)
    counts = {name: len(it.args[0]) for name, it in timed.items() if name not in ("token", "compiled")}
    assert counts == {
        "kernels": 15, "linears": 15, "linears in attention": 8, "linears in mlp": 6, "attention": 2, "mlp": 2, "norms": 5,
        "norms in blocks": 4, "blocks": 2, "head": 1,
    }  # fmt: skip
