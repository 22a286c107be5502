"""The losses of a language model's logits, all in one pass over them.

A row of logits is a whole vocabulary wide: 1024 rows of SmolLM2 are 200 MB in float32, and plain autograd would
keep several such matrices. Here losses and gradient are computed together, a few rows at a time, and only the
gradient of the hidden states outlives them (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprune.models.losses import IGNORED
from sparseprune.recovery.terms.base import Head, LogitsTerm, Rows

__all__ = ["HeadLoss", "head_loss"]

# Rows of logits at a time. A product needs many to be fast (64 take twice the time of 256 on a core with AMX); the ten
# passes of a softmax, its loss and gradient need few, to find their data in the cache.
_PRODUCT_ROWS = 256
_SOFTMAX_ROWS = 8


@dataclass(frozen=True)
class HeadLoss:
    """`total`, the weighted sum, carries the gradient; `sums` float64 [terms] are each term's over the rows that count,
    neither weighted nor scaled, for the record.
    """

    total: Tensor
    sums: Tensor


def head_loss(
    states: Tensor,
    head: Head | None,
    labels: Tensor | None,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    terms: Sequence[LogitsTerm],
    compute_dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Sum over rows of the terms' losses of the logits z = head(states), each times its weight and scale.

    Args:
        states: [rows, in], what the head reads; the logits themselves where `head` is None. Gets a gradient, and
            so do the head's weight and bias where they require one.
        labels: int64 [rows], -100 where a row does not count. None: there are none, every row counts.
        teacher_states, teacher_head: the teacher's, of any floating dtype. None: no term needs them.
        compute_dtype: of the matrix products; None means that of `states`. Softmax and sums are float32, or
            float64 where `states` is.
    """
    weight, bias = (None, None) if head is None else head
    teacher = None if teacher_states is None else (teacher_states, teacher_head)
    dtype = states.dtype if compute_dtype is None else compute_dtype
    total, sums = _Head.apply(states, weight, bias, labels, teacher, tuple(terms), dtype)
    return HeadLoss(total, sums)


class _Head(torch.autograd.Function):
    """The gradient of the logits is written by the terms by hand, for each row that counts."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor | None,
        teacher: tuple[Tensor, Head | None] | None,
        terms: tuple[LogitsTerm, ...],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(states.dtype, torch.float32)
        inputs = states.to(dtype)
        matrix = None if weight is None else weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        grads = _Gradients(ctx.needs_input_grad, inputs, weight, bias, exact)
        sums = torch.zeros(len(terms), dtype=torch.float64, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for rows in _slices(len(states), _PRODUCT_ROWS):
                logits = _logits(inputs[rows], matrix, offset)
                taught = None if teacher is None else _teacher_logits(teacher, rows)
                grad = torch.empty_like(logits)
                for part in _slices(len(logits), _SOFTMAX_ROWS):
                    targets = None if labels is None else labels[rows][part]
                    its = None if taught is None else taught[part].to(exact)
                    grad[part], found = _row_losses(Rows(logits[part].to(exact), its, targets), terms)
                    sums += found
                grads.add(rows, grad, inputs[rows], matrix)
        ctx.grads = grads
        ctx.mark_non_differentiable(sums)
        factors = torch.tensor([it.weight * it.scale for it in terms], dtype=torch.float64)
        return (factors.to(sums.device) * sums).sum().to(exact), sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.grads.scaled(grad_outputs[0]), None, None, None, None)


class _Gradients:
    """Those of states, weight and bias, as far as they are needed."""

    def __init__(
        self,
        needed: tuple[bool, ...],
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        exact: torch.dtype,
    ) -> None:
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in (inputs, weight, bias)]
        self.states = torch.empty_like(inputs) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=exact) if weight is not None and needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needed[2] else None

    def add(self, rows: slice, grad: Tensor, inputs: Tensor, matrix: Tensor | None) -> None:
        """`grad` [rows, vocabulary] of the logits."""
        if self.bias is not None:
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)
        if self.states is not None and matrix is None:
            self.states[rows] = grad
        elif self.states is not None and matrix is not None:
            torch.mm(grad, matrix, out=self.states[rows])
        if self.weight is not None:
            self.weight += grad.t() @ inputs

    def scaled(self, scale: Tensor) -> Iterator[Tensor | None]:
        for grad, dtype in zip((self.states, self.weight, self.bias), self.dtypes, strict=True):
            yield None if grad is None else grad.mul_(scale).to(dtype)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


def _logits(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return states if weight is None else F.linear(states, weight, bias)


def _teacher_logits(teacher: tuple[Tensor, Head | None], rows: slice) -> Tensor:
    states, head = teacher
    if head is None:
        return states[rows]
    weight, bias = head
    return F.linear(states[rows].to(weight.dtype), weight, bias)


def _row_losses(rows: Rows, terms: Sequence[LogitsTerm]) -> tuple[Tensor, Tensor]:
    """(gradient of the logits [rows, vocabulary], the terms' sums over the rows that count, float64 [terms])."""
    found = [term.rows(rows) for term in terms]
    factors: dict[float, float] = {}
    for it in found:
        factors[it.temperature] = factors.get(it.temperature, 0.0) + it.softmax
    grad = None
    for temperature, factor in factors.items():
        if factor:
            part = rows.take_softmax(temperature).mul_(factor)
            grad = part if grad is None else grad.add_(part)
    if grad is None:
        grad = torch.zeros_like(rows.logits)
    for it in found:
        if it.add is not None:
            it.add(grad)
    losses = torch.stack([it.losses for it in found])
    if rows.labels is not None and (ignored := rows.labels == IGNORED).any():
        grad[ignored] = 0
        losses[:, ignored] = 0
    return grad, losses.sum(dim=1, dtype=torch.float64)
