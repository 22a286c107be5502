"""The CPU's kernels: tensors become addresses here, and for the GPU in `cuda`, and nowhere else.

torch is imported first, so that the extension finds torch's OpenMP runtime loaded and shares its threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseprune.kernels import _core
from sparseprune.kernels.checks import refuse_input
from sparseprune.kernels.packing import CODES, DTYPES, dtype_of, parts_of_codes

LAYOUTS: tuple[str, ...] = ("tile", "csr")
"""Of plain values."""

CODE_DTYPES: tuple[torch.dtype, ...] = tuple(DTYPES)
"""What weights in codes may compute in."""

_threads = torch.get_num_threads
_empty = torch.empty
_core_linear = _core.linear
_linear_of_tensors = _core.linear_of_tensors
READS_TENSORS: bool = _core.use_tensors(torch.Tensor, torch.nn.Parameter, torch.empty, list(DTYPES))
"""Whether C++ reads tensors itself (torch 2.10 or newer); if not, a call takes two microseconds more."""


def isa() -> str:
    """The instruction set in force: `scalar`, `avx2`, `avx512`, `avx512_vbmi2`, `avx512_bf16` or `amx`."""
    return _core.isa()


def isas_available() -> list[str]:
    """The instruction sets that this build has and this CPU (and its OS) can run, slowest first."""
    return _core.isas_available()


def layout_for(kind: str, n: int, m: int, dtype: torch.dtype) -> str:
    """The packed layout that serves a format best."""
    return "csr" if kind == "csr" else "tile"


def plain_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int
) -> Tensor | None:
    """`linear`, all of it in C++: every attribute of a tensor costs 50 to 150 ns here. None where a tensor is not a plain one
    (contiguous, on the CPU, of the right dtype and width), or where torch is too old (READS_TENSORS)."""
    return _linear_of_tensors(x, packed, bias, rows, cols, packing, _threads())


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int, strategy: int = -1
) -> Tensor:
    """x [..., cols] times the packed weight [rows, cols], transposed, plus bias, a vector.

    strategy: in the place of the plan's choice.
    """
    if strategy < 0:
        made = _linear_of_tensors(x, packed, bias, rows, cols, packing, _threads())
        if made is not None:
            return made
    shape, dtype = x.shape, x.dtype
    if dtype is not dtype_of[packing] or not shape or shape[-1] != cols:
        refuse_input("input", x, "in_features", cols, packing)
    if x.is_contiguous() and cols:
        batch, stride = x.numel() // cols, cols
    else:
        if x.layout != torch.strided:
            refuse_input("input", x, "in_features", cols, packing)
        x = x.reshape(math.prod(shape[:-1]), cols)
        if x.stride(1) != 1 and cols > 1:
            x = x.contiguous()
        batch, stride = x.shape[0], x.stride(0)
    out = _empty(batch, rows, dtype=dtype) if len(shape) == 2 else _empty((*shape[:-1], rows), dtype=dtype)
    _core_linear(
        packed.data_ptr(),
        packed.numel(),
        rows,
        cols,
        packing,
        x.data_ptr(),
        batch,
        stride,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        _threads(),
        strategy,
    )
    return out


def strategy(packed: Tensor, batch: int) -> str:
    """The kernel strategy that serves `batch` rows of activations."""
    return _core.strategy(packed.data_ptr(), packed.numel(), batch)


def header(packed: Tensor, rows: int, cols: int, packing: int) -> dict[str, int]:
    """The header of a packed weight (rows, cols, nnz, packing, interleave). ValueError where it is not that weight."""
    return _core.header(packed.data_ptr(), packed.numel(), rows, cols, packing)


def scan(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Bits [rows, ceil(cols/8)] of the non-zeros and the index of each row's first value [rows + 1]."""
    rows, cols = dense.shape
    bits = torch.empty((rows, (cols + 7) // 8), dtype=torch.uint8)
    offsets = torch.empty(rows + 1, dtype=torch.int64)
    _core.scan_dense(
        dense.data_ptr(), rows, cols, DTYPES[dense.dtype], bits.data_ptr(), offsets.data_ptr(), _threads()
    )
    return bits, offsets


def fill_groups(bits: Tensor, cols: int, n: int, m: int) -> tuple[int, int, int] | None:
    """Raise every group of m bits to n, in place; or (row, group, kept) of the first group that holds more."""
    return _core.fill_groups(bits.shape[0], cols, n, m, bits.data_ptr(), _threads())


def count_bits(bits: Tensor, cols: int) -> Tensor:
    """Index of each row's first value [rows + 1]. ValueError where a padding bit is set."""
    rows = bits.shape[0]
    offsets = torch.empty(rows + 1, dtype=torch.int64)
    total = _core.count_bits(rows, cols, bits.data_ptr(), offsets.data_ptr(), _threads())
    if total < 0:
        raise padding_error(cols, -1 - total)
    return offsets


def padding_error(cols: int, row: int) -> ValueError:
    return ValueError(
        f"bits: the bits past column {cols} must be zero, row {row} has one set; the mask is damaged"
    )


def compress(dense: Tensor, bits: Tensor, offsets: Tensor) -> Tensor:
    """The elements of dense whose bit is set, row-major."""
    rows, cols = dense.shape
    values = torch.empty(int(offsets[-1]), dtype=dense.dtype)
    _core.compress_dense(
        dense.data_ptr(),
        rows,
        cols,
        DTYPES[dense.dtype],
        bits.data_ptr(),
        offsets.data_ptr(),
        values.data_ptr(),
        _threads(),
    )
    return values


def expand(values: Tensor, bits: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """The inverse of compress."""
    rows = bits.shape[0]
    dense = torch.empty((rows, cols), dtype=values.dtype)
    _core.expand_dense(
        values.data_ptr(),
        bits.data_ptr(),
        offsets.data_ptr(),
        dense.data_ptr(),
        rows,
        cols,
        DTYPES[values.dtype],
        _threads(),
    )
    return dense


def dense_to_csr(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = dense.shape
    crow = torch.empty(rows + 1, dtype=torch.int64)
    code = DTYPES[dense.dtype]
    nnz = _core.count_dense(dense.data_ptr(), rows, cols, code, crow.data_ptr(), _threads())
    col = torch.empty(nnz, dtype=torch.int32)
    values = torch.empty(nnz, dtype=dense.dtype)
    _core.dense_to_csr(
        dense.data_ptr(), rows, cols, code, crow.data_ptr(), col.data_ptr(), values.data_ptr(), _threads()
    )
    return crow, col, values


def csr_to_dense(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    rows = crow.numel() - 1
    dense = torch.empty((rows, cols), dtype=values.dtype)
    _core.csr_to_dense(
        crow.data_ptr(),
        col.data_ptr(),
        values.numel(),
        values.data_ptr(),
        dense.data_ptr(),
        rows,
        cols,
        DTYPES[values.dtype],
        _threads(),
    )
    return dense


def packed_bytes(rows: int, cols: int, packing: int, nnz: int, bits: Tensor | None = None) -> int:
    """Bytes of a packed weight [rows, cols] that keeps `nnz` values. Of the layout `bitquads` they depend on the mask, `bits`."""
    return _core.packed_bytes(rows, cols, packing, nnz, 0 if bits is None else bits.data_ptr())


def pack(values: Tensor, bits: Tensor, offsets: Tensor, cols: int, packing: int) -> Tensor:
    return _pack(values, bits, offsets, None, None, bits.shape[0], cols, packing)


def _pack(
    values: Tensor,
    bits: Tensor | None,
    offsets: Tensor | None,
    scales: Tensor | None,
    minimums: Tensor | None,
    rows: int,
    cols: int,
    packing: int,
) -> Tensor:
    """bits, offsets: None where every entry is kept; scales and minimums where values are not codes, or have none."""
    kept = rows * cols if offsets is None else int(offsets[-1])
    packed = torch.empty(packed_bytes(rows, cols, packing, kept, bits), dtype=torch.uint8)
    _core.pack(
        values.data_ptr(),
        _address(bits),
        _address(offsets),
        _address(scales),
        _address(minimums),
        packed.data_ptr(),
        rows,
        cols,
        packing,
        _threads(),
    )
    return packed


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def unpack(packed: Tensor, rows: int, cols: int, packing: int) -> tuple[Tensor, Tensor]:
    nnz = header(packed, rows, cols, packing)["nnz"]
    bits = torch.empty((rows, (cols + 7) // 8), dtype=torch.uint8)
    _core.unpack_bits(packed.data_ptr(), packed.numel(), bits.data_ptr(), _threads())
    offsets = count_bits(bits, cols)
    values = torch.empty(nnz, dtype=dtype_of[packing])
    _core.unpack_values(packed.data_ptr(), packed.numel(), offsets.data_ptr(), values.data_ptr(), _threads())
    return values, bits


def dense(packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    """The weight [rows, cols] of a packed one. ValueError where it is not that weight."""
    values, bits = unpack(packed, rows, cols, packing)
    return expand(values, bits, count_bits(bits, cols), cols)


def layout_of_codes(kind: str, n: int, m: int) -> str:
    """The packed layout of int8 and int4 weights in a format; empty where there are no kernels for it, as on a GPU
    for all but dense and 2:4."""
    if kind == "dense":
        return "quads"
    return "octets" if (n, m) == (2, 4) else "bitquads"


def pack_codes(
    codes: Tensor, mask: Tensor | None, scales: Tensor, minimums: Tensor | None, cols: int, packing: int
) -> Tensor:
    """The blob of a weight in codes (kernels/codes.py)."""
    offsets = None if mask is None else count_bits(mask, cols)
    return _pack(codes, mask, offsets, scales, minimums, scales.shape[0], cols, packing)


def require_kept(nnz: int, found: int) -> None:
    """ValueError where the mask of a blob keeps another number of entries than its header says."""
    if found != nnz:
        raise ValueError(
            f"packed: must keep the {nnz} values that its header says, got a mask of {found}; the weight is damaged, pack it "
            "again"
        )


def unpack_codes(packed: Tensor, rows: int, cols: int, packing: int) -> dict[str, Tensor]:
    """What it was packed from, by the names of `parts_of_codes`. ValueError where it is not that weight."""
    nnz = header(packed, rows, cols, packing)["nnz"]
    blob = packed.data_ptr(), packed.numel()
    parts = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in parts_of_codes(rows, cols, packing, nnz).items()
    }
    offsets = None
    if "mask" in parts:
        _core.unpack_bits(*blob, parts["mask"].data_ptr(), _threads())
        offsets = count_bits(parts["mask"], cols)
        require_kept(nnz, int(offsets[-1]))
    _core.unpack_values(*blob, _address(offsets), parts["codes"].data_ptr(), _threads())
    _core.unpack_scales(*blob, parts["scales"].data_ptr(), _address(parts.get("minimums")), _threads())
    return parts


def lookup(packed: Tensor, rows: int, cols: int, packing: int, indices: Tensor) -> Tensor:
    """Rows of a dense weight in codes. IndexError where an index is not one."""
    out = torch.empty((*indices.shape, cols), dtype=dtype_of[packing])
    _core.lookup(
        packed.data_ptr(),
        packed.numel(),
        rows,
        cols,
        packing,
        indices.data_ptr(),
        indices.element_size(),
        indices.numel(),
        out.data_ptr(),
        _threads(),
    )
    return out


def round_weight(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group: int,
    encoding: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """What a float32 weight rounds to, in `dtype`; None: the codes, int8 (kernels/rounding.py)."""
    out = torch.empty(weight.shape, dtype=dtype or torch.int8)
    given = _rounding(weight, scales, minimums, kept, group, encoding)
    _core.round_weight(*given, -1 if dtype is None else DTYPES[dtype], out.data_ptr(), _threads())
    return out


def round_gradients(
    gradient: Tensor,
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group: int,
    encoding: str,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The gradients of `round_weight` to weight, scales and minimums (left alone where there are none), to out."""
    of_weight, of_scales, of_minimums = out
    _core.round_gradients(
        *_rounding(weight, scales, minimums, kept, group, encoding),
        DTYPES[gradient.dtype],
        gradient.data_ptr(),
        of_weight.data_ptr(),
        of_scales.data_ptr(),
        0 if minimums is None else of_minimums.data_ptr(),
        _threads(),
    )


def _rounding(
    weight: Tensor, scales: Tensor, minimums: Tensor | None, kept: Tensor | None, group: int, encoding: str
) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    """What both kernels are told."""
    (rows, cols), code = weight.shape, CODES[encoding]
    places = scales.data_ptr(), _address(minimums), _address(kept)
    return weight.data_ptr(), rows, cols, group, *places, code.zero, code.least, code.largest


def mask_bytes(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the bool mask keeps it, else 0; out may be x."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    _core.mask_bytes(x.data_ptr(), mask.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype], _threads())
    return out


def mask_bits(x: Tensor, bits: Tensor, out: Tensor | None = None) -> Tensor:
    """The same with a bitmask."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    rows, cols = x.shape
    _core.mask_bits(x.data_ptr(), bits.data_ptr(), out.data_ptr(), rows, cols, DTYPES[x.dtype], _threads())
    return out


def threshold_(x: Tensor, limit: float) -> Tensor:
    rows, cols = x.shape
    bits = torch.empty((rows, (cols + 7) // 8), dtype=torch.uint8)
    _core.threshold(
        x.data_ptr(), limit, x.data_ptr(), bits.data_ptr(), rows, cols, DTYPES[x.dtype], _threads()
    )
    return bits


def bytes_to_bits(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    bits = torch.empty((rows, (cols + 7) // 8), dtype=torch.uint8)
    _core.bytes_to_bits(rows, cols, mask.data_ptr(), bits.data_ptr(), _threads())
    return bits


def bits_to_bytes(bits: Tensor, cols: int) -> Tensor:
    mask = torch.empty((bits.shape[0], cols), dtype=torch.bool)
    _core.bits_to_bytes(bits.shape[0], cols, bits.data_ptr(), mask.data_ptr(), _threads())
    return mask
