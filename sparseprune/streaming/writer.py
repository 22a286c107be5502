"""Sparse shards: a pruned block goes to the disk as one safetensors file in our checkpoint format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprune.io.checkpoint import weight_source
from sparseprune.io.safetensors import TensorInfo, TensorSource, write
from sparseprune.io.shards import INDEX_FILE, shard_name
from sparseprune.models.notes import recall
from sparseprune.models.sites import WeightSite
from sparseprune.streaming.source import StreamedModel
from sparseprune.streaming.state import flush_folder, replace_file
from sparseprune.weights.choose import Candidate, Choice, options_for, smallest
from sparseprune.weights.format import Format
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import WeightSpec

__all__ = ["write_block", "write_index", "write_rest"]


def write_block(
    folder: Path,
    shard: tuple[int, int],
    streamed: StreamedModel,
    name: str,
    layers: Sequence[WeightSite],
    form: Format | None,
    header: dict[str, str],
) -> tuple[str, list[TensorInfo], list[Choice]]:
    """Writes the block `name`, which is in memory, as shard (number, of so many); `layers` are its pruned ones.

    Memory: the canonical form of one layer at a time.

    Returns:
        the file's name, what is in it, and what each pruned layer is held in.
    """
    pruned = {f"{layer.name}.weight": layer for layer in layers}
    state = streamed.model.state_dict(keep_vars=True)
    sources, choices = [], []
    for key in streamed.names(name):
        layer = pruned.get(key)
        candidate = None
        if layer is not None:
            choice = smallest(options_for(layer.weight, form, recall(layer)))
            choices.append(choice)
            candidate = choice.candidate
        if layer is None or candidate is None:
            sources.append(TensorSource([streamed.info(key)], partial(list, [state[key]])))
        else:
            sources.append(_sparse_source(key, layer, candidate))
    return *_write(folder, shard, sources, header), choices


def write_rest(
    folder: Path,
    shard: tuple[int, int],
    streamed: StreamedModel,
    blocks: Iterable[str],
    header: dict[str, str],
    progress: Callable[[int], None] | None = None,
) -> tuple[str, list[TensorInfo]]:
    """Copies what is outside of the blocks, from file to file, in parts of 16 MiB."""
    prefixes = tuple(f"{block}." for block in blocks)
    sources = []
    for key in streamed.names(""):
        if not key.startswith(prefixes):
            info = streamed.info(key)
            sources.append(TensorSource([info], partial(_copied, streamed, key, info.dtype)))
    return _write(folder, shard, sources, header, progress)


def write_index(folder: Path, weight_map: dict[str, str], nbytes: int, metadata: Mapping[str, str]) -> None:
    """Writes the index, which makes the shards in `folder` a checkpoint; `metadata` is of all of them together."""
    index: dict[str, Any] = {"metadata": {"total_size": nbytes, **metadata}, "weight_map": weight_map}
    replace_file(folder / INDEX_FILE, json.dumps(index, indent=2).encode())


def _copied(streamed: StreamedModel, key: str, dtype: torch.dtype) -> list[Iterable[Tensor]]:
    return [streamed.source.parts(streamed.keys[key], dtype)]


def _sparse_source(key: str, layer: WeightSite, candidate: Candidate) -> TensorSource:
    weight = layer.weight
    form = candidate.format
    spec = WeightSpec((weight.shape[0], weight.shape[1]), weight.dtype, form)
    return weight_source(key, spec, candidate.nnz, lambda: SparseWeight.from_dense(layer.weight, form))


def _write(
    folder: Path,
    shard: tuple[int, int],
    sources: Sequence[TensorSource],
    header: dict[str, str],
    progress: Callable[[int], None] | None = None,
) -> tuple[str, list[TensorInfo]]:
    name = shard_name(*shard)
    aside = folder / f".{name}.new"
    write(aside, sources, header, progress)
    os.replace(aside, folder / name)
    flush_folder(folder)
    return name, [info for source in sources for info in source.infos]
