"""An allocation found by trying: sparsities that keep the predictions nearest to the dense model's, within a budget."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import nn

from sparseprune import clock
from sparseprune.measure.benchmark import time_layer
from sparseprune.models.notes import note, noted
from sparseprune.models.sites import WeightSite, site_of
from sparseprune.pruning.allocation.candidates import Candidates
from sparseprune.pruning.allocation.context import AllocationContext, block_of
from sparseprune.pruning.allocation.curves import (
    TOKENS,
    Curves,
    cheapest,
    kind_of,
    levels_around,
    measure_curves,
    statistics_for,
)
from sparseprune.pruning.allocation.judge import Judge, hold_out
from sparseprune.report import human_bytes, track
from sparseprune.weights.choose import options_for, smallest_bytes

__all__ = ["Search", "default_search", "layer_seconds"]

_TOKENS = 4096
"""Held-out tokens that each trial is judged on."""
_SEGMENTS = 8
"""Stretches of depth that the search weighs against each other; single blocks are told apart by their curves."""
_CURVES_SHARE = 0.2
"""Of the time, for the curves that trials start from."""
_MINUTES = 15.0
_STARTS = ((0.25, 0.5), (0.5, 0.5), (0.0, 0.5), (0.25, 0.3), (0.25, 0.8), (0.5, 0.0))
"""(trust in the curves, share of the marginals' logarithm), the best of some runs first."""
_TRIALS = 100  # that there should be time for
_PATIENCE = 200


@dataclass
class Search:
    """Searches the sparsity of each layer, by default so that as many weights go as under "uniform".

    Each layer's weight is made at several sparsities, by the method itself, on three quarters of the calibration
    text; the held-out quarter judges, by the KL divergence from the dense model's predictions. Measured are a curve for
    each layer alone (`measure_curves`), and what more sparsity of each kind of layer and each stretch of depth costs
    in the uniformly pruned model. Both together give the losses whose least sum under the budget (`cheapest`) is the
    start; then random steps of the weights of kinds and stretches, kept if the whole model comes nearer to the dense
    one. Uniform is among the trials, so nothing that is judged worse is ever given.

    Attributes:
        minutes: to spend, about; at most half of the minutes that `prune` is told.
        trials: to end after so many; the same seed then gives the same allocation, given time enough.
        bytes: the layers' weights may take together, packed for the CPU, each in its smallest form, dense among them. The
            `sparsity` of `prune` is then no target; the search looks around it.
        seconds: one pass through all layers may take at batch size `batch` (default: 1), as measured on this machine, each layer in
            its fastest format, dense among them. `sparsity` as for `bytes`.
        losses: of the trials, in order, after a run; the first is uniform's where that fits the budget.
    """

    _: KW_ONLY
    minutes: float = _MINUTES
    trials: int | None = None
    bytes: int | None = None
    batch: int | None = None
    seconds: float | None = None
    losses: list[float] = field(init=False, default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bytes is not None and self.seconds is not None:
            raise ValueError("bytes, seconds: must be given one at a time, got both")
        for name in ("minutes", "trials", "bytes", "seconds", "batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: must be above 0, got {value}")
        if self.batch is not None and self.seconds is None:
            raise ValueError(f"batch: is what seconds are counted at, got {self.batch} without; leave it out")

    @property
    def sums_to_sparsity(self) -> bool:
        """Whether the target is `prune`'s sparsity; else it is the budget."""
        return self.bytes is None and self.seconds is None

    def __call__(self, context: AllocationContext) -> dict[str, float]:
        begin = clock.now()
        # half of prune's time at most: the rest is for the pruning itself
        allowed = math.inf if context.minutes is None else context.minutes / 2
        budget_seconds = 60 * min(self.minutes, allowed)
        data, pieces = hold_out(context.calibrated("search"), "search", _TOKENS)
        levels = levels_around(context.sparsity)
        options = [0.0, *levels]
        prices, budget = self._prices(context, options)
        least = sum(min(price) for price in prices.values())
        if least > budget * (1 + 1e-9):
            raise ValueError(self._too_small(least, levels[-1]))
        self.losses = []
        with Candidates(context, levels, statistics_for(context, data)) as candidates:
            few = Judge(context.model, hold_out(context.calibrated("search"), "search", TOKENS)[1])
            started = clock.now()
            few()
            trial = clock.now() - started
            until = clock.now() + _CURVES_SHARE * (begin + budget_seconds - clock.now())
            curves = measure_curves(context, candidates, few, [levels[1], levels[3]], until)
            # on a slow machine more trials tell more than more tokens
            affordable = int((begin + budget_seconds - clock.now()) / (_TRIALS * trial))
            judge = Judge(context.model, pieces[: max(1, affordable)])
            trials = _Trials(candidates, judge, options, prices, budget, context.progress)
            found = self._search(context, trials, curves, begin + budget_seconds)
        self.losses = trials.losses
        uniform = "" if trials.uniform is None else f", uniform {trials.uniform:.4g}"
        context.notes.append(
            f"search: {len(trials.losses)} allocations tried, loss {trials.loss:.4g}{uniform} (KL to the dense model on "
            f"held-out calibration text); {curves.measured} of {len(context.layers)} layers' curves were measured"
        )
        return found

    def _search(
        self, context: AllocationContext, trials: _Trials, curves: Curves, deadline: float
    ) -> dict[str, float]:
        names = [layer.name for layer in context.layers]
        sizes = {layer.name: layer.weight.numel() for layer in context.layers}
        trials.try_uniform(context.sparsity)
        costs = {name: [curves.at(name, level) for level in trials.options] for name in names}
        pooled = [
            sum(costs[name][k] for name in names) / sum(sizes.values()) for k in range(len(trials.options))
        ]

        def blended(trust: float, factors: Mapping[str, float]) -> dict[str, list[float]]:
            """Between a loss that is every weight's alike (trust 0) and the curves (1), times the layer's factor."""
            return {
                name: [
                    factors[name] * cost**trust * (sizes[name] * common) ** (1 - trust)
                    for cost, common in zip(costs[name], pooled, strict=True)
                ]
                for name in names
            }

        groups = _groups(context)
        keys = sorted({key for pair in groups.values() for key in pair})

        def factors(weights: Mapping[str, float]) -> dict[str, float]:
            return {name: math.exp(sum(weights[key] for key in groups[name])) for name in names}

        marginal = {
            key: math.log(value) for key, value in trials.marginals(context.sparsity, groups, sizes).items()
        }
        best_weights, best_trust = dict.fromkeys(keys, 0.0), 0.0
        for index, (trust, step) in enumerate(_STARTS):
            weights = {key: step * marginal[key] for key in keys}
            # the first one even where the time went into candidates
            if (index == 0 or self._more(deadline, trials)) and trials(blended(trust, factors(weights))):
                best_weights, best_trust = weights, trust
        generator = random.Random(context.seed)
        width = 0.5
        for _ in track(self._turns(deadline, trials), "search", enabled=context.progress):
            weights = {
                key: value + (generator.gauss(0, width) if generator.random() < 0.4 else 0.0)
                for key, value in best_weights.items()
            }
            trust = min(max(best_trust + generator.gauss(0, 0.1), 0.0), 1.0)
            better = trials(blended(trust, factors(weights)))
            if better:
                best_weights, best_trust = weights, trust
            # Rechenberg: the width stays if about one step in five is a success; steps that lead nowhere are too small
            width *= 1.35 if better else 1.1 if trials.repeated else 0.93
            width = min(max(width, 0.05), 1.5)
        return trials.best

    def _turns(self, deadline: float, trials: _Trials) -> Iterator[None]:
        while self._more(deadline, trials):
            yield

    def _more(self, deadline: float, trials: _Trials) -> bool:
        """Whether there is time for another trial, and something new was found to try lately."""
        left = self.trials is None or len(trials.losses) < self.trials
        return left and clock.now() < deadline and trials.repeated < _PATIENCE

    def _prices(
        self, context: AllocationContext, options: Sequence[float]
    ) -> tuple[dict[str, list[float]], float]:
        """(price of each layer at each option, budget) in weights that stay, bytes or seconds."""
        if self.seconds is not None:
            return layer_seconds(context, options, self.batch or 1), self.seconds
        price: Callable[[WeightSite, float], float] = _bytes if self.bytes is not None else _kept
        prices = {layer.name: [price(layer, level) for level in options] for layer in context.layers}
        if self.bytes is not None:
            return prices, self.bytes
        return prices, sum(_kept(layer, context.sparsity) for layer in context.layers)

    def _too_small(self, least: float, level: float) -> str:
        if self.bytes is not None:
            shown = f"bytes: the layers take at least {human_bytes(least)} at {level:.0%} zeros, got {human_bytes(self.bytes)}"
        else:
            shown = f"seconds: the layers take at least {least:.3g} s at {level:.0%} zeros, got {self.seconds:.3g}"
        return f"{shown}; allow more, or pass a higher sparsity to search around"


def default_search(context: AllocationContext) -> dict[str, float]:
    """`Search` with its defaults."""
    return Search()(context)


def _bytes(layer: WeightSite, sparsity: float) -> float:
    return smallest_bytes((layer.out_features, layer.in_features), layer.weight.dtype, sparsity)


def _kept(layer: WeightSite, sparsity: float) -> float:
    return layer.weight.numel() * (1 - sparsity)


def layer_seconds(context: AllocationContext, options: Sequence[float], batch: int) -> dict[str, list[float]]:
    """Seconds of each layer at each sparsity, in the fastest format: one measurement for each shape and dtype."""
    kinds: dict[tuple[int, int, torch.dtype, bool], list[str]] = {}
    for layer in context.layers:
        key = (layer.out_features, layer.in_features, layer.weight.dtype, layer.bias is not None)
        kinds.setdefault(key, []).append(layer.name)
    seconds: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(context.seed)
    for (rows, columns, dtype, bias), names in track(
        list(kinds.items()), "timing layers", enabled=context.progress
    ):
        found = []
        for level in options:
            linear = nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)
            keep = torch.rand(rows, columns, generator=generator) >= level
            linear.weight.masked_fill_(~keep, 0)
            note(site_of(linear), "unstructured")
            formats = options_for(linear.weight, note=noted(linear)).formats
            timing = time_layer(linear, formats, (batch,), seconds=0.3)[0]
            found.append(min(timing.dense_seconds, *timing.sparse_seconds.values(), math.inf))
        seconds.update((name, found) for name in names)
    return seconds


class _Trials:
    """Allocations tried so far, and the best of them."""

    def __init__(
        self,
        candidates: Candidates,
        judge: Judge,
        options: Sequence[float],
        prices: Mapping[str, Sequence[float]],
        budget: float,
        progress: bool,
    ) -> None:
        self.candidates, self.judge, self.progress = candidates, judge, progress
        self.options, self.prices, self.budget = options, prices, budget
        self.losses: list[float] = []
        self.best: dict[str, float] = {}
        self.loss = math.inf
        self.uniform: float | None = None
        self.repeated = 0  # allocations in a row that had been tried before
        self._known: set[tuple[float, ...]] = set()

    def try_uniform(self, sparsity: float) -> None:
        level = self.options.index(sparsity)
        if sum(price[level] for price in self.prices.values()) <= self.budget * (1 + 1e-9):
            self._judge(dict.fromkeys(self.prices, sparsity))
            self.uniform = self.loss

    def marginals(
        self, sparsity: float, groups: Mapping[str, tuple[str, str]], sizes: Mapping[str, int]
    ) -> dict[str, float]:
        """group -> what its weights are worth, relative to others': the loss that one more step of sparsity of the
        whole group adds to the uniformly pruned model, for each weight removed. Between 1/30 and 30.

        Measured where it matters: a layer's loss in a model that is dense otherwise says little about one that is not.
        """
        uniform = dict.fromkeys(groups, sparsity)
        more = self.options[self.options.index(sparsity) + 1]
        self.candidates.use(uniform)
        before = self.judge()
        found = {}
        keys = sorted({key for pair in groups.values() for key in pair})
        for key in track(keys, "kinds and depths", enabled=self.progress):
            members = [name for name, pair in groups.items() if key in pair]
            self.candidates.use({**uniform, **dict.fromkeys(members, more)})
            found[key] = (self.judge() - before) / sum(sizes[name] for name in members)
        typical = statistics.median(found.values())
        if typical <= 0:
            return dict.fromkeys(found, 1.0)
        return {key: min(max(value / typical, 1 / 30), 30.0) for key, value in found.items()}

    def __call__(self, costs: Mapping[str, Sequence[float]]) -> bool:
        """Whether the cheapest allocation by these costs is new and the best so far."""
        chosen = cheapest(costs, self.prices, self.budget)
        return self._judge({name: self.options[index] for name, index in chosen.items()})

    def _judge(self, assignment: dict[str, float]) -> bool:
        key = tuple(assignment.values())
        self.repeated = self.repeated + 1 if key in self._known else 0
        if self.repeated:
            return False
        self._known.add(key)
        self.candidates.use(assignment)
        loss = self.judge()
        if math.isnan(loss):
            raise ValueError(
                "model: predictions must not be NaN, got some at the sparsities tried; check its weights, or load it in "
                "float32 or bfloat16"
            )
        self.losses.append(loss)
        if not loss < self.loss:
            return False
        self.loss, self.best = loss, assignment
        return True


def _groups(context: AllocationContext) -> dict[str, tuple[str, str]]:
    """layer name -> (its kind, its stretch of depth)."""
    blocks = list(dict.fromkeys(block_of(context.model, context.layers).values()))
    stretch = {block: f"depth {index * _SEGMENTS // len(blocks)}" for index, block in enumerate(blocks)}
    return {
        name: (kind_of(name), stretch[block])
        for name, block in block_of(context.model, context.layers).items()
    }
