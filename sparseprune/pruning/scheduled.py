"""`prune()` in several steps: a schedule calls it again and again, with recovery between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparseprune import clock
from sparseprune.models.losses import Evaluate
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.patterns import Pattern
from sparseprune.pruning.report import LayerPruned, PruneReport
from sparseprune.pruning.schedules import Gradual, Greedy
from sparseprune.pruning.schedules.base import Recover

__all__ = ["SCHEDULES", "find_schedule", "prune_scheduled"]

SCHEDULES = {"gradual": Gradual, "greedy": Greedy}


def find_schedule(schedule: str | Gradual | Greedy) -> Gradual | Greedy | None:
    """The schedule of that name with its defaults, one given as such, or None for "one-shot"."""
    if isinstance(schedule, (Gradual, Greedy)):
        return schedule
    if schedule == "one-shot":
        return None
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule: must be one of one-shot, {', '.join(SCHEDULES)}, or a schedule with options, "
            f"got {schedule!r}"
        )
    return SCHEDULES[schedule]()


def prune_scheduled(
    schedule: Gradual | Greedy,
    model: nn.Module,
    layers: Sequence[WeightSite],
    pattern: Pattern,
    sparsity: float,
    once: Callable[..., Any],
    recover: Recover | None,
    evaluate: Evaluate | None,
    progress: bool,
) -> PruneReport:
    """Runs the schedule over `once(sparsity=..., include=...)`; its report is that of the last step, with the
    schedule's steps and the zeros before the first and after the last.

    Raises:
        ValueError: a pattern that has only one sparsity, or a greedy schedule without `evaluate`.
    """
    if pattern.structured:
        raise ValueError(
            f"schedule: pattern {pattern} has one sparsity, so there are no steps to it; pass "
            'pattern="unstructured", or leave the schedule out'
        )
    before = [layer.count_zeros() for layer in layers]
    last: list[PruneReport] = []

    def prune_to(to: float, include: Sequence[str] | None = None) -> None:
        last[:] = [once(sparsity=to) if include is None else once(sparsity=to, include=include)]

    begin = clock.now()
    if isinstance(schedule, Gradual):
        steps = schedule.run(model, prune_to, sparsity, recover, evaluate, progress)
    elif evaluate is None:
        raise ValueError(
            "evaluate: a greedy schedule needs it, got None; pass a function from the model to its loss"
        )
    else:
        steps = schedule.run(model, prune_to, sparsity, evaluate, recover, progress)
    rows = [LayerPruned.of(layer, zeros) for layer, zeros in zip(layers, before, strict=True)]
    return dataclasses.replace(
        last[0], layers=tuple(rows), sparsity=sparsity, schedule=steps, seconds=clock.now() - begin
    )
