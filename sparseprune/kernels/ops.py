"""The operations, as `torch.ops.sparseprune.*` and as functions of the same names.

Each operation checks its arguments once (`checks`), on the real and the fake (shape-only) path alike. Tensors are on
the CPU or on one CUDA device; values are float32, bfloat16 or float16; sums are float32. `bits` is a bitmask `uint8 [rows, ceil(cols / 8)]`: bit
`c % 8` of byte `c // 8` says whether column `c` is kept, and the bits past the last column are zero. A zero is +0.0 or
-0.0; NaN is not a zero.

    mask_apply(input, mask)            input where the bool mask is True, else 0          mask_apply_: in place
    mask_apply_packed(input, bits)     the same with a bitmask                            mask_apply_packed_: in place
    threshold_mask_(input, t)          zero |input| <= t in place, return the bits of the rest
    pack_mask(mask), unpack_mask(bits, cols)
    dense_to_bitmap(dense)             (values, bits) of the non-zeros
    dense_to_nm(dense, n, m)           (values, bits), exactly n of every m columns
    bitmap_to_dense(values, bits, cols)   the inverse of both
    dense_to_csr(dense), csr_to_dense(crow, col, values, cols)
    pack(values, bits, cols, layout)   `Packed`: a blob for the device's kernels; unpack(packed) -> (values, bits)
    linear(input, packed, bias)        input @ weight.T + bias
    lookup(indices, packed)            weight[indices], of dense int8 and int4 weights
    round_through(weight, ...)         what a weight's codes stand for, with a gradient: rounding.py

Those of torch take a `Packed` by its fields: the blob, rows, cols and the number that says how it is packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseprune.kernels import backend, codes, native
from sparseprune.kernels.checks import (
    check,
    check_bits,
    check_canonical,
    check_device,
    check_grad,
    check_in_place,
    check_linear,
    check_lookup,
    check_mask,
    check_matrix,
    check_nm,
    check_pack,
    check_packed,
    check_values,
    check_vector,
)
from sparseprune.kernels.codes import dequantize, unpack_codes
from sparseprune.kernels.packing import Packed, dtype_of, encoding_of, group_of, packing_code

__all__ = [
    "bitmap_to_dense", "csr_to_dense", "dense_to_bitmap", "dense_to_csr", "dense_to_nm", "linear", "lookup", "mask_apply",
    "mask_apply_", "mask_apply_packed", "mask_apply_packed_", "pack", "pack_mask", "threshold_mask_", "unpack", "unpack_mask",
]  # fmt: skip

library = torch.library.Library("sparseprune", "DEF")


def _dynamic_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def define(schema: str, real: Callable, fake: Callable) -> None:
    name = schema.split("(", 1)[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, real, key)
    torch.library.register_fake(f"sparseprune::{name}", fake, lib=library)


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask_apply_fake(x: Tensor, mask: Tensor) -> Tensor:
    check_mask(x, mask)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask_apply(x: Tensor, mask: Tensor) -> Tensor:
    check_mask(x, mask)
    return backend.of(x).mask_bytes(x.contiguous(), mask.contiguous())


def _mask_apply_in_fake(x: Tensor, mask: Tensor) -> None:
    check_mask(x, mask)
    check_in_place("input", x)


def _mask_apply_in(x: Tensor, mask: Tensor) -> None:
    _mask_apply_in_fake(x, mask)
    backend.of(x).mask_bytes(x, mask.contiguous(), x)


def _check_mask_packed(x: Tensor, bits: Tensor) -> None:
    check_matrix("input", x)
    check_bits(bits, x.shape[0], x.shape[1])
    check_device("input", x, bits=bits)


def _mask_packed_fake(x: Tensor, bits: Tensor) -> Tensor:
    _check_mask_packed(x, bits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask_packed(x: Tensor, bits: Tensor) -> Tensor:
    _check_mask_packed(x, bits)
    return backend.of(x).mask_bits(x.contiguous(), bits.contiguous())


def _mask_packed_in_fake(x: Tensor, bits: Tensor) -> None:
    _check_mask_packed(x, bits)
    check_in_place("input", x)


def _mask_packed_in(x: Tensor, bits: Tensor) -> None:
    _mask_packed_in_fake(x, bits)
    backend.of(x).mask_bits(x, bits.contiguous(), x)


def _threshold_fake(x: Tensor, threshold: float) -> Tensor:
    check_matrix("input", x)
    check_in_place("input", x)
    check(threshold >= 0, lambda: f"threshold: must be a number of at least 0, got {threshold}")
    return x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)


def _threshold(x: Tensor, threshold: float) -> Tensor:
    _threshold_fake(x, threshold)
    return backend.of(x).threshold_(x, threshold)


def _pack_mask_fake(mask: Tensor) -> Tensor:
    check(mask.dtype == torch.bool, lambda: f"mask: must be bool, got {mask.dtype}", TypeError)
    check(mask.dim() == 2, lambda: f"mask: must be a matrix [rows, cols], got shape {tuple(mask.shape)}")
    return mask.new_empty((mask.shape[0], (mask.shape[1] + 7) // 8), dtype=torch.uint8)


def _pack_mask(mask: Tensor) -> Tensor:
    _pack_mask_fake(mask)
    return backend.of(mask).bytes_to_bits(mask.contiguous())


def _unpack_mask_fake(bits: Tensor, cols: int) -> Tensor:
    check_bits(bits, None, cols)
    return bits.new_empty((bits.shape[0], cols), dtype=torch.bool)


def _unpack_mask(bits: Tensor, cols: int) -> Tensor:
    _unpack_mask_fake(bits, cols)
    return backend.of(bits).bits_to_bytes(bits.contiguous(), cols)


define("mask_apply(Tensor input, Tensor mask) -> Tensor", _mask_apply, _mask_apply_fake)
define("mask_apply_(Tensor(a!) input, Tensor mask) -> ()", _mask_apply_in, _mask_apply_in_fake)
define("mask_apply_packed(Tensor input, Tensor bits) -> Tensor", _mask_packed, _mask_packed_fake)
define("mask_apply_packed_(Tensor(a!) input, Tensor bits) -> ()", _mask_packed_in, _mask_packed_in_fake)
define("threshold_mask_(Tensor(a!) input, float threshold) -> Tensor", _threshold, _threshold_fake)
define("pack_mask(Tensor mask) -> Tensor", _pack_mask, _pack_mask_fake)
define("unpack_mask(Tensor bits, int cols) -> Tensor", _unpack_mask, _unpack_mask_fake)


# --- formats ----------------------------------------------------------------------------------------------------------


def _bits_like(dense: Tensor) -> Tensor:
    return dense.new_empty((dense.shape[0], (dense.shape[1] + 7) // 8), dtype=torch.uint8)


def _bitmap_fake(dense: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("dense", dense)
    return dense.new_empty(_dynamic_size()), _bits_like(dense)


def _bitmap(dense: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("dense", dense)
    dense = dense.contiguous()
    kernels = backend.of(dense)
    bits, offsets = kernels.scan(dense)
    return kernels.compress(dense, bits, offsets), bits


def _nm_fake(dense: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    check_nm(dense, n, m)
    return dense.new_empty(dense.shape[0] * (dense.shape[1] // m) * n), _bits_like(dense)


def _nm(dense: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    check_nm(dense, n, m)
    dense = dense.contiguous()
    kernels = backend.of(dense)
    bits, _ = kernels.scan(dense)
    error = kernels.fill_groups(bits, dense.shape[1], n, m)
    if error is not None:
        row, group, kept = error
        raise ValueError(
            f"dense: must hold at most {n} non-zeros in every {m} columns of a row for {n}:{m}, row {row} holds "
            f"{kept} in columns {group * m} to {group * m + m - 1}; prune it to {n}:{m} or use the bitmap format"
        )
    return kernels.compress(dense, bits, kernels.count_bits(bits, dense.shape[1])), bits


def _offsets(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    offsets = backend.of(bits).count_bits(bits, cols)
    check(
        int(offsets[-1]) == values.numel(),
        lambda: (
            f"values: must hold one value for each of the {int(offsets[-1])} bits set, got {values.numel()}; "
            "values and bits are not of the same weight"
        ),
    )
    return offsets


def _bitmap_dense_fake(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    check_canonical(values, bits, cols)
    return values.new_empty((bits.shape[0], cols))


def _bitmap_dense(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    check_canonical(values, bits, cols)
    values, bits = values.contiguous(), bits.contiguous()
    return backend.of(values).expand(values, bits, _offsets(values, bits, cols), cols)


def _csr_fake(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_matrix("dense", dense)
    nnz = _dynamic_size()
    return (
        dense.new_empty(dense.shape[0] + 1, dtype=torch.int64),
        dense.new_empty(nnz, dtype=torch.int32),
        dense.new_empty(nnz),
    )


def _csr(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_matrix("dense", dense)
    check(dense.shape[1] < 2**31, lambda: f"dense: must have less than 2^31 columns, got {dense.shape[1]}")
    return backend.of(dense).dense_to_csr(dense.contiguous())


def _csr_dense_fake(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    check_vector("crow", crow, torch.int64)
    check_vector("col", col, torch.int32)
    check_values("values", values)
    check_vector("values", values)
    check_device("values", values, crow=crow, col=col)
    check(crow.numel() >= 1, lambda: "crow: must have rows + 1 entries, got none")
    check(
        col.shape == values.shape,
        lambda: f"col: must be as long as values ({values.shape[0]}), got {col.shape[0]}",
    )
    check(0 <= cols < 2**31, lambda: f"cols: must be in [0, 2^31), got {cols}")
    return values.new_empty((crow.numel() - 1, cols))


def _csr_dense(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    _csr_dense_fake(crow, col, values, cols)
    return backend.of(values).csr_to_dense(crow.contiguous(), col.contiguous(), values.contiguous(), cols)


def _pack_fake(values: Tensor, bits: Tensor, cols: int, layout: str) -> Tensor:
    check_pack(values, bits, cols, layout, backend.of(values).LAYOUTS)
    return values.new_empty(_dynamic_size(), dtype=torch.uint8)


def _pack(values: Tensor, bits: Tensor, cols: int, layout: str) -> Tensor:
    kernels = backend.of(values)
    check_pack(values, bits, cols, layout, kernels.LAYOUTS)
    values, bits = values.contiguous(), bits.contiguous()
    offsets = _offsets(values, bits, cols)
    return kernels.pack(values, bits, offsets, cols, packing_code(layout, values.dtype))


def _unpack_fake(packed: Tensor, rows: int, cols: int, packing: int) -> tuple[Tensor, Tensor]:
    check_packed(packed)
    return (
        packed.new_empty(_dynamic_size(), dtype=dtype_of[packing]),
        packed.new_empty((rows, (cols + 7) // 8)),
    )


def _unpack(packed: Tensor, rows: int, cols: int, packing: int) -> tuple[Tensor, Tensor]:
    check_packed(packed)
    check(
        encoding_of(packing) == "plain",
        lambda: f"packed: must hold plain values, got {encoding_of(packing)}; use codes.unpack_codes",
    )
    return backend.of(packed).unpack(packed, rows, cols, packing)


define("dense_to_bitmap(Tensor dense) -> (Tensor, Tensor)", _bitmap, _bitmap_fake)
define("dense_to_nm(Tensor dense, int n, int m) -> (Tensor, Tensor)", _nm, _nm_fake)
define("bitmap_to_dense(Tensor values, Tensor bits, int cols) -> Tensor", _bitmap_dense, _bitmap_dense_fake)
define("dense_to_csr(Tensor dense) -> (Tensor, Tensor, Tensor)", _csr, _csr_fake)
define(
    "csr_to_dense(Tensor crow, Tensor col, Tensor values, int cols) -> Tensor", _csr_dense, _csr_dense_fake
)
define("pack(Tensor values, Tensor bits, int cols, str layout) -> Tensor", _pack, _pack_fake)
define("unpack(Tensor packed, int rows, int cols, int packing) -> (Tensor, Tensor)", _unpack, _unpack_fake)


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int
) -> Tensor:
    check_linear(x, packed, bias, rows, cols, packing)
    return x.new_empty((*x.shape[:-1], rows))


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int) -> Tensor:
    if x.is_cpu and backend.cpu is native:
        made = native.plain_linear(x, packed, bias, rows, cols, packing)
        if made is not None:
            return made
    check_linear(x, packed, bias, rows, cols, packing)
    kernels = backend.cpu if x.is_cpu else backend.cuda  # as backend.of does, which would be a call more
    return kernels.linear(x, packed, None if bias is None else bias.contiguous(), rows, cols, packing)


def _grad_input_fake(grad: Tensor, packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    check_grad(grad, packed, rows, cols, packing)
    return grad.new_empty((*grad.shape[:-1], cols))


def _grad_input(grad: Tensor, packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    """grad @ weight: the weight is expanded to dense for the time of this call."""
    check_grad(grad, packed, rows, cols, packing)
    if encoding_of(packing) == "plain":
        return grad @ backend.of(packed).dense(packed, rows, cols, packing)
    codes, mask, scales, minimums = unpack_codes(Packed(packed, rows, cols, packing))
    weight = dequantize(encoding_of(packing), codes, mask, scales, minimums, cols, group_of(packing))
    return grad @ weight.to(grad.dtype)


define(
    "linear(Tensor input, Tensor packed, Tensor? bias, int rows, int cols, int packing) -> Tensor",
    _linear,
    _linear_fake,
)
define(
    "linear_grad_input(Tensor grad, Tensor packed, int rows, int cols, int packing) -> Tensor",
    _grad_input,
    _grad_input_fake,
)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, *how = inputs
    ctx.save_for_backward(packed)
    ctx.how = how
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.sparseprune.linear_grad_input(grad, packed, *ctx.how)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        # A sum over no dimensions would be the sum over all.
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return grad_input, None, grad_bias, None, None, None


torch.library.register_autograd(
    "sparseprune::linear", _linear_backward, setup_context=_linear_setup, lib=library
)


def _lookup_fake(indices: Tensor, packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    check_lookup(indices, packed)
    return indices.new_empty((*indices.shape, cols), dtype=dtype_of[packing])


def _lookup(indices: Tensor, packed: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    check_lookup(indices, packed)
    return codes.lookup(Packed(packed, rows, cols, packing), indices)


define(
    "lookup(Tensor indices, Tensor packed, int rows, int cols, int packing) -> Tensor", _lookup, _lookup_fake
)


# --- the functions ----------------------------------------------------------------------------------------------------

_ops = torch.ops.sparseprune


def mask_apply(input: Tensor, mask: Tensor) -> Tensor:
    """`input` [any shape] where the bool `mask` (same shape) is True, +0.0 elsewhere, also where input is NaN."""
    return _ops.mask_apply(input, mask)


def mask_apply_(input: Tensor, mask: Tensor) -> None:
    """mask_apply, in place. `input` must be contiguous."""
    _ops.mask_apply_(input, mask)


def mask_apply_packed(input: Tensor, bits: Tensor) -> Tensor:
    """`input` [rows, cols] where the bitmask keeps it, +0.0 elsewhere."""
    return _ops.mask_apply_packed(input, bits)


def mask_apply_packed_(input: Tensor, bits: Tensor) -> None:
    """mask_apply_packed, in place. `input` must be contiguous."""
    _ops.mask_apply_packed_(input, bits)


def threshold_mask_(input: Tensor, threshold: float) -> Tensor:
    """Zero every |x| <= threshold of `input` [rows, cols] in place and return the bitmask of the rest. NaN is kept."""
    return _ops.threshold_mask_(input, threshold)


def pack_mask(mask: Tensor) -> Tensor:
    """The bitmask of a bool mask [rows, cols]."""
    return _ops.pack_mask(mask)


def unpack_mask(bits: Tensor, cols: int) -> Tensor:
    """The bool mask [rows, cols] of a bitmask."""
    return _ops.unpack_mask(bits, cols)


def dense_to_bitmap(dense: Tensor) -> tuple[Tensor, Tensor]:
    """(values [nnz], bits) of the non-zeros of `dense` [rows, cols], row-major."""
    return _ops.dense_to_bitmap(dense)


def dense_to_nm(dense: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values [rows * cols / m * n], bits) of a matrix with at most n non-zeros in every m columns of a row.

    A group with fewer keeps zeros at its lowest free columns, so that every group holds exactly n values.
    ValueError where a group holds more (the message says which), or m does not divide the columns.
    """
    return _ops.dense_to_nm(dense, n, m)


def bitmap_to_dense(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    """The matrix [rows, cols] of (values, bits), from dense_to_bitmap or dense_to_nm."""
    return _ops.bitmap_to_dense(values, bits, cols)


def dense_to_csr(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(crow int64 [rows + 1], col int32 [nnz], values [nnz]) of `dense` [rows, cols]; columns ascend in a row."""
    return _ops.dense_to_csr(dense)


def csr_to_dense(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    """The matrix [rows, cols] of a CSR triple. ValueError where crow or col is out of range or unsorted."""
    return _ops.csr_to_dense(crow, col, values, cols)


def pack(values: Tensor, bits: Tensor, cols: int, layout: str) -> Packed:
    """What the device's kernels read (docs/formats.md).

    layout: on the CPU "tile" (N:M, bitmap) or "csr", on a GPU "bitmap8" (any) or "sparse24" (exactly 2:4, 16-bit values).
    """
    blob = _ops.pack(values, bits, cols, layout)
    return Packed(blob, bits.shape[0], cols, packing_code(layout, values.dtype))


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """The (values, bits) that were packed."""
    return _ops.unpack(*packed)


def linear(input: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """input [..., cols] @ weight.T + bias [rows] -> [..., rows], float32 sums, for a packed weight [rows, cols].

    Gradients flow to input and bias; the weight is frozen, and the backward pass expands it to dense for one call.
    A pruned weight times NaN or Inf may count as 0 or as NaN.
    """
    blob, *how = packed
    return _ops.linear(input, blob, bias, *how)


def lookup(indices: Tensor, packed: Packed) -> Tensor:
    """weight[indices] -> [..., cols] in the weight's dtype, for a packed weight [rows, cols] in int8 or int4, dense.

    indices: [...], int64 or int32, on the weight's device. IndexError where one is not a row; on a GPU that row is NaN, for
    to raise would be to wait. The weight is frozen: no gradients.
    """
    return _ops.lookup(indices, *packed)
