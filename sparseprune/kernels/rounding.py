"""`torch.ops.sparseprune.round_through`: a weight as what its codes stand for, with a gradient, for training.

The straight-through estimator (Bengio, Léonard, Courville 2013, arXiv 1308.3432), with scales that are trained, too (Esser
et al. 2020, "Learned Step Size Quantization"): with t = (w - m) / s + z and c = clamp(round(t)), the value is (c - z) s + m.
Where t is within the codes, dv/dw = 1 and dv/ds = c - t; where it is clamped, or s is 0, dv/dw = 0, dv/ds = c - z and
dv/dm = 1. A pruned weight is 0, and has no gradient.

On the CPU two passes over the weight, one forward and one backward; elsewhere the same in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseprune.kernels import _core
from sparseprune.kernels.checks import check, check_device, check_matrix
from sparseprune.kernels.codes import CODES
from sparseprune.kernels.ops import define, library
from sparseprune.kernels.packing import DTYPES

__all__ = ["round_codes", "round_through"]


def round_through(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
    dtype: torch.dtype,
) -> Tensor:
    """What `weight`, float32 [rows, cols], rounds to, [rows, cols] in `dtype` (float32, bfloat16, float16).

    Args:
        scales, minimums: float32 [rows, ceil(cols / group_size)]; minimums only for int4_minimum. They have gradients, too.
        kept: bool [rows, cols], False where a weight is pruned; None: all are kept.
        encoding: "int8", "int4" or "int4_minimum".
    """
    return torch.ops.sparseprune.round_through(  # type: ignore[no-any-return]
        weight, scales, minimums, kept, group_size, encoding, dtype
    )


def round_codes(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
) -> Tensor:
    """The codes, int8 [rows, cols], whose values `round_through` gives; a pruned weight has the code of 0."""
    weight, scales = weight.detach().contiguous(), scales.detach().contiguous()
    minimums = None if minimums is None else minimums.detach().contiguous()
    _check(weight, scales, minimums, kept, group_size, encoding, torch.float32)
    if weight.is_cpu:
        out = torch.empty(weight.shape, dtype=torch.int8)
        _core.round_weight(*_call(weight, scales, minimums, kept, group_size, encoding, -1, out.data_ptr()))
        return out
    codes, _ = _steps(weight, scales, minimums, group_size, encoding)
    return (
        codes.where(kept, CODES[encoding].zero).to(torch.int8) if kept is not None else codes.to(torch.int8)
    )


def _check(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
    dtype: torch.dtype,
) -> None:
    check(encoding in CODES, lambda: f"encoding: must be one of {', '.join(CODES)}, got {encoding!r}")
    check(group_size in (32, 64, 128), lambda: f"group_size: must be 32, 64 or 128, got {group_size}")
    check(dtype in DTYPES, lambda: f"dtype: must be float32, bfloat16 or float16, got {dtype}")
    check_matrix("weight", weight)
    check(
        weight.dtype == torch.float32,
        lambda: f"weight: dtype must be float32, got {weight.dtype}; cast it first",
    )
    groups = (weight.shape[0], (weight.shape[1] + group_size - 1) // group_size)
    check(
        (minimums is not None) == CODES[encoding].minimums,
        lambda: f"minimums: {encoding} {'needs' if CODES[encoding].minimums else 'has no'} minimums",
    )
    _check_part("scales", scales, weight, groups)
    if minimums is not None:
        _check_part("minimums", minimums, weight, groups)
    if kept is not None:
        check(
            kept.dtype == torch.bool and kept.shape == weight.shape,
            lambda: f"kept: must be bool {tuple(weight.shape)}, got {kept.dtype} {tuple(kept.shape)}",
        )
        check_device("weight", weight, kept=kept)


def _check_part(name: str, part: Tensor, weight: Tensor, groups: tuple[int, int]) -> None:
    check(
        part.dtype == torch.float32 and tuple(part.shape) == groups,
        lambda: f"{name}: must be float32 {groups}, got {part.dtype} {tuple(part.shape)}",
    )
    check_device("weight", weight, **{name: part})


def _call(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group: int,
    encoding: str,
    dtype: int,
    *rest: int,
) -> tuple[Any, ...]:
    """A kernel's arguments; every tensor is contiguous and on the CPU."""
    code = CODES[encoding]
    return (
        weight.data_ptr(),
        *weight.shape,
        group,
        scales.data_ptr(),
        0 if minimums is None else minimums.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        code.zero,
        code.least,
        code.largest,
        dtype,
        *rest,
        torch.get_num_threads(),
    )


def _steps(
    weight: Tensor, scales: Tensor, minimums: Tensor | None, group: int, encoding: str
) -> tuple[Tensor, Tensor]:
    """(codes, t), float32 [rows, cols], in plain torch."""
    code, columns = CODES[encoding], weight.shape[1]
    inverse = _wide(torch.where(scales == 0, 0.0, 1 / scales), group, columns)
    steps = (weight if minimums is None else weight - _wide(minimums, group, columns)) * inverse + code.zero
    return steps.clamp(code.least, code.largest).round(), steps


def _wide(part: Tensor, group: int, columns: int) -> Tensor:
    return part.repeat_interleave(group, 1)[:, :columns]


def _real(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
    dtype: torch.dtype,
) -> Tensor:
    _check(weight, scales, minimums, kept, group_size, encoding, dtype)
    weight, scales, minimums, kept = _contiguous(weight, scales, minimums, kept)
    if weight.is_cpu:
        out = torch.empty(weight.shape, dtype=dtype)
        number = DTYPES[dtype]
        _core.round_weight(
            *_call(weight, scales, minimums, kept, group_size, encoding, number, out.data_ptr())
        )
        return out
    codes, _ = _steps(weight, scales, minimums, group_size, encoding)
    value = (codes - CODES[encoding].zero) * _wide(scales, group_size, weight.shape[1])
    if minimums is not None:
        value = value + _wide(minimums, group_size, weight.shape[1])
    return (value if kept is None else torch.where(kept, value, 0)).to(dtype)


def _fake(
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
    dtype: torch.dtype,
) -> Tensor:
    _check(weight, scales, minimums, kept, group_size, encoding, dtype)
    return weight.new_empty(weight.shape, dtype=dtype)


def _gradients_real(
    gradient: Tensor,
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(weight, scales, minimums, kept, group_size, encoding, gradient.dtype)
    check(
        gradient.shape == weight.shape,
        lambda: f"gradient: shape must be {tuple(weight.shape)}, got {tuple(gradient.shape)}",
    )
    weight, scales, minimums, kept = _contiguous(weight, scales, minimums, kept)
    gradient = gradient.contiguous()
    of_weight, of_scales = torch.empty_like(weight), torch.zeros_like(scales)
    of_minimums = torch.zeros_like(scales if minimums is not None else scales[:0])
    if weight.is_cpu:
        places = (it.data_ptr() for it in (gradient, of_weight, of_scales))
        last = 0 if minimums is None else of_minimums.data_ptr()
        number = DTYPES[gradient.dtype]
        _core.round_gradients(
            *_call(weight, scales, minimums, kept, group_size, encoding, number, *places, last)
        )
        return of_weight, of_scales, of_minimums
    codes, steps = _steps(weight, scales, minimums, group_size, encoding)
    up = gradient.float() if kept is None else torch.where(kept, gradient.float(), 0)
    off = codes - steps
    inside = (off.abs() <= 0.5) & (_wide(scales, group_size, weight.shape[1]) != 0)
    of_scales = _sums(up * torch.where(inside, off, codes - CODES[encoding].zero), group_size)
    if minimums is not None:
        of_minimums = _sums(torch.where(inside, 0, up), group_size)
    return torch.where(inside, up, 0), of_scales, of_minimums


def _gradients_fake(
    gradient: Tensor,
    weight: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    kept: Tensor | None,
    group_size: int,
    encoding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_minimums = torch.empty_like(scales if minimums is not None else scales[:0])
    return torch.empty_like(weight), torch.empty_like(scales), of_minimums


def _sums(values: Tensor, group: int) -> Tensor:
    rows, columns = values.shape
    return torch.nn.functional.pad(values, (0, -columns % group)).view(rows, -1, group).sum(-1)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if it is None else it.contiguous() for it in tensors]


define(
    "round_through(Tensor weight, Tensor scales, Tensor? minimums, Tensor? kept, int group_size, str encoding, "
    "ScalarType dtype) -> Tensor",
    _real,
    _fake,
)
define(
    "round_through_gradients(Tensor gradient, Tensor weight, Tensor scales, Tensor? minimums, Tensor? kept, int group_size, "
    "str encoding) -> (Tensor, Tensor, Tensor)",
    _gradients_real,
    _gradients_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scales, minimums, kept, ctx.group_size, ctx.encoding, _ = inputs
    ctx.save_for_backward(weight, scales, minimums, kept)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = torch.ops.sparseprune.round_through_gradients(
        gradient, *ctx.saved_tensors, ctx.group_size, ctx.encoding
    )
    of_weight, of_scales, of_minimums = found
    minimums = ctx.saved_tensors[2]
    return of_weight, of_scales, None if minimums is None else of_minimums, None, None, None, None


torch.library.register_autograd("sparseprune::round_through", _backward, setup_context=_setup, lib=library)
