"""How the kept values of a weight are stored, beside the dtype that the weight computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PLAIN", "Encoding", "Part"]


@dataclass(frozen=True)
class Part:
    """What one of a weight's tensors is, known before it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoding:
    """`plain`: each value in the dtype that the weight computes in.

    group_size: dense columns that share what the encoding keeps beside the values; 0 for `plain`, which keeps nothing.
    """

    kind: str = "plain"
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CODES:
            raise ValueError(f"encoding: kind must be one of {', '.join(CODES)}, got {self.kind!r}")
        if self.kind == "plain" and self.group_size:
            raise ValueError(f"encoding: plain values have no groups, got a group size of {self.group_size}")

    def __str__(self) -> str:
        return self.kind

    def parts(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> dict[str, Part]:
        """The tensors that hold the `nnz` kept values of a weight of this shape that computes in `dtype`, by name."""
        return {"values": Part(dtype, (nnz,))}


CODES = {"plain": 0}
"""The encodings and their numbers, in files as in csrc/core/encoding.h."""

PLAIN = Encoding()
