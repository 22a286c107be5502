"""Conversions between dense, the canonical forms, CSR and the packed form; torch's and scipy's among them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import scipy.sparse
from layers import DTYPES, pruned_weight
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sparseprune.kernels import ops

_SIDE = 4096


def _from_dense(name: str, dense: Tensor) -> Callable[[], Any]:
    return {
        "torch to_sparse_csr": dense.to_sparse_csr,
        "scipy csr_matrix": lambda: scipy.sparse.csr_matrix(dense.numpy()),
        "dense_to_csr": lambda: ops.dense_to_csr(dense),
        "dense_to_bitmap": lambda: ops.dense_to_bitmap(dense),
        "dense_to_nm": lambda: ops.dense_to_nm(dense, 2, 4),
    }[name]


def _to_dense_or_packed(name: str, dense: Tensor) -> Callable[[], Any]:
    values, bits = ops.dense_to_bitmap(dense)
    layout = name.split()[-1]
    if name.startswith("pack"):
        return functools.partial(ops.pack, values, bits, _SIDE, layout)
    if name.startswith("unpack"):
        return functools.partial(ops.unpack, ops.pack(values, bits, _SIDE, layout))
    if name == "csr_to_dense":
        return functools.partial(ops.csr_to_dense, *ops.dense_to_csr(dense), _SIDE)
    return functools.partial(ops.bitmap_to_dense, values, bits, _SIDE)


_GRID = list(
    itertools.product(DTYPES, (0.5, 0.9), ("torch to_sparse_csr", "dense_to_csr", "dense_to_bitmap"))
)
_GRID += [(dtype, 0.5, "dense_to_nm") for dtype in DTYPES]
_GRID += [
    ("fp32", sparsity, "scipy csr_matrix") for sparsity in (0.5, 0.9)
]  # which has neither bf16 nor fp16


@pytest.mark.parametrize(("dtype", "sparsity", "name"), _GRID)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_from_dense(
    benchmark: BenchmarkFixture, rotate: Callable, dtype: str, sparsity: float, name: str
) -> None:
    benchmark.group = f"from dense {_SIDE}x{_SIDE} {dtype} {sparsity:.0%}"
    dense = pruned_weight(_SIDE, _SIDE, DTYPES[dtype], "2:4" if name == "dense_to_nm" else "bitmap", sparsity)
    rotate([_from_dense(name, dense.clone()) for _ in range(4)])


@pytest.mark.parametrize(
    "name", ["csr_to_dense", "bitmap_to_dense", "pack tile", "pack csr", "unpack tile", "unpack csr"]
)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dense_or_packed(
    benchmark: BenchmarkFixture, rotate: Callable, dtype: str, sparsity: float, name: str
) -> None:
    benchmark.group = f"to dense or packed {_SIDE}x{_SIDE} {dtype} {sparsity:.0%}"
    dense = pruned_weight(_SIDE, _SIDE, DTYPES[dtype], "bitmap", sparsity)
    rotate([_to_dense_or_packed(name, dense) for _ in range(4)])
