"""Greedy pruning: remove a little where it hurts least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from sparseprune import clock
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import Evaluate, judged
from sparseprune.models.sites import WeightSite, find_sites, matches
from sparseprune.models.snapshot import Snapshot
from sparseprune.options import require_at_least
from sparseprune.pruning.schedules.base import (
    Recover,
    ScheduleReport,
    Step,
    check_target,
)
from sparseprune.pruning.zeros import Zeros
from sparseprune.report import track

__all__ = ["Greedy"]

# A group of layers is never pruned further than this by a greedy search: what little is left costs more than it saves.
_MOST = 0.95
# Methods round to whole weights in each row or layer: this near to the target is there.
_NEAR = 1e-3


@dataclass(frozen=True)
class Greedy:
    """Removes a little where it hurts least, again and again.

    At each step every group of layers is tried: pruned a little further, measured, and put back exactly. The one whose
    loss grows least for each weight removed is kept, and recovered. It stops at the target, or before a step after
    which the loss is above `max_loss`.

    Attributes:
        step: how much further a group is pruned at a time, as a fraction of its weights.
        groups: name -> shell patterns over its linears; or a number: the blocks, in so many runs of neighbours; or
            None: each block for itself. A linear outside of the blocks is a group of its own.
        recover_trials: also recover each trial before it is measured; costs one recovery per trial.
        lazy: try anew only the groups that could still be best, given what they cost when last tried. Finds the same
            as trying all where a group gets no cheaper as others are pruned, for a tenth of the trials.
    """

    step: float = 0.05
    _: KW_ONLY
    groups: Mapping[str, str | Sequence[str]] | int | None = None
    max_loss: float | None = None
    recover_trials: bool = False
    lazy: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(
                f"step: must be in (0, 1), got {self.step!r}; pass a small fraction such as 0.05"
            )
        if isinstance(self.groups, int):
            require_at_least(1, groups=self.groups)
        elif self.groups is not None and not self.groups:
            raise ValueError("groups: must hold at least one, got none; leave it out for the model's blocks")
        if self.max_loss is not None and math.isnan(self.max_loss):
            raise ValueError("max_loss: must be a number, got nan; leave it out for no limit")

    def run(
        self,
        model: nn.Module,
        prune_to: Callable[[float, Sequence[str]], Any],
        target: float,
        *,
        recover: Recover | None = None,
        evaluate: Evaluate,
        progress: bool = False,
        layers: Sequence[WeightSite] | None = None,
    ) -> ScheduleReport:
        """Prunes `model` in place.

        Args:
            prune_to: (sparsity, include) prunes the linears whose names match the patterns `include` to `sparsity`,
                such as `lambda sparsity, include: sp.prune(model, "unstructured", "magnitude", sparsity,
                include=include)`.
            target: fraction of zeros over all groups.
            layers: that `prune_to` prunes; by default all linears but the output head.

        Memory: up to three copies of the model.
        """
        check_target(target)
        search = _Search(self, model, prune_to, evaluate, recover, target, layers)
        before = search.loss
        about = math.ceil(target / self.step * len(search.sizes))
        steps = tuple(track(search.steps(), "pruning greedily", total=about, enabled=progress))
        return ScheduleReport("Pruned greedily", target, before, steps, search.stopped)


@dataclass(frozen=True)
class _Trial:
    name: str
    sparsity: float
    loss: float
    cost: float
    after: Snapshot
    zeros: Zeros


class _Search:
    """The state of a greedy search: the model to go back to, what is zero in it, what each group's last trial cost."""

    def __init__(
        self,
        options: Greedy,
        model: nn.Module,
        prune_to: Callable[[float, Sequence[str]], Any],
        evaluate: Evaluate,
        recover: Recover | None,
        target: float,
        layers: Sequence[WeightSite] | None,
    ) -> None:
        self.options, self.model = options, model
        self.prune_to, self.evaluate, self.recover = prune_to, evaluate, recover
        sites = find_sites(model) if layers is None else layers
        self.patterns = _groups(model, sites, options.groups)
        self.layers = {
            name: [site for site in sites if matches(site.names, patterns)]
            for name, patterns in self.patterns.items()
        }
        empty = next((name for name, layers in self.layers.items() if not layers), None)
        if empty is not None:
            raise ValueError(f"groups: each must match some linear, {empty} matches none of those to prune")
        self.sizes = {name: sum(it.weight.numel() for it in layers) for name, layers in self.layers.items()}
        self.total = sum(self.sizes.values())
        self.wanted = target * self.total
        self.zeros = Zeros(model)
        self.loss = judged(evaluate, model)
        self.snapshot = Snapshot(model)
        self.costs = dict.fromkeys(self.patterns, -math.inf)
        self.stopped = "target reached"

    def steps(self) -> Iterator[Step]:
        number = 0
        while (missing := self.wanted - self._zeros_in(self.layers)) >= max(0.5, _NEAR * self.total):
            start = clock.now()
            best, trials = self._best(missing)
            if best is None:
                if number == 0:
                    raise ValueError(
                        f"prune_to: must remove weights, it removed none of any group at a step of {self.options.step}; "
                        "it is given (sparsity, include) and prunes what include matches; or the step is too small"
                    )
                self.stopped = "no group can be pruned further"
                return
            best.after.restore()
            loss = best.loss
            if self.recover is not None and not self.options.recover_trials:
                with best.zeros.held():
                    self.recover(self.model)
                loss = judged(self.evaluate, self.model)
            described = f"{best.name} to {best.sparsity:.1%}"
            limit = self.options.max_loss
            if limit is not None and not loss <= limit:  # NaN too
                self.snapshot.restore()
                self.stopped = f"{described} gives a loss of {loss:.4f}, above {limit:g}"
                return
            self.zeros, self.loss = best.zeros, loss
            self.snapshot = Snapshot(self.model)
            number += 1
            sparsity = self._zeros_in(self.layers) / self.total
            yield Step(number, described, sparsity, best.loss, loss, trials, clock.now() - start)

    def _zeros_in(self, names: Iterable[str]) -> int:
        layers = [it for name in names for it in self.layers[name]]
        return sum(it.count_zeros() for it in layers)

    def _best(self, missing: float) -> tuple[_Trial | None, int]:
        """The trial whose loss grows least for a weight removed, and how many were made; the model is put back."""
        best: _Trial | None = None
        trials = 0
        for name in sorted(self.costs, key=lambda name: self.costs[name]):
            if best is not None and self.options.lazy and best.cost <= self.costs[name]:
                break
            sparsity = self._next_sparsity(name, missing)
            if sparsity is None:
                continue
            trials += 1
            best = self._try(name, sparsity, best)
        return best, trials

    def _next_sparsity(self, name: str, missing: float) -> float | None:
        """How far to prune a group next, None if no further."""
        size = self.sizes[name]
        now = self._zeros_in([name]) / size
        sparsity = min(now + self.options.step, now + missing / size, _MOST)
        return sparsity if round(sparsity * size) > round(now * size) else None

    def _try(self, name: str, sparsity: float, best: _Trial | None) -> _Trial | None:
        """Prunes, measures, puts back; the better of this trial and `best`."""
        before = self._zeros_in([name])
        zeros = self.zeros.copy()
        try:
            with zeros.growing():
                self.prune_to(sparsity, self.patterns[name])
            if self.recover is not None and self.options.recover_trials:
                with zeros.held():
                    self.recover(self.model)
            loss = judged(self.evaluate, self.model)
            removed = self._zeros_in([name]) - before
            if removed < 1:  # too little to make a difference in a row of the method's
                self.costs[name] = math.inf
                return best
            self.costs[name] = math.inf if math.isnan(loss) else (loss - self.loss) / removed
            if best is not None and best.cost <= self.costs[name]:
                return best
            return _Trial(name, sparsity, loss, self.costs[name], Snapshot(self.model), zeros)
        finally:
            self.snapshot.restore()


def _groups(
    model: nn.Module, sites: Sequence[WeightSite], groups: Mapping[str, str | Sequence[str]] | int | None
) -> dict[str, list[str]]:
    """Name -> patterns over linears."""
    if isinstance(groups, Mapping):
        return {name: [it] if isinstance(it, str) else list(it) for name, it in groups.items()}
    blocks = [name for name, _ in find_blocks(model)]
    if not blocks:
        if isinstance(groups, int):
            raise ValueError(
                f"groups: a number needs repeated blocks, {type(model).__name__} has none; pass patterns, or leave it out"
            )
        if not sites:
            raise ValueError(f"model: {type(model).__name__} has no linear layer to prune")
        return {site.name: [site.name] for site in sites}
    count = min(groups or len(blocks), len(blocks))
    bounds = [round(index * len(blocks) / count) for index in range(count + 1)]
    runs = [blocks[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    found = {
        run[0] if len(run) == 1 else f"{run[0]} ... {run[-1]}": [f"{name}.*" for name in run] for run in runs
    }
    inside = [pattern for patterns in found.values() for pattern in patterns]
    outside = [site.name for site in sites if not matches(site.names, inside)]
    return {
        name: patterns
        for name, patterns in found.items()
        if any(matches(site.names, patterns) for site in sites)
    } | {name: [name] for name in outside}
