"""How a weight is packed, as one number: layout, dtype, value encoding and group size (csrc/core/packing.h).

A host cannot read the header of a blob on a GPU without waiting for it, so whoever holds a blob keeps this number beside
it, and with it the weight's shape: `Packed` is all three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "LAYOUTS", "Packed", "dtype_of", "layout_of", "packing_code"]

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What weights compute in: the dtype of activations, bias and output."""

LAYOUTS: dict[str, int] = {"tile": 0, "csr": 1, "sparse24": 2, "bitmap8": 3}
"""The first two are the CPU's."""

_LAYOUT_OF = {code: layout for layout, code in LAYOUTS.items()}
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


def packing_code(layout: str, dtype: torch.dtype, encoding: int = 0, group_size: int = 0) -> int:
    """The number for a layout, a dtype and a value encoding (`weights/encoding.py`), plain by default."""
    return LAYOUTS[layout] | DTYPES[dtype] << 8 | encoding << 16 | group_size << 24


def layout_of(packing: int) -> str:
    return _LAYOUT_OF[packing & 0xFF]


class _Dtypes(dict[int, torch.dtype]):
    """dtype by packing, a look-up in a dictionary for every call of a layer."""

    def __missing__(self, packing: int) -> torch.dtype:
        code = packing >> 8 & 0xFF
        if code not in _DTYPE_OF:
            raise ValueError(f"packing: must be a number that packing_code() gives, got {packing}")
        return self.setdefault(packing, _DTYPE_OF[code])


dtype_of = _Dtypes()


class Packed(NamedTuple):
    """A packed weight `[rows, cols]`: a uint8 blob for its device's kernels, and how it is packed."""

    blob: Tensor
    rows: int
    cols: int
    packing: int

    @property
    def layout(self) -> str:
        return layout_of(self.packing)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of[self.packing]
