"""int8 and int4 weights: packed for the kernels and back, and what their codes stand for.

Codes are those of the kept entries in row-major order: `int8 [nnz]`, or two int4 to a byte, `uint8 [ceil(nnz / 2)]`, the
low nibble first. Every `group` columns of a row of the dense weight share a scale, and with `int4_minimum` a minimum:
`scales`, `minimums` `[rows, ceil(cols / group)]`, bfloat16 or float16.

    int8           code * scale
    int4           (code - 8) * scale
    int4_minimum   code * scale + minimum

The CPU alone has kernels for them: `quads` of dense weights, `octets` of 2:4 ones, `bitquads` of any others
(docs/formats.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseprune.kernels import _core, native
from sparseprune.kernels.packing import Packed, dtype_of, encoding_of, group_of, layout_of, scale_dtype_of

__all__ = [
    "CODES",
    "Code",
    "dequantize",
    "join_nibbles",
    "lookup",
    "pack_codes",
    "split_nibbles",
    "unpack_codes",
]


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


def join_nibbles(codes: Tensor) -> Tensor:
    """Codes in [0, 15], `uint8 [n]`, two to a byte: `uint8 [ceil(n / 2)]`; a last high nibble is 0."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | codes[1::2] << 4


def split_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes, `uint8 [count]`."""
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[:count]


def dequantize(
    encoding: str,
    codes: Tensor,
    mask: Tensor | None,
    scales: Tensor,
    minimums: Tensor | None,
    cols: int,
    group: int,
) -> Tensor:
    """The float32 weight `[rows, cols]`; mask: its bits, or None where all entries are kept."""
    rows = scales.shape[0]
    if CODES[encoding].bits == 8:
        numbers = codes.float()
    else:
        count = rows * cols if mask is None else _ones(mask)
        numbers = split_nibbles(codes, count).float() - CODES[encoding].zero
    if mask is None:
        dense = numbers.view(rows, cols)
    else:
        dense = native.expand(numbers, mask, native.count_bits(mask, cols), cols)
    dense = dense * _columns(scales, group, cols)
    return dense if minimums is None else dense + _columns(minimums, group, cols)


def _columns(per_group: Tensor, group: int, cols: int) -> Tensor:
    return per_group.float().repeat_interleave(group, 1)[:, :cols]


def _ones(mask: Tensor) -> int:
    return int(native.count_bits(mask, 8 * mask.shape[1])[-1])


def pack_codes(
    codes: Tensor, mask: Tensor | None, scales: Tensor, minimums: Tensor | None, cols: int, packing: int
) -> Packed:
    """For the CPU's kernels. Everything is on the CPU, and of the shapes and dtypes that `packing` and `cols` say."""
    rows = scales.shape[0]
    codes, scales = codes.contiguous(), scales.contiguous()
    mask = None if mask is None else mask.contiguous()
    minimums = None if minimums is None else minimums.contiguous()
    offsets = None
    if mask is not None and layout_of(packing) == "bitquads":
        offsets = native.count_bits(mask, cols)
    kept = 0 if offsets is None else int(offsets[-1])  # of the other layouts, it follows from the shape
    blob = torch.empty(native.packed_bytes(rows, cols, packing, kept, mask), dtype=torch.uint8)
    _core.pack(
        codes.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        scales.data_ptr(),
        0 if minimums is None else minimums.data_ptr(),
        blob.data_ptr(),
        rows,
        cols,
        packing,
        torch.get_num_threads(),
    )
    return Packed(blob, rows, cols, packing)


def unpack_codes(packed: Packed) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(codes, mask, scales, minimums), as they were packed. ValueError where the blob is not that weight."""
    blob, rows, cols, packing = packed
    count = native.header(*packed)["nnz"]
    encoding, threads = encoding_of(packing), torch.get_num_threads()
    bits = CODES[encoding].bits
    mask = offsets = None
    if layout_of(packing) != "quads":
        mask = torch.empty((rows, -(-cols // 8)), dtype=torch.uint8)
        _core.unpack_bits(blob.data_ptr(), blob.numel(), mask.data_ptr(), threads)
        offsets = native.count_bits(mask, cols)
        if int(offsets[-1]) != count:
            raise ValueError(
                f"packed: must keep the {count} values that its header says, got a mask of {int(offsets[-1])}; the weight is damaged, pack it again"
            )
    codes = torch.empty(-(-count * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    _core.unpack_values(
        blob.data_ptr(), blob.numel(), 0 if offsets is None else offsets.data_ptr(), codes.data_ptr(), threads
    )
    scales = torch.empty((rows, -(-cols // group_of(packing))), dtype=scale_dtype_of(packing))
    minimums = torch.empty_like(scales) if CODES[encoding].minimums else None
    _core.unpack_scales(
        blob.data_ptr(),
        blob.numel(),
        scales.data_ptr(),
        0 if minimums is None else minimums.data_ptr(),
        threads,
    )
    return codes, mask, scales, minimums


def lookup(packed: Packed, indices: Tensor) -> Tensor:
    """Rows of a dense weight (`quads`), `[..., cols]` in its dtype, for `indices` `[...]`, int64 or int32, on the CPU.

    Each number is what `dequantize` gives, rounded to the dtype.

    Raises:
        IndexError: an index that is not a row.
        ValueError: the blob is not that weight, or a sparse one.
    """
    blob, rows, cols, packing = packed
    indices = indices.contiguous()
    out = torch.empty((*indices.shape, cols), dtype=dtype_of[packing])
    _core.lookup(
        blob.data_ptr(),
        blob.numel(),
        rows,
        cols,
        packing,
        indices.data_ptr(),
        indices.element_size(),
        indices.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
