"""One pass of pruning over a model's layers: where the statistics come from, and in which order the layers change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.blocks import find_blocks
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.auto import fast_dtype
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.report import BlockReconstructed, LayerPruned
from sparseprune.pruning.rewrite import Rewriter, apply_mask, pack_layer_mask, weight_of
from sparseprune.pruning.sequential import BlockRun, prune_blocks, prune_layer
from sparseprune.report import track
from sparseprune.statistics.walk import Walk, WalkError, capture

__all__ = ["Job"]


@dataclass
class Job:
    """One run over the model's layers, and what it has to report."""

    model: nn.Module
    layers: Sequence[WeightSite]
    method: Method
    targets: Mapping[str, Target]
    data: CalibrationData | None
    progress: bool
    rows: dict[str, LayerPruned] = field(default_factory=dict)
    blocks: list[BlockReconstructed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: str | None = None

    def run(self, options: BlockRun, required: bool) -> None:
        """Prunes all layers.

        Args:
            required: whether a model that is not a chain of blocks is an error, rather than read as a whole.
        """
        statistic = self.method.statistic
        if self.data is None or (statistic is None and options.reconstruction is None):
            if self.method.changes_weights:
                with Rewriter() as rewriter:
                    self._each(self.layers, {}, rewriter)
            else:
                self._by_masks({})
            return
        self.inputs = "sequential" if options.sequential else "dense"
        if statistic is not None and statistic.whole_model:
            # taken from the dense model, before anything changes
            options = replace(options, statistics=self._collect(self.layers))
            if options.reconstruction is None:
                self.inputs = "dense"
                self._by_masks(options.statistics or {})
                return
        score_only = not self.method.changes_weights and not options.sequential
        if score_only and statistic is not None and statistic.light is None:
            self._by_masks(self._collect(self.layers))
            return
        blocks = find_blocks(self.model)
        try:
            walk = capture(
                self.model, [block for _, block in blocks], self.data.batches, progress=self.progress
            )
        except WalkError as error:
            if required:
                raise
            self.inputs = "dense"
            self.notes.append(f"inputs are the dense model's, taken in whole passes: {error}")
            if options.reconstruction is not None:
                self.notes.append("no block was reconstructed")
            with Rewriter() as rewriter:
                self._each(self.layers, self._collect(self.layers), rewriter)
            return
        if options.reconstruction is not None:
            walk.autocast = fast_dtype(self.model)
            if walk.autocast is not None:
                self.notes.append(
                    "blocks ran in bfloat16 (autocast) while they were calibrated and reconstructed"
                )
        self._by_blocks(blocks, walk, options)

    def _by_masks(self, statistics: Mapping[str, Any]) -> None:
        # All masks first, as bits (a sixteenth of a bfloat16 model): what fails, fails with the model untouched.
        bits = []
        for layer in track(self.layers, f"pruning ({self.method.name})", enabled=self.progress):
            try:
                pruned = self.method.prune(
                    weight_of(layer), statistics.get(layer.name), self.targets[layer.name]
                )
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from error
            bits.append(pack_layer_mask(layer, pruned.mask))
        for layer, layer_bits in zip(self.layers, bits, strict=True):
            self.rows[layer.name] = apply_mask(layer, layer_bits)

    def _by_blocks(self, blocks: Sequence[tuple[str, nn.Module]], walk: Walk, options: BlockRun) -> None:
        inside: list[WeightSite] = []
        outside: list[WeightSite] = []
        for layer in self.layers:
            (inside if layer.name.startswith(tuple(f"{name}." for name, _ in blocks)) else outside).append(
                layer
            )
        with Rewriter() as rewriter:
            if outside and not options.sequential:
                self._each(outside, self._collect(outside), rewriter)
            batches = len(walk.hidden)
            rows, self.blocks = prune_blocks(
                blocks, inside, walk, self.method, self.targets, options, rewriter, self.progress
            )
            if len(walk.hidden) < batches:
                self.notes.append(
                    f"calibrated on {len(walk.hidden)} of {batches} batches or more in each block: all of them did not fit in the time"
                )
            if options.reconstruction is not None and not self.blocks:
                self.notes.append("no block was reconstructed: not one epoch fits in the time")
            self.rows.update((row.name, row) for row in rows)
            if outside and options.sequential:  # the head, say: it reads what the pruned blocks give
                self._each(outside, self._collect(outside), rewriter)

    def _each(self, layers: Sequence[WeightSite], statistics: Mapping[str, Any], rewriter: Rewriter) -> None:
        for layer in track(layers, f"pruning ({self.method.name})", enabled=self.progress):
            row, _ = prune_layer(
                layer, self.method, statistics.get(layer.name), self.targets[layer.name], rewriter
            )
            self.rows[layer.name] = row

    def _collect(self, layers: Sequence[WeightSite]) -> Mapping[str, Any]:
        return {} if self.data is None else self.method.collect(self.model, layers, self.data, self.progress)
