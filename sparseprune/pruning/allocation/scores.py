"""Allocations that one look at the scores gives: one threshold for all layers, and outlier shares (OWL)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparseprune.models.sites import WeightSite
from sparseprune.pruning.allocation.context import AllocationContext, block_of, layer_scores
from sparseprune.pruning.patterns import removed

__all__ = ["global_threshold", "outliers", "standard_deviations"]

OWL_M = 5.0
"""A score is an outlier if it exceeds so many times the mean (Yin et al.; they also use 3, 7 and 10)."""
OWL_LAMBDA = 0.08
"""How far from the mean sparsity a block may go."""


def global_threshold(context: AllocationContext) -> dict[str, float]:
    """One threshold over all layers' scores.

    Scores of weights alone (magnitude) and of gradients (the change of the loss) are compared as they are. Those that
    hold inputs are divided by their mean in the layer: activations grow with depth.
    """
    statistics = context.score_statistics()
    comparable = all(found.comparable for found in statistics.values())

    def scores(layer: WeightSite) -> Tensor:
        found = layer_scores(context, layer, statistics.get(layer.name))
        return found if comparable else found / found.mean().clamp_min(1e-30)

    return _under_one_threshold(context, scores)


def standard_deviations(context: AllocationContext) -> dict[str, float]:
    """|W| < rate x std(W) of the layer goes, with the one rate that removes what is asked for."""

    def scores(layer: WeightSite) -> Tensor:
        weight = layer.weight.float()
        return weight.abs() / weight.std(correction=0).clamp_min(1e-30)

    return _under_one_threshold(context, scores)


def outliers(context: AllocationContext) -> dict[str, float]:
    """OWL (Yin et al. 2023, "Outlier Weighed Layerwise Sparsity"): blocks with more outlier scores keep more.

    D = share of a block's scores above M x their mean; the blocks' sparsities are s - 2 lambda (D - min D) /
    (max D - min D), up to the constant that makes the mean over all weights s.
    """
    context.calibrated("owl")
    statistics = context.score_statistics()
    blocks = block_of(context.model, context.layers)
    totals: dict[str, list[float]] = {}
    for layer in context.layers:
        scores = layer_scores(context, layer, statistics.get(layer.name))
        total = totals.setdefault(blocks[layer.name], [0.0, 0.0])
        total[0] += float(scores.sum(dtype=torch.float64))
        total[1] += scores.numel()
    shares = dict.fromkeys(totals, 0.0)
    for layer in context.layers:
        block = blocks[layer.name]
        mean = totals[block][0] / totals[block][1]
        scores = layer_scores(context, layer, statistics.get(layer.name))
        shares[block] += int((scores > OWL_M * mean).sum()) / totals[block][1]
    least, most = min(shares.values()), max(shares.values())
    wishes = {
        block: context.sparsity - 2 * OWL_LAMBDA * (share - least) / max(most - least, 1e-30)
        for block, share in shares.items()
    }
    return {layer.name: wishes[blocks[layer.name]] for layer in context.layers}


def _under_one_threshold(
    context: AllocationContext, scores: Callable[[WeightSite], Tensor]
) -> dict[str, float]:
    total = sum(layer.weight.numel() for layer in context.layers)
    count = sum(removed(layer.weight.numel(), context.sparsity) for layer in context.layers)
    if count in (0, total):
        return {layer.name: context.sparsity for layer in context.layers}
    threshold = _kth_smallest(lambda: (scores(layer) for layer in context.layers), count)
    below, equal = {}, {}
    for layer in context.layers:
        keys = _sortable(scores(layer))
        below[layer.name] = int((keys < threshold).sum())
        equal[layer.name] = int((keys == threshold).sum())
    left = count - sum(below.values())
    for layer in reversed(context.layers):  # the first of several equals are kept, as in a mask
        taken = min(left, equal[layer.name])
        below[layer.name] += taken
        left -= taken
    return {layer.name: below[layer.name] / layer.weight.numel() for layer in context.layers}


def _sortable(values: Tensor) -> Tensor:
    """int64 in the order of the float32 `values`, in [-2^31, 2^31)."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 is 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _kth_smallest(matrices: Callable[[], Iterator[Tensor]], k: int) -> int:
    """The k-th smallest (from 1) of all entries of all matrices, as `_sortable`: by 16 bits, then 16 more.

    Two passes and a histogram instead of one vector of all scores, which would be as large as the model.
    """
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for matrix in matrices():
        high += torch.bincount((_sortable(matrix) >> 16).flatten().cpu() + (1 << 15), minlength=1 << 16)
    digit = int(torch.searchsorted(high.cumsum(0), k))
    k -= int(high[:digit].sum())
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for matrix in matrices():
        keys = _sortable(matrix).flatten().cpu()
        keys = keys[(keys >> 16) + (1 << 15) == digit]
        low += torch.bincount(keys & 0xFFFF, minlength=1 << 16)
    return ((digit - (1 << 15)) << 16) + int(torch.searchsorted(low.cumsum(0), k))
