"""Prune a model block by block: statistic -> mask and weights -> reconstruction, and on to the next block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparseprune.memory import all_finite
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.options import Reconstruction
from sparseprune.pruning.pace import Pace
from sparseprune.pruning.reconstruction import reconstruct
from sparseprune.pruning.report import BlockReconstructed, LayerPruned
from sparseprune.pruning.rewrite import Rewriter, weight_of
from sparseprune.pruning.zeros import Zeros
from sparseprune.report import track
from sparseprune.statistics.inputs import Statistic
from sparseprune.statistics.walk import Walk, advance, block_statistics, seconds_a_pass

__all__ = ["BlockRun", "prune_blocks", "prune_layer"]


@dataclass(frozen=True)
class BlockRun:
    """Options of a walk.

    Attributes:
        sequential: statistics on the outputs of the pruned blocks before, rather than the dense ones.
        reconstruction: how each block is trained towards the dense one's outputs; None: not at all.
        statistics: of every layer, where they were taken before; None: taken in each block.
        until: when by `sparseprune.clock` the walk should be over: calibration batches are dropped, and fewer epochs
            made, if they would not fit; None: it takes what it takes.
    """

    sequential: bool = True
    reconstruction: Reconstruction | None = None
    until: float | None = None
    statistics: Mapping[str, Any] | None = None


def prune_blocks(
    blocks: Sequence[tuple[str, nn.Module]],
    layers: Sequence[WeightSite],
    walk: Walk,
    method: Method,
    targets: Mapping[str, Target],
    run: BlockRun,
    rewriter: Rewriter,
    progress: bool = False,
) -> tuple[list[LayerPruned], list[BlockReconstructed]]:
    """Prunes `layers`, all of which lie in `blocks`, in place, and leaves `walk` behind the last block.

    Args:
        walk: as `sparseprune.statistics.walk.capture` returns it for these blocks.
        targets: layer name -> what it is to become.

    Raises:
        ValueError: naming the layer.
    """
    rows: list[LayerPruned] = []
    reconstructed: list[BlockReconstructed] = []
    # the dense model's hidden states, beside those that the pruned blocks give
    dense = list(walk.hidden) if run.reconstruction is not None else []
    probe = seconds_a_pass(blocks[0][1], walk, 0) if run.until is not None else 0.0
    pace = Pace(run.until, len(blocks), len(walk.hidden), probe, run.reconstruction)
    for index, (name, block) in enumerate(track(blocks, f"pruning ({method.name})", enabled=progress)):
        inside = [layer for layer in layers if layer.name.startswith(f"{name}.")]
        with pace.block() as batches:
            walk.keep(batches)
            del dense[batches:]
            if run.reconstruction is not None:
                advance(block, Walk(dense, walk.calls, walk.masks, walk.autocast), index)
            masks: dict[nn.Parameter, Tensor] = {}
            if inside:
                statistics: dict[str, Any] = {}
                if run.statistics is not None:
                    statistics = dict(run.statistics)
                elif method.statistic is not None:
                    statistics = block_statistics(block, inside, walk, index, method.statistic)
                if not run.sequential:
                    advance(block, walk, index)
                with pace.timed("solving"):
                    for layer in inside:
                        row, mask = prune_layer(
                            layer, method, statistics.get(layer.name), targets[layer.name], rewriter
                        )
                        rows.append(row)
                        masks[layer.parameter] = layer.stored(mask)
                statistics.clear()
                if (options := pace.epochs()) is not None:
                    zeros = Zeros(block, ())
                    zeros.set({own: ~masks[it] for own, it in block.named_parameters() if it in masks})
                    with pace.timed("training"), ExitStack() as trained:
                        for layer in inside:
                            trained.enter_context(targets[layer.name].trained(layer))
                        reconstructed.append(
                            reconstruct(name, block, index, zeros, walk, dense, options, rewriter)
                        )
            if run.sequential or not inside:
                advance(block, walk, index)
    return rows, reconstructed


def prune_layer(
    layer: WeightSite, method: Method, statistic: Statistic | None, target: Target, rewriter: Rewriter
) -> tuple[LayerPruned, Tensor]:
    """Prunes one layer; its row of the report, and its mask, bool [out, in].

    Raises:
        ValueError: naming the layer.
    """
    weight = weight_of(layer)
    try:
        pruned = method.prune(weight, statistic, target)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error
    if not all_finite(pruned.weight):
        raise ValueError(
            f"{layer.name}: method {method.name} gave NaN or Inf; pass more calibration data, or use wanda"
        )
    error_ = None if statistic is None else statistic.error(weight, pruned.weight)
    return rewriter.write(layer, pruned, error_), pruned.mask
