"""Several processes, as `torchrun` and `accelerate launch` start them: who is who, what each reads, what is added up.

Calibration: every process is given the same batches, reads its share, and sums are added up. Training: data parallelism,
by torch's DDP. One process alone needs no process group.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Processes",
    "add_gradients",
    "barrier",
    "broadcast",
    "join",
    "mean",
    "rank",
    "share",
    "total",
    "total_integer",
    "world_size",
]

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


def total_integer(value: int) -> int:
    """The sum of everyone's `value`, a whole number; one process has a group here or none."""
    if world_size() == 1:
        return value
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


def mean(value: float) -> float:
    """The mean of everyone's `value`."""
    return total(value) / world_size()


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


@dataclass(frozen=True)
class Processes:
    """This process's place among `world` that train one model together; one alone needs no process group."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Which of a step's `total` samples this process reads.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if total % self.world:
            raise ValueError(
                f"batch: must be a multiple of the number of processes, {self.world}, got {total}; pass "
                f"batch={max(1, round(total / self.world)) * self.world}"
            )
        size = total // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose `backward` averages gradients over the processes."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module)

    def unsynchronised(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around all but the last backward pass of a step: only that one has to exchange gradients."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor, the same in each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's value, in each: clocks differ, and all must stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared)


def join(device: torch.device) -> Processes:
    """The process group that is there, or else the one that `WORLD_SIZE` in the environment asks for (torch's env://).

    A group made here, of gloo on a CPU and NCCL on a GPU, lasts until the interpreter ends: torchrun's store keeps the
    addresses of the first, and a second would wait for them.
    """
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_end)
    return Processes(rank(), world_size())


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
