"""How fast to train along the budget: the learning rate."""

from __future__ import annotations

import math

__all__ = ["learning_rate_factor"]


def learning_rate_factor(progress: float, warmup: float, final: float) -> float:
    """Linear from near 0 to 1 over the first `warmup` of the budget, then a half cosine down to `final`."""
    if progress < warmup:
        return max(progress / warmup, 0.02)  # the first step, at progress 0, must not be for nothing
    along = min(1.0, (progress - warmup) / (1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))
