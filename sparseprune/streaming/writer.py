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

from sparseprune.io.safetensors import TensorInfo, TensorSource, write
from sparseprune.io.shards import INDEX_FILE, shard_name
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Target
from sparseprune.pruning.patterns import Pattern
from sparseprune.streaming.source import StreamedModel
from sparseprune.streaming.state import flush_folder, replace_file
from sparseprune.weights.sparse_weight import DTYPES, SPEC_FIELDS, Format, SparseWeight

__all__ = ["choose_format", "write_block", "write_index", "write_rest"]

# bits a weight on the disk: 1 of mask and `density` values in either; packed, CSR is the smaller one below this
_CSR_DENSITY = 0.06
_MAX_M = 32  # of the N:M formats


def choose_format(weight: Tensor, pattern: Pattern, form: Format | None) -> Format | None:
    """The format for `weight` [out, in], pruned to `pattern`; None if it stays dense. Nothing is measured.

    `form`: only this one, where it fits; by default N:M for its pattern, else bitmap or CSR by the density, or dense
    where neither would be smaller.
    """
    if weight.dtype not in DTYPES:
        return None
    if form is not None:
        return form if form.misfit(weight) is None else None
    if pattern.structured and pattern.m <= _MAX_M:
        return Format("nm", pattern.n, pattern.m)
    density = int(weight.count_nonzero()) / max(1, weight.numel())
    if 1 - density <= 1 / (8 * weight.dtype.itemsize):  # the mask's bit a weight is more than the zeros save
        return None
    return Format("csr" if density < _CSR_DENSITY else "bitmap")


def write_block(
    folder: Path,
    shard: tuple[int, int],
    streamed: StreamedModel,
    name: str,
    layers: Sequence[WeightSite],
    targets: Mapping[str, Target],
    form: Format | None,
    header: dict[str, str],
) -> tuple[str, list[TensorInfo], list[str]]:
    """Writes the block `name`, which is in memory, as shard (number, of so many); `layers` are its pruned ones.

    Memory: the canonical form of one layer at a time.

    Returns:
        the file's name, what is in it, and the format of each pruned layer ("dense" where none fits).
    """
    pruned = {f"{layer.name}.weight": layer for layer in layers}
    state = streamed.model.state_dict(keep_vars=True)
    sources, formats = [], []
    for key in streamed.names(name):
        layer = pruned.get(key)
        chosen = None if layer is None else choose_format(layer.weight, targets[layer.name].pattern, form)
        if layer is not None:
            formats.append("dense" if chosen is None else str(chosen))
        if layer is None or chosen is None:
            sources.append(TensorSource([streamed.info(key)], partial(list, [state[key]])))
        else:
            sources.append(_sparse_source(key, layer, chosen))
    return *_write(folder, shard, sources, header), formats


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


def write_index(folder: Path, weight_map: dict[str, str], nbytes: int) -> None:
    """Writes the index, which makes the shards in `folder` a checkpoint."""
    index: dict[str, Any] = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    replace_file(folder / INDEX_FILE, json.dumps(index, indent=2).encode())


def _copied(streamed: StreamedModel, key: str, dtype: torch.dtype) -> list[Iterable[Tensor]]:
    return [streamed.source.parts(streamed.keys[key], dtype)]


def _sparse_source(key: str, layer: WeightSite, form: Format) -> TensorSource:
    weight = layer.weight
    rows, cols = weight.shape
    nnz = rows * (cols // form.m) * form.n if form.kind == "nm" else int(weight.count_nonzero())
    infos = [
        TensorInfo(f"{key}.values", weight.dtype, (nnz,)),
        TensorInfo(f"{key}.mask", torch.uint8, (rows, -(-cols // 8))),
        TensorInfo(f"{key}.spec", torch.int64, (len(SPEC_FIELDS),)),
    ]

    def make() -> list[Tensor]:
        sparse = SparseWeight.from_dense(layer.weight, form)
        return [sparse.values, sparse.mask, sparse.spec]

    return TensorSource(infos, make)


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
