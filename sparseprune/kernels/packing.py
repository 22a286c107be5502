"""How a weight is packed, as one number: layout, dtype, value encoding and group size (csrc/core/packing.h).

A host cannot read the header of a blob on a GPU without waiting for it, so whoever holds a blob keeps this number beside
it, and with it the weight's shape: `Packed` is all three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CODES",
    "DTYPES",
    "ENCODINGS",
    "LAYOUTS",
    "Code",
    "Packed",
    "dtype_of",
    "encoding_of",
    "group_of",
    "layout_of",
    "packing_code",
    "parts_of_codes",
    "scale_dtype_of",
]

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What weights compute in: the dtype of activations, bias and output."""

LAYOUTS: dict[str, int] = {
    "tile": 0,
    "csr": 1,
    "sparse24": 2,
    "bitmap8": 3,
    "quads": 4,
    "octets": 5,
    "bitquads": 6,
    "fragments": 7,
    "fragments24": 8,
}
"""Plain values: `tile` and `csr` on a CPU, `sparse24` and `bitmap8` on a GPU. Codes: `quads` (dense), `octets` (2:4) and `bitquads`
(any others) on a CPU, `fragments` (dense) and `fragments24` (2:4) on a GPU."""

ENCODINGS: dict[str, int] = {"plain": 0, "int8": 1, "int4": 2, "int4_minimum": 3}
"""How values are stored; the numbers are also those of `spec` in a file (weights/spec.py)."""


class Code(NamedTuple):
    """What the codes of an encoding are: `bits` of each, from `least` to `largest`, of which `zero` stands for 0; where there
    are minimums, `zero` stands for the group's minimum."""

    bits: int
    least: int
    largest: int
    zero: int
    minimums: bool = False


CODES = {
    "int8": Code(8, -127, 127, 0),
    "int4": Code(4, 0, 15, 8),
    "int4_minimum": Code(4, 0, 15, 0, minimums=True),
}
"""The encodings that have codes."""

_LAYOUT_OF = {code: layout for layout, code in LAYOUTS.items()}
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}
_ENCODING_OF = {code: encoding for encoding, code in ENCODINGS.items()}


def packing_code(
    layout: str,
    dtype: torch.dtype,
    encoding: str = "plain",
    group_size: int = 0,
    scale_dtype: torch.dtype | None = None,
) -> int:
    """The number for a layout, a dtype and an encoding; codes have a group size and a dtype of their scales."""
    scales = 0 if scale_dtype is None else DTYPES[scale_dtype]
    return LAYOUTS[layout] | DTYPES[dtype] << 8 | ENCODINGS[encoding] << 16 | group_size << 24 | scales << 40


def layout_of(packing: int) -> str:
    return _LAYOUT_OF[packing & 0xFF]


def encoding_of(packing: int) -> str:
    return _ENCODING_OF[packing >> 16 & 0xFF]


def group_of(packing: int) -> int:
    """Columns that share a scale; 0 for plain values."""
    return packing >> 24 & 0xFFFF


def scale_dtype_of(packing: int) -> torch.dtype:
    return _DTYPE_OF[packing >> 40 & 0xFF]


def parts_of_codes(
    rows: int, cols: int, packing: int, nnz: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that a weight of `nnz` codes is packed from (kernels/codes.py): `codes`, `scales`, and
    where it has them `mask` and `minimums`."""
    code = CODES[encoding_of(packing)]
    scales = (rows, -(-cols // group_of(packing))), scale_dtype_of(packing)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((-(-nnz * code.bits // 8),), torch.int8 if code.bits == 8 else torch.uint8),
        "scales": scales,
    }
    if layout_of(packing) not in ("quads", "fragments"):  # the dense ones
        parts["mask"] = (rows, -(-cols // 8)), torch.uint8
    if code.minimums:
        parts["minimums"] = scales
    return parts


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
