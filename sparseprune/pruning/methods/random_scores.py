"""Random pruning: the control that every other method has to beat."""

from __future__ import annotations

import zlib
from functools import partial

import torch
from torch import Tensor

from sparseprune.pruning.base import Method

__all__ = ["RANDOM", "random_method", "random_scores"]


def random_scores(weight: Tensor, statistic: None = None, seed: int = 0) -> Tensor:
    """Uniform in [0, 1), float32 [out, in], drawn on the CPU from `seed` and the weight's own values.

    The same weights get the same scores wherever and in whatever order they come, and different layers
    different ones.
    """
    values = weight.detach().float().cpu().contiguous()
    generator = torch.Generator().manual_seed(zlib.crc32(values.numpy().tobytes(), seed & 0xFFFFFFFF))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def random_method(seed: int = 0) -> Method:
    """Random pruning with scores of another seed."""
    return Method("random", partial(random_scores, seed=seed))


RANDOM = random_method()
