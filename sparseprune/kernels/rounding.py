"""`torch.ops.sparseprune.round_through`: a weight as what its codes stand for, with a gradient, for training.

The straight-through estimator (Bengio, Léonard, Courville 2013, arXiv 1308.3432), with scales that are trained, too (Esser
et al. 2020, "Learned Step Size Quantization"): with t = (w - m) / s + z and c = clamp(round(t)), the value is (c - z) s + m.
Where t is within the codes, dv/dw = 1 and dv/ds = c - t; where it is clamped, or s is 0, dv/dw = 0, dv/ds = c - z and
dv/dm = 1. A pruned weight is 0, and has no gradient.

On the CPU two passes over the weight, one forward and one backward; elsewhere the same in plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseprune.kernels import native
from sparseprune.kernels.checks import check, check_device, check_matrix
from sparseprune.kernels.ops import define, library
from sparseprune.kernels.packing import CODES, DTYPES

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
    it = _Rounded(weight.detach(), scales.detach(), minimums, kept, group_size, encoding).checked()
    if weight.is_cpu:
        return native.round_weight(*it, None)
    codes, _ = it.steps()
    return (codes if kept is None else codes.where(kept, CODES[encoding].zero)).to(torch.int8)


class _Rounded(NamedTuple):
    """What all of the operations are told."""

    weight: Tensor
    scales: Tensor
    minimums: Tensor | None
    kept: Tensor | None
    group_size: int
    encoding: str

    def checked(self, dtype: torch.dtype = torch.float32) -> _Rounded:
        """The same, contiguous.

        Raises:
            ValueError, TypeError: tensors that do not fit each other.
        """
        weight, kept, encoding = self.weight, self.kept, self.encoding
        check(encoding in CODES, lambda: f"encoding: must be one of {', '.join(CODES)}, got {encoding!r}")
        check(
            self.group_size in (32, 64, 128),
            lambda: f"group_size: must be 32, 64 or 128, got {self.group_size}",
        )
        check(dtype in DTYPES, lambda: f"dtype: must be float32, bfloat16 or float16, got {dtype}")
        check_matrix("weight", weight)
        check(
            weight.dtype == torch.float32,
            lambda: f"weight: dtype must be float32, got {weight.dtype}; cast it first",
        )
        check(
            (self.minimums is not None) == CODES[encoding].minimums,
            lambda: f"minimums: {encoding} {'needs' if CODES[encoding].minimums else 'has no'} minimums",
        )
        self._check_part("scales", self.scales)
        if self.minimums is not None:
            self._check_part("minimums", self.minimums)
        if kept is not None:
            check(
                kept.dtype == torch.bool and kept.shape == weight.shape,
                lambda: f"kept: must be bool {tuple(weight.shape)}, got {kept.dtype} {tuple(kept.shape)}",
            )
            check_device("weight", weight, kept=kept)
        return self._replace(
            weight=weight.contiguous(),
            scales=self.scales.contiguous(),
            minimums=None if self.minimums is None else self.minimums.contiguous(),
            kept=None if kept is None else kept.contiguous(),
        )

    def _check_part(self, name: str, part: Tensor) -> None:
        rows, cols = self.weight.shape
        groups = (rows, (cols + self.group_size - 1) // self.group_size)
        check(
            part.dtype == torch.float32 and tuple(part.shape) == groups,
            lambda: f"{name}: must be float32 {groups}, got {part.dtype} {tuple(part.shape)}",
        )
        check_device("weight", self.weight, **{name: part})

    def wide(self, part: Tensor) -> Tensor:
        """[rows, groups] to [rows, cols]."""
        return part.repeat_interleave(self.group_size, 1)[:, : self.weight.shape[1]]

    def sums(self, values: Tensor) -> Tensor:
        """[rows, cols] to [rows, groups]."""
        rows, columns = values.shape
        padded = torch.nn.functional.pad(values, (0, -columns % self.group_size))
        return padded.view(rows, self.scales.shape[1], self.group_size).sum(-1)

    def steps(self) -> tuple[Tensor, Tensor]:
        """(codes, t), float32 [rows, cols], in plain torch."""
        code, low = CODES[self.encoding], 0 if self.minimums is None else self.wide(self.minimums)
        inverse = self.wide(torch.where(self.scales == 0, 0.0, 1 / self.scales))
        steps = (self.weight - low) * inverse + code.zero
        return steps.clamp(code.least, code.largest).round(), steps


def _real(*given: Any) -> Tensor:
    dtype = given[-1]
    it = _Rounded(*given[:-1]).checked(dtype)
    if it.weight.is_cpu:
        return native.round_weight(*it, dtype)
    codes, _ = it.steps()
    value = (codes - CODES[it.encoding].zero) * it.wide(it.scales)
    if it.minimums is not None:
        value = value + it.wide(it.minimums)
    return (value if it.kept is None else torch.where(it.kept, value, 0)).to(dtype)


def _fake(*given: Any) -> Tensor:
    it = _Rounded(*given[:-1]).checked(given[-1])
    return it.weight.new_empty(it.weight.shape, dtype=given[-1])


def _gradients_real(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    it = _Rounded(*given).checked(gradient.dtype)
    check(
        gradient.shape == it.weight.shape,
        lambda: f"gradient: shape must be {tuple(it.weight.shape)}, got {tuple(gradient.shape)}",
    )
    out = _gradients_fake(gradient, *it)
    if it.weight.is_cpu:
        native.round_gradients(gradient.contiguous(), *it, out)
        return out
    codes, steps = it.steps()
    up = gradient.float() if it.kept is None else torch.where(it.kept, gradient.float(), 0)
    off = codes - steps
    inside = (off.abs() <= 0.5) & (it.wide(it.scales) != 0)
    of_scales = it.sums(up * torch.where(inside, off, codes - CODES[it.encoding].zero))
    of_minimums = out[2] if it.minimums is None else it.sums(torch.where(inside, 0, up))
    return torch.where(inside, up, 0), of_scales, of_minimums


def _gradients_fake(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(of the weight, of the scales, of the minimums: empty where there are none)"""
    it = _Rounded(*given)
    of_minimums = torch.empty_like(it.scales if it.minimums is not None else it.scales[:0])
    return torch.empty_like(it.weight), torch.empty_like(it.scales), of_minimums


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
