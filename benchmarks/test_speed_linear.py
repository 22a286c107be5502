"""Linears by format, dtype and batch size, torch's dense layer among them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from layers import DTYPES, SHAPES, copies_of, pruned_weight
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from sparseprune.kernels import native
from sparseprune.weights.linear import SparseLinear

FORMATS = {"dense": ("bitmap", 0.0), "2:4": ("2:4", 0.5), "4:8": ("4:8", 0.5), "bitmap 50%": ("bitmap", 0.5),
           "bitmap 70%": ("bitmap", 0.7), "bitmap 90%": ("bitmap", 0.9), "csr 90%": ("csr", 0.9)}  # fmt: skip
_ROTATED_BYTES = 250_000_000  # less than run.py's: regressions, not records


@functools.lru_cache(maxsize=1)  # the batch sizes of one layer come one after the other
def _layers(model: str, layer: str, dtype: str, form: str) -> list[nn.Module]:
    rows, cols = SHAPES[model][layer]
    kind, sparsity = FORMATS[form]
    linear: nn.Module = nn.Linear(cols, rows, bias=False, device="meta")
    weight = pruned_weight(rows, cols, DTYPES[dtype], kind, sparsity)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if form != "dense":
        linear = SparseLinear.from_dense(linear, kind)
    return [linear, *(copy.deepcopy(linear) for _ in range(copies_of(weight.nbytes, _ROTATED_BYTES) - 1))]


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model", "layer"), [("LLaMA-7B", "qkvo"), ("SmolLM2-135M", "gate/up")])
def test_linear(
    benchmark: BenchmarkFixture, rotate: Callable, model: str, layer: str, dtype: str, form: str, batch: int
) -> None:
    layers = _layers(model, layer, dtype, form)
    rows, cols = SHAPES[model][layer]
    x = torch.randn(batch, cols).to(DTYPES[dtype])
    benchmark.group = f"linear {model} {layer} {dtype} B={batch}"
    rotate([functools.partial(it, x) for it in layers])
    if benchmark.enabled:  # not under --benchmark-disable
        benchmark.extra_info.update(_rates(layers[0], (rows, cols), batch, benchmark.stats.stats.median))


def _rates(layer: nn.Module, shape: tuple[int, int], batch: int, seconds: float) -> dict[str, float | str]:
    products, nbytes = math.prod(shape), layer.weight.nbytes if isinstance(layer, nn.Linear) else layer.nbytes
    rates: dict[str, float | str] = {
        "gb_s": nbytes / seconds / 1e9,
        "dense_equivalent_gflop_s": 2 * batch * products / seconds / 1e9,
    }
    if isinstance(layer, SparseLinear):
        rates["gflop_s"] = 2 * batch * layer.nnz / seconds / 1e9
        rates["strategy"] = native.strategy(layer.packed, batch)
    return rates
