"""What schedules share: the steps they report, checks, measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparseprune.models.losses import Evaluate, judged
from sparseprune.report import Column, Report, Table

__all__ = [
    "Recover",
    "ScheduleReport",
    "Step",
    "check_target",
    "measure",
]

Recover = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Step:
    """One step: what was pruned, and to what; losses where the schedule was given `evaluate`.

    `sparsity` is the fraction of zeros after it, in what the schedule prunes. `loss_pruned` is measured before the
    recovery, `loss` at the end.
    """

    number: int
    pruned: str
    sparsity: float
    loss_pruned: float | None
    loss: float | None
    trials: int
    seconds: float


COLUMNS = (
    Column("step", value=lambda it: it.number),
    Column("pruned", value=lambda it: it.pruned),
    Column("zeros", ".1%", lambda it: it.sparsity),
    Column("loss, pruned", ".4f", lambda it: it.loss_pruned),
    Column("loss, recovered", ".4f", lambda it: it.loss),
    Column("trials", value=lambda it: it.trials),
    Column("seconds", ".1f", lambda it: it.seconds),
)


@dataclass(frozen=True)
class ScheduleReport(Report):
    """What a schedule did, step by step; `stopped` says why it ended."""

    schedule: str
    target: float
    loss_before: float | None
    steps: tuple[Step, ...]
    stopped: str

    @property
    def sparsity(self) -> float:
        return self.steps[-1].sparsity if self.steps else 0.0

    def table(self) -> Table:
        footer = [f"stopped: {self.stopped}"]
        if self.loss_before is not None:
            footer.append(f"loss before: {self.loss_before:.4f}")
        return Table.of(f"{self.schedule} to {self.target:.1%}", COLUMNS, self.steps, footer)


def check_target(target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < 1:
        raise ValueError(f"target: must be in (0, 1), got {target!r}; pass the fraction of weights to remove")


def measure(evaluate: Evaluate | None, model: nn.Module) -> float | None:
    return None if evaluate is None else judged(evaluate, model)
