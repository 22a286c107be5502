"""int8 and int4 weights: packed for the kernels and back, and what their codes stand for.

Codes are those of the kept entries in row-major order: `int8 [nnz]`, or two int4 to a byte, `uint8 [ceil(nnz / 2)]`, the
low nibble first. Every `group` columns of a row of the dense weight share a scale, and with `int4_minimum` a minimum:
`scales`, `minimums` `[rows, ceil(cols / group)]`, bfloat16 or float16.

    int8           code * scale
    int4           (code - 8) * scale
    int4_minimum   code * scale + minimum

On a CPU they are packed as `quads` (dense), `octets` (2:4) and `bitquads` (any others), on a GPU as `fragments` (dense) and
`fragments24` (2:4), and no others (docs/formats.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.kernels import backend
from sparseprune.kernels.packing import CODES, Packed

__all__ = [
    "dequantize",
    "join_nibbles",
    "layout_for",
    "lookup",
    "pack_codes",
    "split_nibbles",
    "unpack_codes",
    "unserved",
]


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
        kernels = backend.of(mask)
        dense = kernels.expand(numbers, mask, kernels.count_bits(mask, cols), cols)
    dense = dense * _columns(scales, group, cols)
    return dense if minimums is None else dense + _columns(minimums, group, cols)


def _columns(per_group: Tensor, group: int, cols: int) -> Tensor:
    return per_group.float().repeat_interleave(group, 1)[:, :cols]


def _ones(mask: Tensor) -> int:
    return int(backend.of(mask).count_bits(mask, 8 * mask.shape[1])[-1])


def unserved(dtype: torch.dtype, where: Tensor) -> str:
    """Why nothing multiplies by codes on the device of `where` and computes in `dtype`, and the remedy; empty where something
    does."""
    dtypes = backend.of(where).CODE_DTYPES
    if dtype in dtypes:
        return ""
    names = " or ".join(str(it).removeprefix("torch.") for it in dtypes)
    return (
        f"int8 and int4 weights compute in {names} on {where.device}, got {str(dtype).removeprefix('torch.')}; cast with "
        f".to(torch.bfloat16){'' if where.is_cpu else ', or keep it on the CPU'}"
    )


def layout_for(kind: str, n: int, m: int, dtype: torch.dtype, where: Tensor) -> str:
    """The packed layout, on the device of `where`, of codes in a format ("dense", "nm" with its n and m, "bitmap") that are to
    compute in `dtype`.

    Raises:
        ValueError: there is no data, or the device has no kernels for them.
    """
    if where.is_meta:
        raise ValueError("codes: a weight on the meta device has no data; load a state dict first")
    if problem := unserved(dtype, where):
        raise ValueError(f"dtype: {problem}")
    layout = backend.of(where).layout_of_codes(kind, n, m)
    if not layout:
        raise ValueError(
            f"format: must be dense or 2:4 for int8 and int4 weights on {where.device}, got "
            f"{f'{n}:{m}' if kind == 'nm' else kind}; keep the layer on the CPU, or make it dense with to_dense()"
        )
    return layout


def pack_codes(
    codes: Tensor, mask: Tensor | None, scales: Tensor, minimums: Tensor | None, cols: int, packing: int
) -> Packed:
    """For the kernels of the device that everything is on. Everything is of the shapes and dtypes that `packing`, of a layout
    that `layout_for` gives there, and `cols` say."""
    codes, scales = codes.contiguous(), scales.contiguous()
    mask = None if mask is None else mask.contiguous()
    minimums = None if minimums is None else minimums.contiguous()
    blob = backend.of(codes).pack_codes(codes, mask, scales, minimums, cols, packing)
    return Packed(blob, scales.shape[0], cols, packing)


def unpack_codes(packed: Packed) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(codes, mask, scales, minimums), as they were packed. ValueError where the blob is not that weight."""
    parts = backend.of(packed.blob).unpack_codes(*packed)
    return parts["codes"], parts.get("mask"), parts["scales"], parts.get("minimums")


def lookup(packed: Packed, indices: Tensor) -> Tensor:
    """Rows of a dense weight, `[..., cols]` in its dtype, for `indices` `[...]`, int64 or int32, on its device.

    Each number is what `dequantize` gives, rounded to the dtype.

    Raises:
        IndexError: on a CPU, an index that is not a row; a GPU, which nobody waits for here, gives a row of NaN.
        ValueError: the blob is not that weight, or a sparse one.
    """
    return backend.of(packed.blob).lookup(*packed, indices.contiguous())
