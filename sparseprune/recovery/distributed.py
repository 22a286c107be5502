"""Recovery on several processes, as `torchrun` and `accelerate launch` start them: data parallelism, by torch's DDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The process group that is there, or the one that `WORLD_SIZE` in the environment asks for (env:// of torch).

    A group made here is taken down at the end; gloo on the CPU, NCCL on a GPU.
    """
    if not distributed.is_available():
        yield Processes()
        return
    made = False
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        made = True
    try:
        if distributed.is_initialized():
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        else:
            yield Processes()
    finally:
        if made:
            distributed.destroy_process_group()
