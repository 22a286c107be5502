"""Calibration on several processes: each reads its share of the batches, and statistics, being sums, are added up.

Active as soon as `torch.distributed` is initialized (torchrun, accelerate) with more than one process. Every process is
given the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from sparseprune.models.sites import WeightSite
    from sparseprune.statistics.inputs import Statistic

__all__ = ["add_gradients", "all_reduce", "barrier", "broadcast", "rank", "share", "total", "world_size"]

T = TypeVar("T")


def world_size() -> int:
    """Number of processes, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def share(batches: Sequence[T]) -> Sequence[T]:
    """This process's part of `batches`: every `world_size`-th.

    Raises:
        ValueError: fewer batches than processes.
    """
    size = world_size()
    if size > 1 and len(batches) < size:
        raise ValueError(
            f"batches: must be at least one for each of the {size} processes, got {len(batches)}; pass more "
            "batches, or start fewer processes"
        )
    return batches[rank() :: size] if size > 1 else batches


def all_reduce(
    layers: Sequence[WeightSite], statistics: dict[str, Any], statistic: type[Statistic]
) -> dict[str, Any]:
    """The statistics over all processes' shares, the same in every process; `statistics` is used up.

    A layer that ran in other processes only (an expert that no token here chose) counts as zeros.
    """
    if world_size() == 1:
        return statistics
    leaders: dict[int, str] = {}
    mine = {name: leaders.setdefault(id(found), name) for name, found in statistics.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(world_size())]
    dist.all_gather_object(everyone, mine)
    ran = {name for theirs in everyone for name in theirs}
    # Layers that read one tensor share a statistic, which must then be added up once. Processes that do not agree on
    # who shares (an expert ran in some of them) take each layer for itself.
    agreed = all(theirs == mine for theirs in everyone)
    agreed = _sum_integer(int(agreed)) == world_size()
    reduced: dict[str, Any] = {}
    for layer in layers:
        name = layer.name
        if name not in ran:
            continue  # the caller reports it
        if agreed and mine[name] in reduced:
            reduced[name] = reduced[mine[name]]
            continue
        found = statistics.get(name)
        if found is None:
            found = statistic(layer.in_features, layer.weight.device)
        elif not agreed:
            found = copy.deepcopy(found)
        for _, value in sorted(vars(found).items()):
            if isinstance(value, Tensor):
                dist.all_reduce(value)
        found.tokens = _sum_integer(found.tokens)
        reduced[name] = found
    return reduced


def _sum_integer(value: int) -> int:
    total = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def broadcast(tensor: Tensor, source: int) -> None:
    """Everyone's `tensor` becomes that of process `source`; nothing to do for one process."""
    if world_size() > 1:
        dist.broadcast(tensor, source)


def total(value: float) -> float:
    """The sum of everyone's `value`."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Everyone's gradients become their sum; a missing one counts as zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        dist.barrier()
