"""Magnitude pruning: the smallest weights go, S = |W|."""

from __future__ import annotations

from torch import Tensor

from sparseprune.pruning.base import Method

__all__ = ["MAGNITUDE", "magnitude_scores"]


def magnitude_scores(weight: Tensor, statistic: None = None) -> Tensor:
    """S_ij = |W_ij|, [out, in]."""
    return weight.abs()


MAGNITUDE = Method("magnitude", magnitude_scores, scope="layer")
