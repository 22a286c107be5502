"""Masks: applied, packed, and made from a threshold; torch's own ways among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import DTYPES
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sparseprune.kernels import ops

_SIDE = 4096

OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "torch mul_": lambda w, mask, bits: w.mul_(mask),
    "torch masked_fill": lambda w, mask, bits: w.masked_fill(mask, 0),
    "mask_apply_": lambda w, mask, bits: ops.mask_apply_(w, mask),
    "mask_apply": lambda w, mask, bits: ops.mask_apply(w, mask),
    "mask_apply_packed_": lambda w, mask, bits: ops.mask_apply_packed_(w, bits),
    "mask_apply_packed": lambda w, mask, bits: ops.mask_apply_packed(w, bits),
    "threshold_mask_": lambda w, mask, bits: ops.threshold_mask_(w, 0.5),
    "pack_mask": lambda w, mask, bits: ops.pack_mask(mask),
    "unpack_mask": lambda w, mask, bits: ops.unpack_mask(bits, _SIDE),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask(benchmark: BenchmarkFixture, rotate: Callable, dtype: str, name: str) -> None:
    benchmark.group = f"mask {_SIDE}x{_SIDE} {dtype}"
    weights = [torch.randn(_SIDE, _SIDE).to(DTYPES[dtype]) for _ in range(4)]
    masks = [torch.rand(_SIDE, _SIDE) < 0.5 for _ in weights]
    sets = [(w, mask, ops.pack_mask(mask)) for w, mask in zip(weights, masks, strict=True)]
    rotate([lambda it=it: OPERATIONS[name](*it) for it in sets])
