"""Which entries of a weight are kept: N:M, bitmap, CSR, or all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprune.kernels import ops

__all__ = ["Format", "group_counts", "popcounts"]

KINDS = ("nm", "bitmap", "csr", "dense")


@dataclass(frozen=True)
class Format:
    """How a weight is sparse: `nm` (N of every M columns kept), `bitmap` or `csr` (unstructured); or `dense`."""

    kind: str
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"format: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "nm":
            if not 1 <= self.n <= self.m <= 32:
                raise ValueError(
                    f"format: N:M needs 1 <= N <= M <= 32, got {self.n}:{self.m}; 2:4 is the usual one"
                )
        elif self.n or self.m:
            raise ValueError(f"format: {self.kind} takes no N and M, got {self.n}:{self.m}; leave them out")

    @classmethod
    def parse(cls, text: str | Format) -> Format:
        """`"2:4"`, `"4:8"`, `"bitmap"`, `"csr"` or `"dense"` to a format (a `Format` is given back as it is)."""
        if isinstance(text, Format):
            return text
        if text in ("bitmap", "csr", "dense"):
            return cls(text)
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'format: must be "N:M" such as "2:4", "bitmap", "csr" or "dense", got {text!r}')
        return cls("nm", int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "nm" else self.kind

    def kept(self, weight: Tensor) -> int:
        """Entries of `weight` [rows, cols], which fits the format, that it keeps: N:M counts explicit zeros too."""
        count = self.count((weight.shape[0], weight.shape[1]))
        return int(weight.count_nonzero()) if count is None else count

    def count(self, shape: tuple[int, int]) -> int | None:
        """Entries kept of a weight of this shape, None where that depends on the weight."""
        rows, cols = shape
        if self.kind == "dense":
            return rows * cols
        return rows * (cols // self.m) * self.n if self.kind == "nm" else None


def popcounts(mask: Tensor) -> Tensor:
    """Number of 1 bits in each byte: uint8 to uint8, of the same shape."""
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def group_counts(mask: Tensor, cols: int, m: int) -> Tensor:
    """Kept entries in every `m` columns: canonical mask to integers [rows, cols / m]. `m` must divide `cols`."""
    rows = mask.shape[0]
    if m % 8 == 0:
        return popcounts(mask).view(rows, cols // m, m // 8).sum(-1, dtype=torch.int16)
    if 8 % m == 0:  # within a byte: ten times faster than by bools
        parts = [popcounts((mask >> shift) & (2**m - 1)) for shift in range(0, 8, m)]
        return torch.stack(parts, -1).view(rows, mask.shape[1] * len(parts))[:, : cols // m]
    return ops.unpack_mask(mask, cols).view(rows, cols // m, m).sum(-1, dtype=torch.int16)
