"""How long to train, and how fast: a budget of steps or of minutes, and the learning rate along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Budget", "learning_rate_factor"]


@dataclass(frozen=True)
class Budget:
    """Steps or minutes, one of the two. Minutes are wall time, evaluations and checkpoints included."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"steps, minutes: one of the two must be given, got steps={self.steps}, minutes={self.minutes}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: must be at least 1, got {self.steps}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: must be above 0, got {self.minutes}")

    def progress(self, step: int, seconds: float) -> float:
        """How much is used up before step `step` (from 0), `seconds` after the start; 1 or more is the end."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.minutes:g} minutes"


def learning_rate_factor(progress: float, warmup: float, final: float) -> float:
    """Linear from near 0 to 1 over the first `warmup` of the budget, then a half cosine down to `final`."""
    if progress < warmup:
        return max(progress / warmup, 0.02)  # the first step, at progress 0, must not be for nothing
    along = min(1.0, (progress - warmup) / (1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))
