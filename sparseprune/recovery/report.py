"""What a recovery did: its curves, its time, and the zeros before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparseprune.report import Column, Table

__all__ = ["Evaluation", "RecoveryReport", "StepLosses"]

_ROWS = 16  # of the printed curve; `losses` has every step


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
class RecoveryReport:
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
            Column("steps"),
            Column("seconds", ".0f"),
            Column("loss", ".4f"),
            *(Column(title, ".4f") for title in self.titles.values()),
            Column("learning rate", ".2e"),
            Column("evaluation", ".4g"),
        ]
        evaluations = {it.step: it.value for it in self.evaluations}
        rows = []
        size = max(1, -(-len(self.losses) // _ROWS))
        if 0 in evaluations:
            rows.append((0, 0.0, None, *(None for _ in self.titles), None, evaluations[0]))
        for start in range(0, len(self.losses), size):
            part = self.losses[start : start + size]
            last = part[-1]
            values = [evaluations[it.step] for it in part if it.step in evaluations]
            rows.append(
                (
                    last.step,
                    last.seconds,
                    sum(it.total for it in part) / len(part),
                    *(sum(it.terms[name] for it in part) / len(part) for name in self.titles),
                    last.learning_rate,
                    values[-1] if values else None,
                )
            )
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        footer = [
            f"each row: means over the {size} steps before it" if size > 1 else "each row: one step",
            f"total: {self.steps} steps, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({self.tokens_per_second:.0f} a second)",
            f"zeros: {self.zeros_before:,} before, {self.zeros_after:,} after, of {self.weights:,} weights in "
            "the layers that have any",
            f"settings: {settings}",
        ]
        return Table("Recovery", columns, rows, footer)

    def to_dict(self) -> dict[str, Any]:
        totals = {"steps": self.steps, "tokens_per_second": self.tokens_per_second}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        return self.table().render()
