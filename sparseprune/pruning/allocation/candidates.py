"""Every layer's weight at several sparsities, made once, so that an allocation can be tried by copying."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sparseprune.models.sites import WeightSite
from sparseprune.pruning.allocation.context import AllocationContext
from sparseprune.pruning.base import Target
from sparseprune.report import track

__all__ = ["Candidates"]


class Candidates:
    """The layers' weights at `levels` (sparsities, ascending; 0.0 is the dense weight), pruned by the context's method.

    They live in a temporary file, mapped into memory, in bfloat16: its rounding is far below what pruning changes.
    The `with` block ends with the model as it was.
    """

    def __init__(
        self, context: AllocationContext, levels: Sequence[float], statistics: Mapping[str, Any]
    ) -> None:
        self.levels = list(levels)
        self.layers = {layer.name: layer for layer in context.layers}
        self._context, self._statistics = context, statistics
        self._dense: dict[str, Tensor] = {}
        self._pruned: dict[tuple[str, float], Tensor] = {}
        self._now: dict[str, float] = {}

    def __enter__(self) -> Candidates:
        self._folder = tempfile.TemporaryDirectory(prefix="sparseprune-search-")
        try:
            context = self._context
            for index, layer in enumerate(
                track(context.layers, "pruning at several sparsities", enabled=context.progress)
            ):
                self._prune(index, layer)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, weight in self._dense.items():
            self.layers[name].weight.copy_(weight)
        self._pruned.clear()
        self._folder.cleanup()

    def use(self, assignment: Mapping[str, float]) -> None:
        """Gives each named layer its weight at that level."""
        for name, level in assignment.items():
            if self._now[name] != level:
                weight = self._dense[name] if level == 0 else self._pruned[name, level]
                self.layers[name].weight.copy_(weight)
                self._now[name] = level

    def _prune(self, index: int, layer: WeightSite) -> None:
        context, levels = self._context, [level for level in self.levels if level > 0]
        weight = layer.weight
        size = weight.numel()
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
        file = Path(self._folder.name) / str(index)
        room = torch.from_file(str(file), shared=True, size=size * len(levels), dtype=torch.bfloat16)
        for position, level in enumerate(levels):
            try:
                pruned = context.method.prune(
                    dense, self._statistics.get(layer.name), Target(context.pattern, level, context.scope)
                ).weight
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from error
            slot = room[position * size : (position + 1) * size].view(weight.shape)
            slot.copy_(pruned)
            self._pruned[layer.name, level] = slot
        self._dense[layer.name] = weight.clone()
        self._now[layer.name] = 0.0
