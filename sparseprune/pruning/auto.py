"""`method="auto"`: the recipe that kept most of the model in our measurements (docs/quality.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparseprune.hardware import fast_bfloat16
from sparseprune.models.modules import device_of
from sparseprune.pruning.patterns import Pattern
from sparseprune.pruning.reconstruction import Reconstruction

__all__ = ["Recipe", "choose", "fast_dtype"]


_MINUTES_TO_PERMUTE = 5.0


@dataclass(frozen=True)
class Recipe:
    """A method by name, what follows it in each block, and why."""

    method: str
    reconstruction: Reconstruction | None
    reason: str


def choose(pattern: Pattern, chain: bool, minutes: float | None) -> Recipe:
    """The best recipe that there is time for.

    ADMM finds mask and weights together and was the best solver on every pattern; reordering the FFN's neurons first
    keeps more under N:M; training each block towards the dense one's outputs then undoes a third of what is left.

    Args:
        chain: whether the model is a chain of blocks.
        minutes: for all of it; None: the recipe as measured, whatever it takes.
    """
    permute = pattern.structured and (minutes is None or minutes >= _MINUTES_TO_PERMUTE)
    method = "admm+permute" if permute else "admm"
    if not chain:
        return Recipe(
            method, None, f"auto: {method}; the model is not a chain of blocks, so none is reconstructed"
        )
    within = "" if minutes is None else f", as many epochs as fit in {minutes:g} minutes"
    return Recipe(method, Reconstruction(), f"auto: {method}, then each block reconstructed{within}")


def fast_dtype(model: nn.Module) -> torch.dtype | None:
    """bfloat16 for a float32 model where the device multiplies it faster; None: the model's own."""
    first = next((it for it in model.parameters() if it.is_floating_point()), None)
    if first is None or first.dtype != torch.float32 or not fast_bfloat16(device_of(model)):
        return None
    return torch.bfloat16
