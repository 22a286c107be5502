"""The GPU's twin of `native`: the same functions over tensors on a CUDA device, on its current stream.

A launch returns at once. What has to know a number (how many values there are, where something is wrong) waits for the
device; `linear` and `dense` never do, so that they may be captured into a graph.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from sparseprune.kernels import _core, native
from sparseprune.kernels.checks import refuse_input
from sparseprune.kernels.packing import DTYPES, dtype_of, layout_of, parts_of_codes

LAYOUTS: tuple[str, ...] = ("sparse24", "bitmap8")
"""Of plain values."""

CODE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""What weights in codes may compute in: operands of tensor cores."""

_NO_ERROR = 2**63 - 1  # launchers.h: kNoError
_ALIGN = 64  # core/layouts/geometry.h: kAlign
_HEADER = 64
_NOT_BUILT = (
    "this build of sparseprune has no CUDA kernels; install a wheel that has them, or build with "
    "-C cmake.define.SPARSEPRUNE_CUDA=ON (a plain build has them only for a card that is there), or keep the model on the CPU"
)


class _NotBuilt:
    """In the place of the kernels in a build for CPUs."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"CUDA: {_NOT_BUILT}")


# Looked up at every call: the tests put the emulated GPU (tests/simt) in the place of these, which then sees the
# kernels' calls, the range of each buffer and whether it may be written to, and poisons what is to be written.
_kernels: _core.Cuda = getattr(_core, "cuda", None) or cast("_core.Cuda", _NotBuilt())
_source = _target = Tensor.data_ptr
_empty = torch.empty
_stream: Any = getattr(
    torch._C, "_cuda_getCurrentRawStream", None
)  # a torch for CPUs has none, and no CUDA tensors


def missing() -> str:
    """What keeps the kernels from running here, and the remedy; empty where they run."""
    if isinstance(_kernels, _NotBuilt):
        return _NOT_BUILT
    if lacking := _kernels.missing():
        return lacking
    if _stream is None:
        return f"torch {torch.__version__} has no CUDA; install a build of torch that has"
    return ""


def cuda_info() -> dict[str, Any]:
    """What GPUs and kernels for them there are.

    built: whether this build has the kernels; toolkit: the CUDA version they were compiled with; targets: for which
    architectures; missing: what keeps them from running here, empty where they run; devices: name, compute capability
    and number of multiprocessors of each GPU that torch sees.
    """
    built = not isinstance(_kernels, _NotBuilt)
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": card.name,
                    "capability": f"{card.major}.{card.minor}",
                    "multiprocessors": card.multi_processor_count,
                }
            )
    return {
        "built": built,
        "toolkit": getattr(_kernels, "toolkit", "") if built else "",
        "targets": getattr(_kernels, "targets", "").split() if built else [],
        "missing": missing(),
        "devices": devices,
    }


def layout_for(kind: str, n: int, m: int, dtype: torch.dtype) -> str:
    """The packed layout that serves a format best: tensor cores take 2:4 as it is, of 16-bit values."""
    return "sparse24" if (kind, n, m) == ("nm", 2, 4) and dtype != torch.float32 else "bitmap8"


def _place(x: Tensor) -> tuple[int, int]:
    index = x.get_device()
    return index, _stream(index)


def _new(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return _empty(shape, dtype=dtype, device=like.device)


def _running_sum(counts: Tensor) -> Tensor:
    offsets = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _no_error(like: Tensor) -> Tensor:
    return torch.full((1,), _NO_ERROR, dtype=torch.int64, device=like.device)


# --- linear -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def plan(device: int, packing: int, rows: int, cols: int, batch: int) -> tuple[int, int, int]:
    """(configuration, blocks that share a sum, bytes of workspace) that serve a linear of this shape best."""
    return _kernels.plan(device, packing, rows, cols, batch)


def configs(packing: int) -> list[str]:
    """Names of the linear's configurations; each serves any shape."""
    return _kernels.configs(packing)


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    packing: int,
    forced: tuple[int, int] | None = None,
) -> Tensor:
    """x [..., cols] times the packed weight [rows, cols], transposed, plus bias, a vector; all on one device.

    forced: (configuration, splits) in the place of the plan's choice.
    """
    # As in native.linear, every attribute counts: the launch of a small layer takes the GPU 3 us.
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
    device, index = x.device, x.get_device()
    if forced is None:
        config, splits, workspace_bytes = plan(index, packing, rows, cols, batch)
    else:
        config, splits = forced
        workspace_bytes = 4 * splits * batch * rows if splits > 1 else 0
    out = _empty((*shape[:-1], rows), dtype=dtype, device=device)
    # Its memory may be handed out again while the kernels run: to what comes after them on the same stream.
    workspace = _empty(workspace_bytes, dtype=torch.uint8, device=device) if workspace_bytes else None
    _kernels.linear(
        index,
        _stream(index),
        _source(packed),
        packed.numel(),
        rows,
        cols,
        packing,
        _source(x),
        batch,
        stride,
        0 if bias is None else _source(bias),
        _target(out),
        config,
        splits,
        0 if workspace is None else _target(workspace),
        workspace_bytes,
    )
    return out


# --- conversions ------------------------------------------------------------------------------------------------------


def scan(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Bits [rows, ceil(cols/8)] of the non-zeros and the index of each row's first value [rows + 1]."""
    rows, cols = dense.shape
    bits = _new(dense, rows, (cols + 7) // 8, dtype=torch.uint8)
    counts = _new(dense, rows, dtype=torch.int64)
    _kernels.scan_dense(
        *_place(dense), _source(dense), rows, cols, DTYPES[dense.dtype], _target(bits), _target(counts)
    )
    return bits, _running_sum(counts)


def fill_groups(bits: Tensor, cols: int, n: int, m: int) -> tuple[int, int, int] | None:
    """Raise every group of m bits to n, in place; or (row, group, kept) of the first group that holds more."""
    error = _no_error(bits)
    _kernels.fill_groups(*_place(bits), bits.shape[0], cols, n, m, _target(bits), _target(error))
    place = int(error)
    if place == _NO_ERROR:
        return None
    row, group = divmod(place, cols // m)
    return row, group, _kept(bits, cols, row, group, m)


def _kept(bits: Tensor, cols: int, row: int, group: int, m: int) -> int:
    return int(bits_to_bytes(bits[row : row + 1], cols)[0, group * m : (group + 1) * m].sum())


def count_bits(bits: Tensor, cols: int) -> Tensor:
    """Index of each row's first value [rows + 1]. ValueError where a padding bit is set."""
    rows = bits.shape[0]
    counts = _new(bits, rows, dtype=torch.int64)
    error = _no_error(bits)
    _kernels.count_bits(*_place(bits), rows, cols, _source(bits), _target(counts), _target(error))
    place = int(error)
    if place != _NO_ERROR:
        raise native.padding_error(cols, place)
    return _running_sum(counts)


def compress(dense: Tensor, bits: Tensor, offsets: Tensor) -> Tensor:
    """The elements of dense whose bit is set, row-major."""
    rows, cols = dense.shape
    values = _new(dense, int(offsets[-1]), dtype=dense.dtype)
    _kernels.compress_dense(
        *_place(dense),
        _source(dense),
        rows,
        cols,
        DTYPES[dense.dtype],
        _source(bits),
        _source(offsets),
        _target(values),
    )
    return values


def expand(values: Tensor, bits: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """The inverse of compress."""
    rows = bits.shape[0]
    dense = _new(values, rows, cols, dtype=values.dtype)
    _kernels.expand_dense(
        *_place(values),
        _source(values),
        _source(bits),
        _source(offsets),
        _target(dense),
        rows,
        cols,
        DTYPES[values.dtype],
    )
    return dense


def dense_to_csr(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = dense.shape
    code = DTYPES[dense.dtype]
    counts = _new(dense, rows, dtype=torch.int64)
    _kernels.scan_dense(*_place(dense), _source(dense), rows, cols, code, 0, _target(counts))
    crow = _running_sum(counts)
    nnz = int(crow[-1])
    col, values = _new(dense, nnz, dtype=torch.int32), _new(dense, nnz, dtype=dense.dtype)
    _kernels.dense_to_csr(
        *_place(dense), _source(dense), rows, cols, code, _source(crow), _target(col), _target(values)
    )
    return crow, col, values


def csr_to_dense(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    rows = crow.numel() - 1
    dense = _new(values, rows, cols, dtype=values.dtype)
    error = _no_error(values)
    _kernels.csr_to_dense(
        *_place(values),
        _source(crow),
        _source(col),
        values.numel(),
        _source(values),
        _target(dense),
        rows,
        cols,
        DTYPES[values.dtype],
        _target(error),
    )
    place = int(error)
    if place != _NO_ERROR or not rows * cols:
        # The CPU says what is wrong with it; and it checks what no kernel was started for.
        native.csr_to_dense(crow.cpu(), col.cpu(), values.cpu(), cols)
    if place != _NO_ERROR:
        raise ValueError(f"crow, col: row {place} must hold ascending columns in [0, {cols})")
    return dense


# --- packed weights ---------------------------------------------------------------------------------------------------


def header(packed: Tensor, rows: int, cols: int, packing: int) -> dict[str, int]:
    """The header of a packed weight (rows, cols, nnz, packing). ValueError where it is not that weight."""
    head = packed[:_HEADER].cpu()
    return _kernels.header(head.data_ptr(), packed.numel(), rows, cols, packing)


def pack(values: Tensor, bits: Tensor, offsets: Tensor, cols: int, packing: int) -> Tensor:
    rows = bits.shape[0]
    dense = expand(values, bits, offsets, cols)
    if layout_of(packing) == "sparse24":
        packed = _blob(values, rows, cols, packing)
        error = _no_error(values)
        _kernels.sparse24_pack(
            *_place(values),
            _source(dense),
            _source(bits),
            rows,
            cols,
            packing,
            _target(packed),
            packed.numel(),
            _target(error),
        )
        place = int(error)
        if place != _NO_ERROR:
            row, group = divmod(place, cols // 4)
            raise ValueError(
                f"bits: must keep exactly 2 of every 4 columns of a row for the layout 'sparse24', row {row} keeps "
                f"{_kept(bits, cols, row, group, 4)} in columns {4 * group} to {4 * group + 3}; use 'bitmap8'"
            )
        return packed
    units = _kernels.sections(rows, cols, packing, 0)[0]
    index, counts = _new(bits, units, 16, dtype=torch.int64), _new(bits, units, dtype=torch.int64)
    _kernels.bitmap8_index(*_place(bits), rows, cols, _source(bits), _target(index), _target(counts))
    packed = _blob(values, rows, cols, packing, _running_sum(counts), index)
    _kernels.bitmap8_pack(
        *_place(values), _source(dense), rows, cols, packing, _target(packed), packed.numel()
    )
    return packed


def _blob(
    values: Tensor,
    rows: int,
    cols: int,
    packing: int,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """A packed weight but for what the kernels write: all of sparse24 and of fragments, bitmap8's values."""
    stored = 0 if offsets is None else int(offsets[-1])
    _, first, second, third, total = _kernels.sections(rows, cols, packing, stored)
    packed = _new(values, total, dtype=torch.uint8)
    head = _kernels.header_bytes(rows, cols, packing, values.numel(), stored)
    packed[:first].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    if offsets is not None and index is not None:
        packed[first : first + offsets.nbytes].copy_(offsets.view(torch.uint8))
        packed[first + offsets.nbytes : second].zero_()
        packed[second:third].copy_(index.view(-1).view(torch.uint8))
        packed[third + stored * values.element_size() :].zero_()  # so that equal weights make equal blobs
    return packed


def unpack(packed: Tensor, rows: int, cols: int, packing: int) -> tuple[Tensor, Tensor]:
    nnz = header(packed, rows, cols, packing)["nnz"]
    full = _new(packed, rows, cols, dtype=dtype_of[packing])
    bits = _new(packed, rows, (cols + 7) // 8, dtype=torch.uint8)
    _unpack(packed, packing, full, bits)
    offsets = count_bits(bits, cols)
    native.require_kept(nnz, int(offsets[-1]))
    return compress(full, bits, offsets), bits


def dense(packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    """The weight [rows, cols] of a packed one. ValueError where no such weight has a blob of this size."""
    full = _new(packed, rows, cols, dtype=dtype_of[packing])
    _unpack(packed, packing, full, None)
    return full


def _unpack(packed: Tensor, packing: int, full: Tensor, bits: Tensor | None) -> None:
    sparse24 = layout_of(packing) == "sparse24"
    (_kernels.sparse24_unpack if sparse24 else _kernels.bitmap8_unpack)(
        *_place(packed),
        _source(packed),
        packed.numel(),
        full.shape[0],
        full.shape[1],
        packing,
        _target(full),
        0 if bits is None else _target(bits),
    )


# --- weights in codes -------------------------------------------------------------------------------------------------


def layout_of_codes(kind: str, n: int, m: int) -> str:
    """The packed layout of int8 and int4 weights in a format; empty where no kernels read them: all but dense and 2:4."""
    if kind == "dense":
        return "fragments"
    return "fragments24" if (n, m) == (2, 4) else ""


def pack_codes(
    codes: Tensor, mask: Tensor | None, scales: Tensor, minimums: Tensor | None, cols: int, packing: int
) -> Tensor:
    """The blob of a weight in codes (kernels/codes.py)."""
    rows = scales.shape[0]
    packed = _blob(codes, rows, cols, packing)
    _kernels.fragments_pack(
        *_place(codes),
        _source(codes),
        0 if mask is None else _source(mask),
        _source(scales),
        0 if minimums is None else _source(minimums),
        rows,
        cols,
        packing,
        _target(packed),
        packed.numel(),
    )
    return packed


def unpack_codes(packed: Tensor, rows: int, cols: int, packing: int) -> dict[str, Tensor]:
    """What it was packed from, by the names of `parts_of_codes`. ValueError where it is not that weight."""
    nnz = header(packed, rows, cols, packing)["nnz"]
    parts = {
        name: _new(packed, *shape, dtype=dtype)
        for name, (shape, dtype) in parts_of_codes(rows, cols, packing, nnz).items()
    }
    _kernels.fragments_unpack(
        *_place(packed),
        _source(packed),
        packed.numel(),
        rows,
        cols,
        packing,
        *(_target(parts[name]) if name in parts else 0 for name in ("codes", "mask", "scales", "minimums")),
    )
    if "mask" in parts:
        native.require_kept(nnz, int(count_bits(parts["mask"], cols)[-1]))
    return parts


def lookup(packed: Tensor, rows: int, cols: int, packing: int, indices: Tensor) -> Tensor:
    """Rows of a dense weight in codes; NaN where an index is not one."""
    out = _new(packed, *indices.shape, cols, dtype=dtype_of[packing])
    indices = indices.long()
    _kernels.fragments_lookup(
        *_place(packed),
        _source(packed),
        packed.numel(),
        rows,
        cols,
        packing,
        _source(indices),
        indices.numel(),
        _target(out),
    )
    return out


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_bytes(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the bool mask keeps it, else 0; out may be x."""
    out = _empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _kernels.mask_bytes(*_place(x), _source(x), _source(mask), _target(out), x.numel(), DTYPES[x.dtype])
    return out


def mask_bits(x: Tensor, bits: Tensor, out: Tensor | None = None) -> Tensor:
    """The same with a bitmask."""
    out = _empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows, cols = x.shape
    _kernels.mask_bits(*_place(x), _source(x), _source(bits), _target(out), rows, cols, DTYPES[x.dtype])
    return out


def threshold_(x: Tensor, limit: float) -> Tensor:
    rows, cols = x.shape
    bits = _new(x, rows, (cols + 7) // 8, dtype=torch.uint8)
    _kernels.threshold(*_place(x), _source(x), limit, _target(x), _target(bits), rows, cols, DTYPES[x.dtype])
    return bits


def bytes_to_bits(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    bits = _new(mask, rows, (cols + 7) // 8, dtype=torch.uint8)
    _kernels.bytes_to_bits(*_place(mask), rows, cols, _source(mask), _target(bits))
    return bits


def bits_to_bytes(bits: Tensor, cols: int) -> Tensor:
    mask = _new(bits, bits.shape[0], cols, dtype=torch.bool)
    _kernels.bits_to_bytes(*_place(bits), bits.shape[0], cols, _source(bits), _target(mask))
    return mask
