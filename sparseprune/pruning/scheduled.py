"""`prune()` in several steps: a schedule calls it again and again, with recovery between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from sparseprune import clock
from sparseprune.models.losses import Evaluate
from sparseprune.models.sites import WeightSite, matches
from sparseprune.pruning.options import Recipe
from sparseprune.pruning.report import LayerPruned, PruneReport
from sparseprune.pruning.schedules import Gradual, Greedy
from sparseprune.pruning.schedules.base import Recover

__all__ = ["SCHEDULES", "check_schedule", "find_schedule", "prune_scheduled"]

SCHEDULES: dict[str, type[Gradual] | type[Greedy]] = {"gradual": Gradual, "greedy": Greedy}


def find_schedule(
    schedule: str | Gradual | Greedy, recover: Recover | None = None, evaluate: Evaluate | None = None
) -> Gradual | Greedy | None:
    """The schedule of that name with its defaults, one given as such, or None for "one-shot".

    Raises:
        ValueError: an unknown name, functions that no schedule calls, or a greedy schedule without `evaluate`.
    """
    check_schedule(schedule)
    for name, given in {"recover": recover, "evaluate": evaluate}.items():
        if given is not None and not callable(given):
            raise ValueError(f"{name}: must be a function of the model, got {given!r}")
        if given is not None and schedule == "one-shot":
            raise ValueError(
                f'{name}: belongs to a schedule of several steps; pass schedule="gradual", or leave it out'
            )
    found = SCHEDULES[schedule]() if isinstance(schedule, str) and schedule != "one-shot" else schedule
    if isinstance(found, Greedy) and evaluate is None:
        raise ValueError(
            "evaluate: a greedy schedule needs it, got None; pass a function from the model to its loss"
        )
    if isinstance(found, Greedy) and found.recover_trials and recover is None:
        raise ValueError(
            "recover: must be given for recover_trials, got None; pass a function that trains the model"
        )
    return None if isinstance(found, str) else found


def check_schedule(schedule: str | Gradual | Greedy) -> None:
    """Raises ValueError unless it is the name of one, or one."""
    if isinstance(schedule, (Gradual, Greedy)) or schedule == "one-shot":
        return
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(
            f"schedule: must be one of one-shot, {', '.join(SCHEDULES)}, or a schedule with options, "
            f"got {schedule!r}"
        )


def prune_scheduled(
    schedule: Gradual | Greedy,
    model: nn.Module,
    layers: Sequence[WeightSite],
    recipe: Recipe,
    once: Callable[[Sequence[WeightSite], Recipe], PruneReport],
    recover: Recover | None,
    evaluate: Evaluate | None,
    progress: bool,
) -> PruneReport:
    """Prunes `layers` again and again by `once(layers, recipe)`, as the schedule says; the report is that of the last step,
    with the schedule's steps and the zeros before the first and after the last.
    """
    assert recipe.sparsity is not None, "a recipe with a schedule has a sparsity"
    before = [layer.count_zeros() for layer in layers]
    last: list[PruneReport] = []

    def prune_to(sparsity: float, include: Sequence[str] | None = None) -> None:
        chosen = [it for it in layers if include is None or matches(it.names, include)]
        last[:] = [once(chosen, dataclasses.replace(recipe, sparsity=sparsity, schedule="one-shot"))]

    begin = clock.now()
    if isinstance(schedule, Gradual):
        steps = schedule.run(
            model, prune_to, recipe.sparsity, recover=recover, evaluate=evaluate, progress=progress
        )
    else:
        assert evaluate is not None, "find_schedule ensures it"
        steps = schedule.run(
            model,
            prune_to,
            recipe.sparsity,
            recover=recover,
            evaluate=evaluate,
            progress=progress,
            layers=layers,
        )
    rows = [LayerPruned.of(layer, zeros) for layer, zeros in zip(layers, before, strict=True)]
    return dataclasses.replace(
        last[0], layers=tuple(rows), sparsity=recipe.sparsity, schedule=steps, seconds=clock.now() - begin
    )
