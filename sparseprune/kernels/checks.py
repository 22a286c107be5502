"""What an operation's arguments must be: checked once, by the real path and by the fake (shape-only) one.

An error names the argument, the rule, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from sparseprune.kernels.packing import DTYPES, dtype_of


def check(ok: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(message())


def check_device(first: str, x: Tensor, **others: Tensor) -> None:
    """All on the device of x, the argument called `first`: a kernel would read the others' addresses as its own."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(
                f"{name}: must lie on {first}'s device {x.device}, got {other.device}; move it with .to(device)"
            )


def check_values(name: str, x: Tensor) -> None:
    check(
        x.dtype in DTYPES,
        lambda: f"{name}: must be float32, bfloat16 or float16, got {x.dtype}; convert it with .to(dtype)",
        TypeError,
    )
    check(x.layout == torch.strided, lambda: f"{name}: must be a strided tensor, got layout {x.layout}")


def check_matrix(name: str, x: Tensor) -> None:
    check_values(name, x)
    check(x.dim() == 2, lambda: f"{name}: must be a matrix [rows, cols], got shape {tuple(x.shape)}")


def check_bits(bits: Tensor, rows: int | None, cols: int) -> None:
    check(cols >= 0, lambda: f"cols: must not be negative, got {cols}")
    check(bits.dtype == torch.uint8, lambda: f"bits: must be uint8, got {bits.dtype}", TypeError)
    check(
        bits.dim() == 2 and bits.shape[1] == (cols + 7) // 8 and (rows is None or bits.shape[0] == rows),
        lambda: (
            f"bits: must have shape [{'rows' if rows is None else rows}, {(cols + 7) // 8}] for {cols} columns, "
            f"got {tuple(bits.shape)}; make it with pack_mask"
        ),
    )


def check_vector(name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    check(x.dim() == 1, lambda: f"{name}: must have one dimension, got shape {tuple(x.shape)}")
    if dtype is not None:
        check(x.dtype == dtype, lambda: f"{name}: must be {dtype}, got {x.dtype}", TypeError)


def check_in_place(name: str, x: Tensor) -> None:
    # A copy of a non-contiguous tensor would take the result away from the caller.
    check(
        x.is_contiguous(),
        lambda: (
            f"{name}: must be contiguous to be changed in place, got strides {x.stride()}; "
            "use the out-of-place operation"
        ),
    )


def check_mask(x: Tensor, mask: Tensor) -> None:
    check_values("input", x)
    check(mask.dtype == torch.bool, lambda: f"mask: must be bool, got {mask.dtype}", TypeError)
    check(
        mask.shape == x.shape,
        lambda: f"mask: must have the input's shape {tuple(x.shape)}, got {tuple(mask.shape)}",
    )
    check_device("input", x, mask=mask)


def check_nm(dense: Tensor, n: int, m: int) -> None:
    check_matrix("dense", dense)
    check(
        1 <= n <= m <= 32, lambda: f"n, m: must satisfy 1 <= n <= m <= 32, got {n}:{m}; use the bitmap format"
    )
    check(
        dense.shape[1] % m == 0,
        lambda: (
            f"dense: columns must be a multiple of {m} for {n}:{m}, got {dense.shape[1]}; "
            "pad them or use the bitmap format"
        ),
    )


def check_canonical(values: Tensor, bits: Tensor, cols: int) -> None:
    check_values("values", values)
    check_vector("values", values)
    check_bits(bits, None, cols)
    check_device("values", values, bits=bits)


def check_pack(values: Tensor, bits: Tensor, cols: int, layout: str, layouts: Sequence[str]) -> None:
    check_canonical(values, bits, cols)
    check(
        layout in layouts,
        lambda: f"layout: must be one of {list(layouts)} on {values.device}, got {layout!r}",
    )
    if layout == "sparse24":
        check(
            values.dtype.itemsize == 2,
            lambda: (
                f"values: must be bfloat16 or float16 for the layout 'sparse24', got {values.dtype}; use 'bitmap8'"
            ),
            TypeError,
        )
        check(
            cols % 4 == 0,
            lambda: f"cols: must be a multiple of 4 for the layout 'sparse24', got {cols}; use 'bitmap8'",
        )


def check_packed(packed: Tensor) -> None:
    check_vector("packed", packed, torch.uint8)
    check(packed.is_contiguous(), lambda: "packed: must be contiguous, as ops.pack makes it")


def check_linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int) -> None:
    # Plain ifs, and is_cpu before any device: this runs for every layer and token, and says yes in half a microsecond.
    if x.layout != torch.strided or x.dtype is not dtype_of[packing] or x.dim() < 1 or x.shape[-1] != cols:
        refuse_input("input", x, "in_features", cols, packing)
    if bias is not None:
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: must have the input's dtype {x.dtype}, got {bias.dtype}")
        if bias.dim() != 1 or bias.shape[0] != rows:
            raise ValueError(f"bias: must have shape [{rows}], got {tuple(bias.shape)}")
    if not (x.is_cpu and packed.is_cpu and (bias is None or bias.is_cpu)):
        check_device("input", x, packed=packed, **({} if bias is None else {"bias": bias}))
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        check_packed(packed)


def check_lookup(indices: Tensor, packed: Tensor) -> None:
    check(
        indices.dtype in (torch.int64, torch.int32) and indices.layout == torch.strided,
        lambda: (
            f"indices: must be a strided tensor of int64 or int32, got {indices.dtype}, layout {indices.layout}; "
            "cast them with .long()"
        ),
        TypeError,
    )
    check_packed(packed)
    check_device("indices", indices, packed=packed)


def check_grad(grad: Tensor, packed: Tensor, rows: int, cols: int, packing: int) -> None:
    if (
        grad.layout != torch.strided
        or grad.dtype is not dtype_of[packing]
        or grad.dim() < 1
        or grad.shape[-1] != rows
    ):
        refuse_input("grad", grad, "out_features", rows, packing)
    check_packed(packed)
    check_device("grad", grad, packed=packed)


def refuse_input(name: str, x: Tensor, side: str, width: int, packing: int) -> NoReturn:
    """Says what keeps x [..., side] from being multiplied with a weight packed like that, whose side is `width` long."""
    if x.layout != torch.strided:
        raise TypeError(f"{name}: must be a strided tensor, got layout {x.layout}; call .to_dense() on it")
    if x.dim() < 1:
        raise ValueError(f"{name}: must have at least one dimension [..., {side}], got a scalar")
    if x.shape[-1] != width:
        raise ValueError(
            f"{name}: must have {width} columns [..., {side}], got shape {tuple(x.shape)}; "
            "check the layer before this one"
        )
    raise TypeError(
        f"{name}: dtype must be the weight's {dtype_of[packing]}, got {x.dtype}; cast the {name}, or the layer with "
        ".to(dtype); autocast does not reach sparse layers"
    )
