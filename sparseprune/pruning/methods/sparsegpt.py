"""SparseGPT (Frantar, Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot").

Column by column, a removed weight's effect on the output is made up for by the columns after it. With H the
damped Gram matrix and R^T R = H^-1, R upper triangular, removing w_j costs (w_j / R_jj)^2 and changes the
columns k > j by -w_j / R_jj x R_jk. Masks are chosen a block of columns at a time (an N:M group when it is
reached), from the weights as they are by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.pruning.base import Method, Pruned, Target
from sparseprune.pruning.methods.gram import inverse_factor
from sparseprune.pruning.patterns import keep_best, mask_from_scores, removed
from sparseprune.statistics.inputs import Gram

__all__ = ["SPARSEGPT", "sparsegpt_solve"]

_BLOCK = 128
# Columns updated one by one, before the rest of the block takes their errors in one product.
_PANEL = 32


def sparsegpt_solve(weight: Tensor, statistic: Gram, target: Target) -> Pruned:
    """Mask and weights of `target` for weight float32 [out, in].

    Exact: N:M in every group; otherwise the number removed up to the end of each block of 128 columns, over
    the layer (scope "layer", as in the paper) or in every row (scope "row"), and so in total.

    Raises:
        ValueError: a shape the pattern does not divide, NaN or Inf in the Gram matrix, or one that is none.
    """
    rows, columns = weight.shape
    pattern = target.pattern
    pattern.check_shape(rows, columns)
    factor = inverse_factor(statistic).to(weight.dtype)
    # a channel that is always zero has only its damping left: its weights go first, the smallest of them first
    diagonal = torch.where(statistic.matrix.diagonal() > 0, factor.diagonal(), 1e4 * factor.diagonal())
    unit = pattern.m or pattern.block[1]
    width = max(_BLOCK // unit, 1) * unit
    # transposed, so that a column of the layer lies in one piece
    current = weight.t().clone()
    keep = torch.ones((columns, rows), dtype=torch.bool, device=weight.device)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        if not pattern.structured:
            scores = (current[start:end] / diagonal[start:end, None]).square()
            keep[start:end] = _block_mask(scores.t(), target, start, end).t()
        errors = torch.empty((end - start, rows), dtype=weight.dtype, device=weight.device)
        step = max(_PANEL // unit, 1) * unit if pattern.structured else _PANEL
        for first in range(start, end, step):
            last = min(first + step, end)
            for j in range(first, last):
                if pattern.structured and j % unit == 0:
                    group = slice(j, j + unit)
                    scores = (current[group] / diagonal[group, None]).square()
                    keep[group] = mask_from_scores(scores.t(), pattern).t()
                error = torch.where(keep[j], 0, current[j] / diagonal[j])
                current[j].masked_fill_(~keep[j], 0)
                current[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
                errors[j - start] = error
            done = errors[first - start : last - start]
            current[last:end].addmm_(factor[first:last, last:end].t(), done, alpha=-1)
        current[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return Pruned(current.t().contiguous(), keep.t().contiguous())


def _block_mask(scores: Tensor, target: Target, start: int, end: int) -> Tensor:
    """Keeps the best of columns start to end, so that the number removed is right for columns 0 to end."""
    height, width = target.pattern.block
    strips = scores.shape[0] // height if target.scope == "layer" else 1
    before, after = (removed(strips * (column // width), target.sparsity) for column in (start, end))
    return keep_best(scores, target.pattern, target.scope, lambda count: after - before)


SPARSEGPT = Method("sparsegpt", solve=sparsegpt_solve, statistic=Gram, scope="layer")
