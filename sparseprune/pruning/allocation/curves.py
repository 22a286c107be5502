"""How much each layer minds: curves of loss over sparsity, and the sparsities that cost least together."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseprune import clock
from sparseprune.calibration import CalibrationData
from sparseprune.pruning.allocation.candidates import Candidates
from sparseprune.pruning.allocation.context import AllocationContext, block_of
from sparseprune.pruning.allocation.judge import Judge, hold_out
from sparseprune.report import track

__all__ = [
    "Curves",
    "cheapest",
    "kind_of",
    "levels_around",
    "measure_curves",
    "sensitivity",
    "statistics_for",
    "two_factors",
]

TOKENS = 1024
"""Held-out tokens that each point of a curve is measured on."""
STATISTIC_BATCHES = 16
"""Batches for the statistics of a search: the mask that they give ranks levels, the final one is made from all."""
_FINE = 0.02
_MINUTES = 10.0
_FLOOR = 1e-9  # a loss is at least this, so that it has a logarithm


@dataclass(frozen=True)
class Curves:
    """layer name -> (sparsity -> how far predictions are from the dense model's if only this layer is pruned so).

    `measured` of the layers were measured, the others are estimated from their block and kind.
    """

    losses: Mapping[str, Mapping[float, float]]
    measured: int

    def at(self, name: str, sparsity: float) -> float:
        """The loss at a sparsity between or beyond those measured: its logarithm is linear in between."""
        if sparsity == 0:
            return 0.0
        points = sorted(self.losses[name].items())
        if len(points) == 1:
            (level, loss), slope = points[0], 0.0
        else:
            right = next((i for i in range(1, len(points) - 1) if points[i][0] >= sparsity), len(points) - 1)
            (level, loss), (upper, above) = points[right - 1], points[right]
            # never falling: a layer that seems better for being pruned is noise
            slope = max(math.log(max(above, _FLOOR) / max(loss, _FLOOR)) / (upper - level), 1.0)
        return max(loss, _FLOOR) * math.exp(slope * (sparsity - level))


def sensitivity(context: AllocationContext) -> dict[str, float]:
    """Sparsities that cost least by the layers' own curves, as if losses added up."""
    data, pieces = hold_out(context.calibrated("sensitivity"), "sensitivity", TOKENS)
    levels = levels_around(context.sparsity)
    grid = [levels[0], context.sparsity, levels[-1]]
    deadline = clock.now() + 60 * min(_MINUTES, math.inf if context.minutes is None else context.minutes / 2)
    with Candidates(context, grid, statistics_for(context, data)) as candidates:
        curves = measure_curves(context, candidates, Judge(context.model, pieces), grid, deadline)
    context.notes.append(
        f"sensitivity: {curves.measured} of {len(context.layers)} layers' curves were measured"
    )
    # not beyond the points that were measured
    steps = max(1, round((levels[-1] - levels[0]) / _FINE))
    fine = [levels[0] + (levels[-1] - levels[0]) * step / steps for step in range(steps + 1)]
    sizes = {layer.name: layer.weight.numel() for layer in context.layers}
    costs = {name: [curves.at(name, level) for level in fine] for name in sizes}
    prices = {name: [size * (1 - level) for level in fine] for name, size in sizes.items()}
    budget = sum(sizes.values()) * (1 - context.sparsity)
    return {name: fine[index] for name, index in cheapest(costs, prices, budget).items()}


def levels_around(sparsity: float) -> list[float]:
    """Five sparsities about this one, in steps of 0.1, or less where 0 or 1 is near.

    Not more: with 0.3 to either side a search at 60 % gave the queries 90 %, and in as many trials ended at a loss of
    1.61, with these at 1.49 (SmolLM2-135M, Wanda).
    """
    step = min(0.1, sparsity / 2.5, (1 - sparsity) / 2.5)
    return [sparsity + step * offset for offset in (-2, -1, 0, 1, 2)]


def statistics_for(context: AllocationContext, data: CalibrationData) -> Mapping[str, Any]:
    """The method's statistics over the first batches of `data`; none for a method that looks at weights only."""
    return context.collect(data.batches[:STATISTIC_BATCHES])


def measure_curves(
    context: AllocationContext,
    candidates: Candidates,
    judge: Judge,
    grid: Sequence[float],
    deadline: float = math.inf,
) -> Curves:
    """Prunes one layer at a time to each sparsity of `grid`, all levels of the candidates, and judges the model.

    Layers come in random order; those left when `clock.now()` passes the deadline are estimated from the
    measured ones: a factor for the block and a factor for the kind of layer.
    """
    blocks = block_of(context.model, context.layers)
    order = list(context.layers)
    random.Random(context.seed).shuffle(order)
    losses: dict[str, dict[float, float]] = {}
    for layer in track(order, "sensitivity of each layer", enabled=context.progress):
        if clock.now() > deadline and losses:
            break
        points = {}
        for level in grid:
            candidates.use({layer.name: level})
            points[level] = judge(blocks[layer.name])
        candidates.use({layer.name: 0.0})
        losses[layer.name] = points
    places = {name: (block, kind_of(name)) for name, block in blocks.items()}
    estimates: dict[str, dict[float, float]] = {name: {} for name in places if name not in losses}
    for level in grid:
        known = {name: math.log(max(points[level], _FLOOR)) for name, points in losses.items()}
        found = two_factors(places, known)
        for name, points in estimates.items():
            points[level] = math.exp(found[name])
    return Curves({**losses, **estimates}, len(losses))


def kind_of(name: str) -> str:
    """What a layer is, whatever its block: its name with every number as *."""
    return re.sub(r"\d+", "*", name)


def two_factors(places: Mapping[str, tuple[str, str]], known: Mapping[str, float]) -> dict[str, float]:
    """known[name] ~ mean + a[block] + b[kind], least squares by alternating means; estimates for all places."""
    mean = sum(known.values()) / len(known)
    terms: list[dict[str, float]] = [{}, {}]
    for _ in range(20):
        for side in (0, 1):
            rests: dict[str, list[float]] = {}
            for name, value in known.items():
                other = terms[1 - side].get(places[name][1 - side], 0.0)
                rests.setdefault(places[name][side], []).append(value - mean - other)
            # one more in the divisor: a factor known from few layers stays near 1
            terms[side] = {key: sum(values) / (len(values) + 0.5) for key, values in rests.items()}
    return {
        name: mean + terms[0].get(block, 0.0) + terms[1].get(kind, 0.0)
        for name, (block, kind) in places.items()
    }


def cheapest(
    costs: Mapping[str, Sequence[float]], prices: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """For each layer the index of one of its options, of least total cost within a total price.

    Lagrange's way: of each layer only options on the lower convex hull of (price, cost) count, and from the cheapest
    ones the step that saves the most cost for its price is taken until the budget is spent; a step too large for
    what is left is passed over. Optimal up to one step.

    Raises:
        ValueError: the least prices together exceed the budget.
    """
    hulls = {name: _hull(prices[name], costs[name]) for name in costs}
    at = dict.fromkeys(costs, 0)
    spent = sum(prices[name][hulls[name][0]] for name in costs)
    if spent > budget * (1 + 1e-9):
        raise ValueError(f"budget: the least that can be reached is {spent:.6g}, got {budget:.6g}")
    steps = []
    for name, hull in hulls.items():
        for position in range(1, len(hull)):
            before, after = hull[position - 1], hull[position]
            price = prices[name][after] - prices[name][before]
            steps.append(((costs[name][before] - costs[name][after]) / price, name, position, price))
    # steepest first; of one layer the hull's steps come in order by themselves
    for _, name, position, price in sorted(steps, key=lambda step: (-step[0], step[2])):
        if at[name] == position - 1 and spent + price <= budget * (1 + 1e-9):
            at[name] = position
            spent += price
    return {name: hulls[name][position] for name, position in at.items()}


def _hull(prices: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull, from the least price to the least cost."""
    order = sorted(range(len(prices)), key=lambda index: (prices[index], costs[index]))
    hull: list[int] = []
    for index in order:
        if hull and costs[index] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            slope = (costs[second] - costs[first]) / (prices[second] - prices[first])
            if (costs[index] - costs[second]) / (prices[index] - prices[second]) > slope:
                break
            hull.pop()
        hull.append(index)
    return hull
