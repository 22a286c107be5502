"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization").

Column by column, a rounding's effect on the layer's outputs is made up for by the columns after it, as in SparseGPT. With
H the damped Gram matrix of the inputs and R^T R = H^-1, R upper triangular, rounding w_j to q_j changes the columns k > j
by -(w_j - q_j) / R_jj x R_jk. A group's scale is fitted when its first column is reached, to the weights as they are by
then. A pruned weight is one that is rounded to 0: what moves onto it from the columns before moves on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.pruning.methods.gram import inverse_factor
from sparseprune.quantization.methods.base import QuantizationMethod
from sparseprune.statistics.inputs import Gram
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.rounding import Grid, fit_grid, joined, nearest

__all__ = ["GPTQ"]


def _solve(weight: Tensor, kept: Tensor | None, encoding: Encoding, statistic: Gram) -> tuple[Tensor, Grid]:
    rows, columns = weight.shape
    factor = inverse_factor(statistic).to(weight.dtype)
    diagonal = factor.diagonal()
    current = weight.t().clone()  # so that a column of the layer lies in one piece
    keep = None if kept is None else kept.t()
    codes = torch.empty_like(current)
    size = encoding.group_size
    grids: list[Grid] = []
    for start in range(0, columns, size):
        end = min(start + size, columns)
        group_kept = None if keep is None else keep[start:end].t()
        grid = fit_grid(current[start:end].t(), encoding, group_kept)
        grids.append(grid)
        scale, zero = (part[:, 0].contiguous() for part in grid.columns(0, 1))
        errors = torch.empty((end - start, rows), dtype=weight.dtype, device=weight.device)
        for j in range(start, end):
            codes[j], rounded = nearest(current[j], scale, zero, encoding)
            if keep is not None:
                rounded = torch.where(keep[j], rounded, 0)
            error = (current[j] - rounded) / diagonal[j]
            current[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        current[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes.t(), joined(grids)


GPTQ = QuantizationMethod("gptq", _solve, statistic=Gram)
