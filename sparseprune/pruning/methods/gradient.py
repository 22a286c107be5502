"""Scores by the loss: how much it would change, to first order, if a weight became zero.

gradient: |W . g| with g the gradient of the summed loss, the connection sensitivity of SNIP (Lee, Ajanthan, Torr
2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity"). What raises the loss on one batch
and lowers it on another cancels out; near a minimum little else is left.

taylor: the mean of |W . g_b| over batches b (Molchanov et al. 2017, "Pruning Convolutional Neural Networks for
Resource Efficient Inference"), in which nothing cancels out across batches.
"""

from __future__ import annotations

from torch import Tensor

from sparseprune.pruning.base import Method
from sparseprune.statistics.gradients import GradientMagnitudes, GradientSum, WeightGradients

__all__ = ["GRADIENT", "TAYLOR", "gradient_scores"]


def gradient_scores(weight: Tensor, statistic: WeightGradients) -> Tensor:
    """S_ij = |W_ij G_ij|, [out, in], with G the statistic's sum over the batches: of the gradients, or of their
    magnitudes.
    """
    return (weight * statistic.total).abs()


GRADIENT = Method("gradient", gradient_scores, statistic=GradientSum, scope="layer")

TAYLOR = Method("taylor", gradient_scores, statistic=GradientMagnitudes, scope="layer")
