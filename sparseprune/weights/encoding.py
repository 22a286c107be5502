"""How the kept values of a weight are stored, beside the dtype that the weight computes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparseprune.kernels.packing import CODES, ENCODINGS, Code

__all__ = ["PLAIN", "Encoding", "Part"]

_GROUP_SIZES = (32, 64, 128)
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """What one of a weight's tensors is, known before it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Encoding:
    """`plain`: each value in the dtype that the weight computes in. The others are codes with a scale for each group of
    columns of a row: `int8` is code * scale, `int4` (code - 8) * scale, `int4_minimum` code * scale + minimum.

    group_size: dense columns that share a scale: 32, 64 or 128; 0 for `plain`, which has no scales.
    scale_dtype: of scales and minimums, float16 or bfloat16; None for `plain`.
    """

    kind: str = "plain"
    group_size: int = 0
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in ENCODINGS:
            raise ValueError(f"encoding: kind must be one of {', '.join(ENCODINGS)}, got {self.kind!r}")
        if self.kind == "plain":
            if self.group_size or self.scale_dtype is not None:
                raise ValueError(
                    f"encoding: plain values have no groups, got a group size of {self.group_size}, scales of "
                    f"{self.scale_dtype}; leave them out"
                )
        elif self.group_size not in _GROUP_SIZES:
            raise ValueError(
                f"encoding: group_size must be 32, 64 or 128 for {self.kind}, got {self.group_size}"
            )
        elif self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"encoding: scale_dtype must be float16 or bfloat16 for {self.kind}, got {self.scale_dtype}"
            )

    @classmethod
    def parse(cls, text: str | Encoding) -> Encoding:
        """`"int8"`, `"int4"`, `"int4_minimum"` or `"plain"`, in groups of 64 with float16 scales; an `Encoding` is given back as it is."""
        if isinstance(text, Encoding):
            return text
        return cls() if text == "plain" else cls(text, 64, torch.float16)

    def __str__(self) -> str:
        return self.kind if self.kind == "plain" else f"{self.kind}, groups of {self.group_size}"

    @property
    def code(self) -> Code | None:
        """What its codes are; None for `plain`, which has none."""
        return CODES.get(self.kind)

    @property
    def minimums(self) -> bool:
        return self.code is not None and self.code.minimums

    def parts(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> dict[str, Part]:
        """The tensors that hold the `nnz` kept values of a weight of this shape that computes in `dtype`, by name."""
        if self.code is None or self.scale_dtype is None:
            return {"values": Part(dtype, (nnz,))}
        codes = Part(torch.int8, (nnz,)) if self.code.bits == 8 else Part(torch.uint8, (-(-nnz // 2),))
        per_group = Part(self.scale_dtype, (shape[0], -(-shape[1] // self.group_size)))
        parts = {"values": codes, "scales": per_group}
        return {**parts, "minimums": per_group} if self.minimums else parts


PLAIN = Encoding()
