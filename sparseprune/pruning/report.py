"""What `prune` reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method
from sparseprune.pruning.patterns import Pattern, Scope
from sparseprune.pruning.schedules.base import ScheduleReport
from sparseprune.report import Column, Report, Table

__all__ = ["BlockReconstructed", "LayerPruned", "PruneReport"]


_INPUTS = {"dense": "dense model", "sequential": "blocks pruned before"}


@dataclass(frozen=True)
class LayerPruned:
    """What happened to one layer; `COLUMNS` says what a table shows of it.

    Attributes:
        shape: [out, in].
        zeros_before, zeros_after: how many of its weights are zero.
        error: ||X (W - W')^T|| / ||X W^T|| over the calibration inputs X that the method saw; None where it
            saw none, or only the size of each channel.
    """

    name: str
    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int
    error: float | None = None

    @classmethod
    def of(cls, layer: WeightSite, zeros_before: int, error: float | None = None) -> LayerPruned:
        """The row of a layer as it is now."""
        shape = (layer.out_features, layer.in_features)
        return cls(layer.name, shape, zeros_before, layer.count_zeros(), error)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity_before(self) -> float:
        return self.zeros_before / max(self.size, 1)

    @property
    def sparsity_after(self) -> float:
        return self.zeros_after / max(self.size, 1)


COLUMNS = (
    Column("layer", value=lambda it: it.name),
    Column("shape", value=lambda it: it.shape),
    Column("zeros before", ".1%", lambda it: it.sparsity_before),
    Column("zeros after", ".1%", lambda it: it.sparsity_after),
    Column("output error", ".1%", lambda it: it.error, optional=True),
)


@dataclass(frozen=True)
class BlockReconstructed:
    """How far a block's outputs y' are from the dense model's y: the mean over tokens of ||y - y'||^2 / ||y||^2, before
    the block's reconstruction and after it (`epochs` passes), both on the calibration inputs.
    """

    name: str
    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class PruneReport(Report):
    """What `prune` did, layer by layer; `print(report)` shows it as a table.

    Attributes:
        inputs: which inputs the statistics are of: "dense" (the model as given) or "sequential" (each block's
            after the blocks before it were pruned); None for a method that looks at weights only.
        blocks: the blocks that were reconstructed.
        notes: what the user should know: a recipe chosen, a matrix that needed damping, inputs that had to be the
            dense model's.
        schedule: the steps, where it took several; the rest is then the last step's.
    """

    layers: tuple[LayerPruned, ...]
    method: str
    pattern: str
    sparsity: float
    scope: str
    calibration: str | None
    model_parameters: int
    inputs: str | None = None
    allocation: str = "uniform"
    blocks: tuple[BlockReconstructed, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    schedule: ScheduleReport | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Iterable[LayerPruned],
        method: Method,
        pattern: Pattern,
        calibration: CalibrationData | None,
        scope: Scope,
        **rest: Any,
    ) -> PruneReport:
        """Of a pruning of `model`; `rest`: the other fields."""
        return cls(
            tuple(layers),
            method=method.name,
            pattern=str(pattern),
            scope="group" if pattern.structured else scope,
            calibration=None if calibration is None else calibration.source,
            model_parameters=sum(parameter.numel() for parameter in model.parameters()),
            **rest,
        )

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero now."""
        return sum(layer.zeros_after for layer in self.layers)

    @property
    def sparsity_after(self) -> float:
        """Zeros as a fraction of the pruned layers' weights."""
        return self.zeros / max(self.weights, 1)

    def table(self) -> Table:
        title = f"Pruned by {self.method}, {self.pattern}"
        if self.scope in ("row", "layer"):
            title += f" {self.sparsity:.1%}, ranked per {self.scope}"
        footer = [
            f"total: {len(self.layers)} layers, {self.weights:,} weights, {self.zeros:,} zeros "
            f"({self.sparsity_after:.1%}); the model has {self.model_parameters:,} parameters"
        ]
        if self.allocation != "uniform":
            footer.append(f"allocation: {self.allocation}")
        if self.calibration is not None:
            inputs = "" if self.inputs is None else f", inputs of the {_INPUTS[self.inputs]}"
            footer.append(f"calibration: {self.calibration}{inputs}")
        if self.blocks:
            before, after = self.blocks[-1].before, self.blocks[-1].after
            epochs = [it.epochs for it in self.blocks]
            footer.append(
                f"reconstruction: {len(self.blocks)} blocks, {min(epochs)} to {max(epochs)} epochs each; the last one's output is {after:.2%} of its energy away "
                f"from the dense model's, {before:.2%} before its own"
            )
        footer.extend(self.notes)
        footer.append(f"took {self.seconds:.1f} s")
        return Table.of(title, COLUMNS, self.layers, footer)

    def __str__(self) -> str:
        steps = "" if self.schedule is None else f"\n{self.schedule}"
        return super().__str__() + steps
