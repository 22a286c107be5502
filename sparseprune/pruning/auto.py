"""`method="auto"`: the recipe that kept most of the model in our measurements (docs/quality.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from sparseprune import clock, processes
from sparseprune.hardware import fast_bfloat16
from sparseprune.models.blocks import find_blocks
from sparseprune.models.modules import device_of
from sparseprune.models.sites import find_sites
from sparseprune.pruning.options import Reconstruction
from sparseprune.pruning.patterns import Pattern

__all__ = ["Choice", "choose", "fast_dtype"]


_MINUTES_TO_PERMUTE = 5.0
_SOLVING_SHARE = (
    0.5  # the solver gets at most so much of the time: the rest is for reading and reconstruction
)


@dataclass(frozen=True)
class Choice:
    """A method by name, what follows it in each block, and why."""

    method: str
    reconstruction: Reconstruction | None
    reason: str


def choose(pattern: Pattern, model: nn.Module, minutes: float | None, *, reconstruct: bool = True) -> Choice:
    """The best recipe that there is time for.

    ADMM finds mask and weights together and was the best solver on every pattern; reordering the FFN's neurons first
    keeps more under N:M; training each block towards the dense one's outputs then undoes a third of what is left. Where
    ADMM alone would take most of the time, Wanda leaves it to the training.

    Args:
        minutes: for all of it; None: the recipe as measured, whatever it takes.
        reconstruct: False leaves the blocks as the method made them.
    """
    permute = pattern.structured and (minutes is None or minutes >= _MINUTES_TO_PERMUTE)
    method = "admm+permute" if permute else "admm"
    if minutes is not None and _admm_seconds(model) > 60 * minutes * _SOLVING_SHARE:
        method = "wanda"
    if not reconstruct:
        return Choice(method, None, f"auto: {method}")
    if not find_blocks(model):
        return Choice(
            method, None, f"auto: {method}; the model is not a chain of blocks, so none is reconstructed"
        )
    within = "" if minutes is None else f", as many epochs as fit in {minutes:g} minutes"
    return Choice(method, Reconstruction(), f"auto: {method}, then each block reconstructed{within}")


_ADMM_PRODUCTS = (
    40  # products of a weight [out, in] by a matrix [in, in]: 20 iterations, and as long for the masks
)
_PROBE = 512


def _admm_seconds(model: nn.Module) -> float:
    """What ADMM would take for all of the model's linears, by how long a matrix product takes here."""
    matrix = torch.ones(_PROBE, _PROBE, device=device_of(model))
    seconds = math.inf
    for _ in range(3):
        begin = clock.now()
        float((matrix @ matrix)[0, 0])  # waits for a GPU
        seconds = min(seconds, clock.now() - begin)
    sites = find_sites(model)
    multiplications = sum(_ADMM_PRODUCTS * it.out_features * it.in_features**2 for it in sites)
    return processes.mean(seconds) * multiplications / _PROBE**3


def fast_dtype(model: nn.Module) -> torch.dtype | None:
    """bfloat16 for a float32 model where the device multiplies it faster; None: the model's own."""
    first = next((it for it in model.parameters() if it.is_floating_point()), None)
    if first is None or first.dtype != torch.float32 or not fast_bfloat16(device_of(model)):
        return None
    return torch.bfloat16
