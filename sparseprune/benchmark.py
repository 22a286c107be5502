"""How fast is a layer on this machine, dense and in one sparse format or another?

Everything is measured in pairs: the candidates take turns, call by call, so that a busy moment of the machine hits
all of them, and medians are compared. A layer that the cache would hold is timed over several copies of its weight,
as the layers of a model push each other out.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparseprune.formats import Format
from sparseprune.nn import SparseLinear, dense_weight

__all__ = ["LayerTiming", "alternating_medians", "time_layer"]

ROTATED_BYTES = 64 << 20
"""Copies of a weight are made up to this size in all: more than the caches near a core, less than a model."""

_MAX_COPIES = 64
_MIN_ROUNDS = 5
_MAX_ROUNDS = 400


@dataclass(frozen=True)
class LayerTiming:
    """Medians, in seconds, of one layer at one batch size: dense, and in each sparse format by name."""

    batch: int
    dense: float
    sparse: Mapping[str, float]

    def speedup(self, format: str | Format) -> float:
        """Dense time over sparse time."""
        return self.dense / self.sparse[str(format)]


def alternating_medians(
    candidates: Mapping[str, Sequence[Callable[[], Any]]], seconds: float
) -> dict[str, float]:
    """Median seconds a call of each candidate, a candidate being calls that do the same work on different memory.

    One call of each candidate in turn, then the next copy; at least 5 rounds, at most 400, else for about `seconds`.
    """
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for calls in candidates.values():
        for call in calls[:2]:
            call()
    stop, rounds = clock() + seconds, 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and clock() < stop):
        for name, calls in candidates.items():
            call = calls[rounds % len(calls)]
            begin = clock()
            call()
            times[name].append(clock() - begin)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def time_layer(
    linear: nn.Module,
    formats: Sequence[str | Format],
    batches: Sequence[int] = (1,),
    seconds: float = 0.5,
    rotated_bytes: int = ROTATED_BYTES,
) -> list[LayerTiming]:
    """Time an `nn.Linear` (or transformers' `Conv1D`) against its sparse twins, one result a batch size.

    Args:
        formats: those to try; the weight must fit each of them.
        seconds: to spend, about, over all batch sizes together.
        rotated_bytes: how much memory the copies of the dense weight may take; below the weight's own size
            there is one copy, and the layer is timed in whatever cache holds it.
    """
    weight = dense_weight(linear).detach()
    copies = max(1, min(_MAX_COPIES, math.ceil(rotated_bytes / max(1, weight.nbytes))))
    modules = {"dense": _copies(linear, copies)}
    for form in formats:
        modules[str(form)] = _copies(SparseLinear.from_dense(linear, form), copies)
    timings = []
    for batch in batches:
        x = torch.randn(batch, weight.shape[1]).to(weight.dtype)
        # forward(), not the module: hooks of the user's are no part of a layer's price
        calls = {name: [functools.partial(it.forward, x) for it in its] for name, its in modules.items()}
        medians = alternating_medians(calls, seconds / len(batches))
        timings.append(LayerTiming(batch, medians.pop("dense"), medians))
    return timings


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]
