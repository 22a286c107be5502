"""What an allocation is told, and how its wishes become counts of weights that add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch
from sparseprune.models.blocks import find_blocks
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.patterns import Pattern, Scope, removed
from sparseprune.statistics.inputs import InputSquares

__all__ = ["AllocationContext", "block_of", "exact_targets", "layer_scores", "uniform_targets"]


@dataclass
class AllocationContext:
    """What is to be pruned, and with what.

    Attributes:
        layers: those to prune, in model order; every one gets a target.
        sparsity: the fraction of all their weights to remove.
        scope: what a target ranks together under the unstructured pattern.
        calibration: None if there is no text; allocations that need one say so.
        minutes: that a search may take; None for its own default.
    """

    model: nn.Module
    layers: Sequence[WeightSite]
    method: Method
    pattern: Pattern
    sparsity: float
    scope: Scope
    calibration: CalibrationData | None = None
    minutes: float | None = None
    seed: int = 0
    progress: bool = False
    notes: list[str] = field(default_factory=list)
    """What an allocation has to tell, for the report."""

    def calibrated(self, allocation: str) -> CalibrationData:
        """The calibration data, or the error that `allocation` needs some."""
        if self.calibration is None:
            raise ValueError(
                f"calibration: allocation {allocation} needs some, got None; pass "
                "sparseprune.calibration.windows(text, tokenizer)"
            )
        return self.calibration

    def score_statistics(self) -> Mapping[str, Any]:
        """What `layer_scores` takes, by layer name: empty where neither method nor calibration gives any."""
        if self.calibration is None:
            return {}
        if self.method.score is None:
            return InputSquares.collect(self.model, self.layers, self.calibration, progress=self.progress)
        return self.collect(self.calibration)

    def collect(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """The method's statistic of every layer, by name."""
        return self.method.collect(self.model, self.layers, batches, self.progress)


def layer_scores(context: AllocationContext, layer: WeightSite, statistic: Any) -> Tensor:
    """Scores float32 [out, in] of a layer's weights: the method's own; Wanda's |W| ||X|| for a method that solves."""
    weight = layer.weight.float()
    if context.method.score is not None:
        return context.method.score(weight, statistic)
    return weight.abs() if statistic is None else weight.abs() * statistic.norm()


def block_of(model: nn.Module, layers: Iterable[WeightSite]) -> dict[str, str]:
    """layer name -> name of the block that holds it; a layer outside all blocks is its own."""
    blocks = [name for name, _ in find_blocks(model)]
    return {
        layer.name: next((name for name in blocks if layer.name.startswith(f"{name}.")), layer.name)
        for layer in layers
    }


def uniform_targets(context: AllocationContext) -> dict[str, Target]:
    """The same target for every layer."""
    target = Target(context.pattern, context.sparsity, context.scope)
    return {layer.name: target for layer in context.layers}


def exact_targets(context: AllocationContext, wishes: Mapping[str, float]) -> dict[str, Target]:
    """Targets near the wished sparsities that remove together as many weights as the uniform allocation does.

    All wishes are moved by one amount, within [0, 1) for each layer, then rounded to what a target can express (a
    weight a row, or a weight of the layer); what rounding leaves goes where it was cut off most. The total is that of
    "uniform" to within one such step of one layer.
    """
    steps = {layer.name: _steps(layer, context) for layer in context.layers}
    total = sum(size * removed(count, context.sparsity) for size, count in steps.values())

    def counts(shift: float) -> dict[str, float]:
        return {
            name: min(max((wishes[name] + shift) * count, 0.0), max(count - 1, 0))
            for name, (_, count) in steps.items()
        }

    wanted = counts(0.0)
    if _weights(steps, wanted) != total:
        wanted = counts(_shift(wishes, lambda shift: _weights(steps, counts(shift)), total))
    whole = {name: int(it + 1e-6) for name, it in wanted.items()}
    left = total - _weights(steps, whole)
    # what was cut off most comes first, of those the largest steps: the smallest then fill what is left
    for name in sorted(steps, key=lambda name: (whole[name] - wanted[name], -steps[name][0])):
        size, count = steps[name]
        if size <= left and whole[name] < count - 1:
            whole[name] += 1
            left -= size
    return {
        name: Target(context.pattern, whole[name] / max(count, 1), context.scope)
        for name, (_, count) in steps.items()
    }


def _steps(layer: WeightSite, context: AllocationContext) -> tuple[int, int]:
    """(weights that one step removes, steps there are): a block of each row of blocks, or one block."""
    rows, columns = context.pattern.block
    high, wide = layer.out_features // rows, layer.in_features // columns
    return (layer.out_features * columns, wide) if context.scope == "row" else (rows * columns, high * wide)


def _weights(steps: Mapping[str, tuple[int, int]], counts: Mapping[str, float]) -> float:
    return sum(steps[name][0] * count for name, count in counts.items())


def _shift(wishes: Mapping[str, float], weights: Callable[[float], float], total: float) -> float:
    """The amount to add to all wishes, so that `weights` of it, which ascends, is `total`."""
    low, high = -max(wishes.values()), 1 - min(wishes.values())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle) <= total else (low, middle)
    return low
