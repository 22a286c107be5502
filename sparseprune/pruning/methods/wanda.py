"""Wanda (Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models").

S_ij = |W_ij| ||X_j||_2: a weight counts as much as it moves the output on real inputs X, so outlier channels
stay. Ranked within each output row (or N:M group); the paper finds that this beats ranking the layer as a
whole.
"""

from __future__ import annotations

from torch import Tensor

from sparseprune.pruning.base import Method
from sparseprune.statistics.inputs import InputSquares

__all__ = ["WANDA", "wanda_scores"]


def wanda_scores(weight: Tensor, statistic: InputSquares) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2, [out, in], for weight [out, in] and the inputs' squares over the calibration
    tokens.
    """
    return weight.abs().mul_(statistic.norm())


WANDA = Method("wanda", wanda_scores, statistic=InputSquares, scope="row")
