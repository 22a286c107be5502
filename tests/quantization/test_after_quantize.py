"""What the rest of the library makes of a quantized model: its speed, its facts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.io.inspection import inspect_model
from sparseprune.measure.benchmark import time_layer, time_model


def quantized(pattern: str, encoding: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if pattern == "2:4":
        sp.prune(model, "2:4")
    elif pattern == "unstructured":
        sp.prune(model, "unstructured", sparsity=0.75)
    sp.quantize(model, encoding, include="0")
    return model


@pytest.mark.parametrize(("pattern", "form"), [("2:4", "2:4 int4"), ("none", "dense int4")])
def test_bench_times_codes_as_codes_and_apart_from_plain_weights(pattern, form):
    model = quantized(pattern, "int4")
    plain = "2:4" if pattern == "2:4" else None
    kinds = time_model(model, seconds=0.05, tokens=False).kinds
    assert [it.format for it in kinds] == [form, plain]
    assert set(kinds[0].timings[0].sparse_seconds) == {form}


def test_a_twin_of_dense_codes_is_not_timed_as_the_dense_layer():
    (timing,) = time_layer(nn.Linear(64, 64), ["dense"], seconds=0.05, encoding="int8")
    assert set(timing.sparse_seconds) == {"dense int8"} and timing.speedup("dense int8") > 0


@pytest.mark.parametrize("encoding", ["int8", "int4", "int4_minimum"])
def test_inspect_tells_codes_from_plain_weights(encoding):
    facts = inspect_model(quantized("none", encoding))
    assert [(it.format, it.values) for it in facts.layers] == [("dense", encoding), (None, "float32")]
    assert facts.layers[0].why == f"held as dense {encoding}"
    assert "0 of 2 linears are sparse, 1 hold int8 or int4 codes;" in str(facts)


def test_inspect_counts_the_zeros_among_dense_codes():
    layers = inspect_model(quantized("unstructured", "int8")).layers
    assert layers[0].sparsity >= 0.75 and layers[0].values == "int8"
