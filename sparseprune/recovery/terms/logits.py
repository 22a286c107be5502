"""KL of the teacher's distribution to the student's, over the full vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparseprune.recovery.terms.base import LogitsTerm, RowLosses, Rows

__all__ = ["Divergence"]


@dataclass(frozen=True)
class Divergence(LogitsTerm):
    """KL = sum_v p_v (log p_v - log q_v), p = softmax(teacher / T), q = softmax(student / T), T the temperature.

    It counts T^2 times, which keeps the gradient's size as T grows (Hinton et al., arXiv 1503.02531).
    """

    temperature: float = 1.0

    title: ClassVar[str] = "KL"

    @property
    def scale(self) -> float:
        return self.temperature**2

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        mine, its = (getattr(getattr(it, "config", None), "vocab_size", None) for it in (student, teacher))
        if mine != its:
            raise ValueError(
                f"teacher: must have the model's vocabulary of {mine}, it has {its}; pass logits=0 and a loss on "
                "hidden states, or another teacher"
            )

    def rows(self, rows: Rows) -> RowLosses:
        assert rows.teacher is not None
        factor = self.weight * self.temperature
        softened = rows.teacher if self.temperature == 1.0 else rows.teacher / self.temperature
        log_p = torch.log_softmax(softened, dim=1)
        p = log_p.exp()
        losses = torch.linalg.vecdot(p, log_p.sub_(rows.log_softmax(self.temperature)), dim=1)

        def subtract_teacher(grad: Tensor) -> None:
            grad.sub_(p, alpha=factor)

        return RowLosses(losses, factor, self.temperature, subtract_teacher)
