"""What a recovery did: its curves, its time, and the zeros before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparseprune.report import Column, Report, Table

__all__ = ["Evaluation", "RecoveryReport", "StepLosses"]

_ROWS = 16  # in the printed curve; `losses` has every step


@dataclass(frozen=True)
class StepLosses:
    """One step's losses, means over its tokens, and the learning rate it used.

    Attributes:
        total: what was minimised.
        terms: each term of it by the name of its weight in `Distillation`, not weighted; 0 where it was left out.
    """

    step: int
    seconds: float
    total: float
    terms: dict[str, float]
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate(model)` returned after `step` steps."""

    step: int
    seconds: float
    value: float


@dataclass(frozen=True)
class RecoveryReport(Report):
    """What `recover` did; `print(report)` shows the loss curve as a table.

    Attributes:
        losses: of every step.
        weights, zeros_before, zeros_after: of the layers that have zeros.
        titles: what the table calls each term of the loss, by the name of its weight.
        resumed_at: the steps that an earlier run had made.
    """

    losses: tuple[StepLosses, ...]
    evaluations: tuple[Evaluation, ...]
    seconds: float
    tokens: int
    weights: int
    zeros_before: int
    zeros_after: int
    settings: dict[str, Any]
    titles: dict[str, str]
    resumed_at: int | None = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def table(self) -> Table:
        columns = [
            Column("steps", value=lambda it: it.step),
            Column("seconds", ".0f", lambda it: it.seconds),
            Column("loss", ".4f", lambda it: it.mean(lambda step: step.total)),
            *(_term_column(name, title) for name, title in self.titles.items()),
            Column("learning rate", ".2e", lambda it: it.learning_rate),
            Column("evaluation", ".4g", lambda it: it.evaluation),
        ]
        evaluations = {it.step: it.value for it in self.evaluations}
        size = max(1, -(-len(self.losses) // _ROWS))
        parts = [_Part((), evaluations[0])] if 0 in evaluations else []
        for start in range(0, len(self.losses), size):
            steps = self.losses[start : start + size]
            values = [evaluations[it.step] for it in steps if it.step in evaluations]
            parts.append(_Part(steps, values[-1] if values else None))
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        footer = [
            f"each row: means over the {size} steps before it" if size > 1 else "each row: one step",
            f"total: {self.steps} steps, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({self.tokens_per_second:.0f} a second)",
            f"zeros: {self.zeros_before:,} before, {self.zeros_after:,} after, of {self.weights:,} weights in "
            "the layers that have any",
            f"settings: {settings}",
        ]
        return Table.of("Recovery", columns, parts, footer)


@dataclass(frozen=True)
class _Part:
    """The steps that a row is about, none before the first; `evaluation` is the last one made in them."""

    losses: tuple[StepLosses, ...]
    evaluation: float | None

    @property
    def step(self) -> int:
        return self.losses[-1].step if self.losses else 0

    @property
    def seconds(self) -> float:
        return self.losses[-1].seconds if self.losses else 0.0

    @property
    def learning_rate(self) -> float | None:
        return self.losses[-1].learning_rate if self.losses else None

    def mean(self, value: Callable[[StepLosses], float]) -> float | None:
        return sum(map(value, self.losses)) / len(self.losses) if self.losses else None


def _term_column(name: str, title: str) -> Column:
    return Column(title, ".4f", lambda it: it.mean(lambda step: step.terms[name]))
