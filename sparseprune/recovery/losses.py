"""Losses of a language model's head: cross-entropy and KL to a teacher, in one pass over the logits.

A row of logits is a whole vocabulary wide: 1024 rows of SmolLM2 are 200 MB in float32, and plain autograd would
keep several such matrices. Here loss and gradient are computed together, a few rows at a time, and only the
gradient of the hidden states outlives them (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprune.models.losses import IGNORED

__all__ = ["Head", "HeadLoss", "head_loss", "hidden_loss"]

Head = tuple[Tensor, Tensor | None]
"""Weight [vocabulary, in] and bias [vocabulary] of an output head."""

# Rows of logits at a time. A product needs many to be fast (64 take twice the time of 256 on a core with AMX); the ten
# passes of a softmax, its loss and gradient need few, to find their data in the cache.
_PRODUCT_ROWS = 256
_SOFTMAX_ROWS = 8


@dataclass(frozen=True)
class HeadLoss:
    """`total` carries the gradient; `cross_entropy` and `divergence` are sums over rows, for the record."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def head_loss(
    states: Tensor,
    head: Head | None,
    labels: Tensor | None,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    cross_entropy: float = 1.0,
    divergence: float = 1.0,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Sum over rows of `cross_entropy` x CE(z, label) + `divergence` x T^2 x KL(teacher || student).

    z = head(states) and the teacher's logits t are softened by the temperature T in the divergence alone:
    KL = sum_v p_v (log p_v - log q_v), p = softmax(t / T), q = softmax(z / T), over the full vocabulary. The
    factor T^2 keeps the gradient's size as T grows (Hinton et al., arXiv 1503.02531).

    Args:
        states: [rows, in], what the head reads; the logits themselves where `head` is None. Gets a gradient, and
            so do the head's weight and bias where they require one.
        labels: int64 [rows], -100 where a row does not count. None: there are none, every row counts for the
            divergence.
        teacher_states, teacher_head: the teacher's, of any floating dtype. None: no divergence.
        compute_dtype: of the matrix products; None means that of `states`. Softmax and sums are float32, or
            float64 where `states` is.
    """
    if labels is None and teacher_states is None:
        raise ValueError("labels: must be given where there is no teacher, got neither")
    weight, bias = (None, None) if head is None else head
    factors = (
        0.0 if labels is None else cross_entropy,
        0.0 if teacher_states is None else divergence,
        temperature,
    )
    teacher = None if teacher_states is None else (teacher_states, teacher_head)
    dtype = states.dtype if compute_dtype is None else compute_dtype
    total, ce, kl = _Head.apply(states, weight, bias, labels, teacher, factors, dtype)
    return HeadLoss(total, ce, kl)


class _Head(torch.autograd.Function):
    """The gradient is hand-written: dz = ce (softmax(z) - onehot) + kl T (q - p), for each row that counts."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor | None,
        teacher: tuple[Tensor, Head | None] | None,
        factors: tuple[float, float, float],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(states.dtype, torch.float32)
        inputs = states.to(dtype)
        matrix = None if weight is None else weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        grads = _Gradients(ctx.needs_input_grad, inputs, weight, bias, exact)
        sums = torch.zeros(2, dtype=torch.float64, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for rows in _slices(len(states), _PRODUCT_ROWS):
                logits = _logits(inputs[rows], matrix, offset)
                taught = None if teacher is None else _teacher_logits(teacher, rows)
                grad = torch.empty_like(logits)
                for part in _slices(len(logits), _SOFTMAX_ROWS):
                    targets = None if labels is None else labels[rows][part]
                    its = None if taught is None else taught[part].to(exact, copy=True)
                    result = _row_losses(logits[part].to(exact, copy=True), targets, its, factors)
                    if targets is not None and (ignored := targets == IGNORED).any():
                        for it in result:
                            it[ignored] = 0
                    grad[part], ce, kl = result
                    sums += torch.stack([ce.sum(dtype=torch.float64), kl.sum(dtype=torch.float64)])
                grads.add(rows, grad, inputs[rows], matrix)
        ctx.grads = grads
        ce_sum, kl_sum = sums.unbind()
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        total = factors[0] * ce_sum + factors[1] * factors[2] ** 2 * kl_sum
        return total.to(exact), ce_sum, kl_sum

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


def _row_losses(
    logits: Tensor, labels: Tensor | None, teacher: Tensor | None, factors: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the logits [rows, vocabulary], cross-entropy [rows], divergence [rows]).

    Overwrites `logits` and `teacher`. Rows whose label does not count hold anything.
    """
    ce_factor, kl_factor, temperature = factors
    log_q = torch.log_softmax(logits, dim=1)
    ce = kl = log_q.new_zeros(len(logits))
    targets = None if labels is None else labels.clamp(min=0).unsqueeze(1)
    if targets is not None:
        ce = -log_q.gather(1, targets).squeeze(1)
    if teacher is None:
        grad = log_q.exp_().mul_(ce_factor)
    elif temperature == 1.0:  # one softmax of the student serves both losses
        kl, p = _divergence(torch.log_softmax(teacher, dim=1), log_q)
        grad = log_q.exp_().mul_(ce_factor + kl_factor).sub_(p, alpha=kl_factor)
    else:
        soft = torch.log_softmax(logits.div_(temperature), dim=1)
        kl, p = _divergence(torch.log_softmax(teacher.div_(temperature), dim=1), soft)
        grad = soft.exp_().sub_(p).mul_(kl_factor * temperature)
        if ce_factor:
            grad.add_(log_q.exp_(), alpha=ce_factor)
    if targets is not None and ce_factor:
        grad.scatter_add_(1, targets, grad.new_full(targets.shape, -ce_factor))
    return grad, ce, kl


def _divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q) [rows], p); overwrites `log_p`."""
    p = log_p.exp()
    return torch.linalg.vecdot(p, log_p.sub_(log_q), dim=1), p


def hidden_loss(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum over tokens of |s - t|^2 / |t|^2, for hidden states [..., hidden].

    Each token is normalised on its own: a model's first tokens have states hundreds of times larger than the rest
    and would be all that a common scale sees (arXiv 2402.17762).

    Args:
        counts: bool [...], the tokens to sum over; None means all.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(exact)
    error = (student.to(exact) - target).square().sum(dim=-1)
    error = error / target.square().sum(dim=-1).clamp(min=torch.finfo(exact).tiny)
    return error.sum() if counts is None else error.masked_fill(~counts, 0).sum()
