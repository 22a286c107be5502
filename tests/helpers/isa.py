"""Instruction sets: every one that this machine runs, one at a time; and which strategies each of them has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparseprune.kernels import _core

LEVELS: list[str] = _core.isas_available()
STRATEGIES = ("tile_rows", "tile_dense", "tile_batch", "tile_amx", "csr_gather", "csr_batch")
CODE_STRATEGIES = ("quads_rows", "octets_rows", "bitquads_rows")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def forced(level: str) -> Iterator[None]:
    """`level` for every kernel of the process, then the level before."""
    before = _core.isa()
    _core.set_isa(level)
    try:
        yield
    finally:
        _core.set_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def serves(level: str, dtype: torch.dtype, strategy: str) -> bool:
    """Whether `level` has this kernel: test_linear checks that the table is exact in both directions."""
    pairs = dtype == torch.bfloat16 and level in ("avx512_bf16", "amx")
    if strategy == "tile_amx":
        return dtype == torch.bfloat16 and level == "amx"
    return not (pairs and strategy in ("tile_dense", "tile_batch"))


def layout_of(strategy: str) -> str:
    return "csr" if strategy.startswith("csr") else "tile"


KERNELS = [
    (level, dtype, strategy)
    for level in LEVELS
    for dtype in DTYPES
    for strategy in STRATEGIES
    if serves(level, dtype, strategy)
]
