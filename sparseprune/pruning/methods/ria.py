"""RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-Training Pruning Method for Large Language Models").

S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) ||X_j||^a with a = 1/2: what share of its input channel
and of its output channel a weight is, so that no channel is pruned away as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.pruning.base import Method
from sparseprune.statistics.inputs import InputSquares

__all__ = ["RIA", "ria_scores"]


def ria_scores(weight: Tensor, statistic: InputSquares, power: float = 0.5) -> Tensor:
    """S, [out, in], for weight [out, in] and the inputs' squares; 0 for a weight of 0, whatever its channel."""
    size = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny  # a channel of zeros is zeros, not 0 / 0
    relative = size / size.sum(dim=0).clamp_min(tiny) + size / size.sum(dim=1, keepdim=True).clamp_min(tiny)
    return relative * statistic.norm().to(weight.dtype).pow(power)


RIA = Method("ria", ria_scores, statistic=InputSquares)
