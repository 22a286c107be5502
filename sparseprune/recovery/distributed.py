"""Recovery on several processes, as `torchrun` and `accelerate launch` start them: data parallelism, by torch's DDP."""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "processes"]


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
            distributed.all_reduce(values)
        return values

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's value, in each: clocks differ, and all must stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.broadcast(shared, src=0)
        return float(shared)


def processes(device: torch.device) -> Processes:
    """The process group that is there, or else the one that `WORLD_SIZE` in the environment asks for (torch's env://).

    A group made here, of gloo on a CPU and NCCL on a GPU, lasts until the interpreter ends: torchrun's store keeps the
    addresses of the first, and a second would wait for them.
    """
    if not distributed.is_available():
        return Processes()
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_end)
    return Processes(distributed.get_rank(), distributed.get_world_size())


def _end() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
