"""What a stream will need, from shapes alone: memory and disk, checked before the long work starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparseprune.memory import available_memory, resident_memory, room_under_ulimit
from sparseprune.models.batches import Batch
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method
from sparseprune.report import human_bytes
from sparseprune.streaming.batches import token_counts
from sparseprune.streaming.source import StreamedModel

__all__ = ["Needs", "check_disk", "check_memory", "needs_of"]

# float32 copies of the layer being pruned, at the worst moment: weight and scores or result, the mask, and what sorting
# takes. A solver has one more.
_LAYER_COPIES = 2.5
# copies of a statistic's largest tensor in a solver: damped, factored, inverted
_STATISTIC_COPIES = 3


@dataclass(frozen=True)
class Needs:
    """Bytes, at least: `block` the weights of the largest block, `layer` the work on its largest layer, `statistics` of
    its layers, `forward` one batch on its way through it, `rest` what runs before the first block. `activations`: the
    hidden states of all batches, in memory or on the disk.
    """

    block: int
    layer: int
    statistics: int
    forward: int
    rest: int
    activations: int

    @property
    def memory(self) -> int:
        """What must be in memory at once, activations not counted: reading in, or working on a block."""
        return max(self.block + max(self.statistics + self.layer, self.forward), self.rest)

    def __str__(self) -> str:
        parts = {
            "the largest block": self.block,
            "its statistics": self.statistics,
            "work on its largest layer": self.layer,
        }
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())


def needs_of(
    streamed: StreamedModel,
    blocks: Sequence[str],
    layers: Sequence[WeightSite],
    method: Method,
    batches: Sequence[Batch],
    rest: Sequence[str],
) -> Needs:
    """`rest`: the tensors that what runs before the blocks keeps in memory."""
    tokens = token_counts(batches) if method.statistic is not None else []
    total, largest = sum(tokens), max(tokens, default=0)
    width = _hidden_size(streamed)
    size = streamed.model.dtype.itemsize
    block = layer = statistics = forward = 0
    for name in blocks:
        inside = [it for it in layers if it.name.startswith(f"{name}.")]
        block = max(block, streamed.nbytes(streamed.names(name)))
        layer = max([layer, *(_layer_bytes(it, method) for it in inside)])
        statistics = max(statistics, _statistics_bytes(inside, method))
        outputs = sum(it.out_features for it in inside)
        forward = max(forward, largest * (outputs + 4 * width) * size)
    first = streamed.nbytes(streamed.names(blocks[0])) if largest else 0
    return Needs(block, layer, statistics, forward, first + streamed.nbytes(list(rest)), total * width * size)


def check_memory(needs: Needs, limit: int | None) -> int:
    """How many bytes of activations may stay in memory under `limit`, by default three quarters of what is available.

    Raises:
        ValueError: the limit cannot hold a block and the work on it.
    """
    resident = resident_memory()
    if limit is None:
        available = available_memory()
        limit = resident + (available * 3 // 4 if available is not None else 2 * needs.memory)
    room = limit - resident - needs.memory
    if room < 0:
        raise ValueError(
            f"memory: must be at least {human_bytes(resident + needs.memory)} for this model, got "
            f"{human_bytes(limit)}: {needs}, and {human_bytes(resident)} that the program takes already; raise the "
            "limit, or choose a method with a smaller statistic (wanda)"
        )
    allowed = room_under_ulimit()
    if allowed is not None:
        if allowed < needs.memory:
            raise ValueError(
                f"memory: {human_bytes(needs.memory)} are needed at once ({needs}), ulimit leaves {human_bytes(allowed)}; "
                "raise ulimit -v and -d"
            )
        room = min(room, allowed - needs.memory)
    # a block may read from one store and fill another, and the estimate is a lower bound
    return room // 3


def check_disk(wanted: dict[Path, int]) -> None:
    """Whether each folder's disk has room; folders on one disk share it.

    Raises:
        OSError: one has not.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in wanted.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        device = os.stat(existing).st_dev
        first, so_far = disks.get(device, (existing, 0))
        disks[device] = (first, so_far + size)
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(
                f"no space: {folder} has {human_bytes(free)} free, the shards and the activations need about "
                f"{human_bytes(size)}; free some, or name a spill folder on another disk"
            )


def _layer_bytes(layer: WeightSite, method: Method) -> int:
    copies = _LAYER_COPIES + (1 if method.changes_weights else 0)
    size = int(copies * 4) * layer.in_features * layer.out_features
    return size + _STATISTIC_COPIES * max(_tensor_bytes(layer, method), default=0)


def _statistics_bytes(layers: Sequence[WeightSite], method: Method) -> int:
    # Layers of one parent and width mostly read one tensor (query, key and value; gate and up), and share.
    if method.statistic is None:
        return 0
    shared = {(layer.name.rpartition(".")[0], layer.in_features): layer for layer in layers}
    return sum(sum(_tensor_bytes(layer, method)) for layer in shared.values())


def _tensor_bytes(layer: WeightSite, method: Method) -> list[int]:
    """Of each tensor of the layer's statistic."""
    if method.statistic is None:
        return []
    empty = method.statistic.of(layer, torch.device("meta"))
    return [it.nbytes for it in vars(empty).values() if isinstance(it, Tensor)]


def _hidden_size(streamed: StreamedModel) -> int:
    weight = streamed.model.get_input_embeddings().weight
    return int(weight.shape[-1])
