"""Gradual pruning: a little more at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from sparseprune import clock
from sparseprune.models.losses import Evaluate
from sparseprune.options import require_at_least
from sparseprune.pruning.schedules.base import (
    Recover,
    ScheduleReport,
    Step,
    check_target,
    measure,
)
from sparseprune.pruning.zeros import Zeros
from sparseprune.report import track

__all__ = ["Gradual"]


@dataclass(frozen=True)
class Gradual:
    """Sparsity grows with the cube of time: fast while much is left to spare, slowly at the end.

    s_t = s + (s_0 - s) (1 - t / n)^power for t = 1 ... n (Zhu and Gupta 2017, "To Prune, or Not to Prune").

    Attributes:
        steps: n, prunings, each followed by recovery.
        initial: s_0, before the first step.
    """

    steps: int = 10
    _: KW_ONLY
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps)
        if not 0 <= self.initial < 1:
            raise ValueError(
                f"initial: must be in [0, 1), got {self.initial!r}; it is the sparsity to start from"
            )
        if not 0 < self.power < math.inf:
            raise ValueError(f"power: must be above 0, got {self.power!r}; the paper's is 3")

    def sparsities(self, target: float) -> list[float]:
        """s_1 ... s_n; the last is `target` exactly."""
        check_target(target)
        if self.initial > target:
            raise ValueError(f"initial: must be at most the target {target}, got {self.initial}")
        rest = [(1 - step / self.steps) ** self.power for step in range(1, self.steps)]
        return [target + (self.initial - target) * it for it in rest] + [target]

    def run(
        self,
        model: nn.Module,
        prune_to: Callable[[float], Any],
        target: float,
        *,
        recover: Recover | None = None,
        evaluate: Evaluate | None = None,
        progress: bool = False,
    ) -> ScheduleReport:
        """Prunes `model` in place. An error in a callable passes through, with the model as the last step left it."""
        sparsities = self.sparsities(target)
        before = measure(evaluate, model)
        zeros = Zeros(model)
        steps = []
        for number, sparsity in enumerate(track(sparsities, "pruning gradually", enabled=progress), 1):
            start = clock.now()
            with zeros.growing():
                prune_to(sparsity)
            pruned = loss = measure(evaluate, model)
            if recover is not None:
                with zeros.held():
                    recover(model)
                loss = measure(evaluate, model)
            steps.append(Step(number, "all", zeros.fraction(), pruned, loss, 1, clock.now() - start))
        return ScheduleReport(
            f"Pruned gradually in {self.steps} steps", target, before, tuple(steps), "target reached"
        )
