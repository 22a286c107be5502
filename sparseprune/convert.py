"""`sparsify()`: which of a model's pruned linears become sparse, and the swap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparseprune.kernels.native import isa
from sparseprune.measure.benchmark import bytes_past_caches, describe_device, speedups_of, time_layer
from sparseprune.models.notes import recall
from sparseprune.models.sites import WeightSite, dense_again, find_sites
from sparseprune.options import Layers
from sparseprune.report import Column, Report, Table, alike, human_bytes, track
from sparseprune.weights.choose import Choice, Options, fastest, options_for, smallest
from sparseprune.weights.format import Format
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.options import Conversion

__all__ = ["LayerSparsified", "SparsifyReport", "sparsify"]

_SECONDS = 20.0
_BUCKET = 0.05  # layers of one shape share a measurement if their sparsity is this close


@dataclass(frozen=True)
class LayerSparsified:
    """What became of a layer. `format` is None where it stayed dense, and `reason` says why in either case."""

    name: str
    shape: tuple[int, int]
    dtype: str
    sparsity: float
    format: str | None
    bytes_before: int
    bytes_after: int
    reason: str
    speedups: dict[int, float]
    """Dense time over sparse time by batch size; empty where nothing was measured."""


@dataclass(frozen=True)
class SparsifyReport(Report):
    """What `sparsify` did, layer by layer; `print(report)` shows it as a table, like layers in one row."""

    layers: tuple[LayerSparsified, ...]
    policy: str
    batches: tuple[int, ...]
    isa: str
    threads: int
    measured_on: str = ""
    """The processors whose times decided: the CPU's threads and kernels, the name of a GPU."""

    @property
    def swapped(self) -> int:
        """Number of layers that are sparse now."""
        return sum(layer.format is not None for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same layers' weights now, those that stayed dense among them."""
        return sum(layer.bytes_after for layer in self.layers)

    def table(self, full: bool = False) -> Table:
        """One row for layers that differ in a number of their name only; `full` for a row each."""
        columns = [
            Column("layers", value=lambda it: it.name),
            Column("count", value=lambda it: len(it.members)),
            Column("shape", value=lambda it: it.first.shape),
            Column("sparsity", ".1%", lambda it: it.mean(lambda layer: layer.sparsity)),
            Column("format", value=lambda it: it.first.format or "dense"),
            Column("before", human_bytes, lambda it: it.total(lambda layer: layer.bytes_before)),
            Column("after", human_bytes, lambda it: it.total(lambda layer: layer.bytes_after)),
            *(_speed_column(batch) for batch in self.batches if self.policy == "auto"),
            Column("why", value=lambda it: it.first.reason),
        ]
        groups = alike(self.layers, lambda it: (it.shape, it.format, it.reason), full)
        share = self.bytes_after / max(1, self.bytes_before)
        footer = [
            f"{self.swapped} of {len(self.layers)} layers are sparse; their weights took "
            f"{human_bytes(self.bytes_before)} and take {human_bytes(self.bytes_after)} ({share:.2f})"
        ]
        if self.policy == "auto":
            footer.append(f"speed-up: dense time over sparse time here, {self.measured_on}")
        return Table.of("Sparse layers", columns, groups, footer)


def _speed_column(batch: int) -> Column:
    return Column(
        f"speed-up, batch {batch}", ".2f", lambda it: it.mean(lambda layer: layer.speedups.get(batch))
    )


def sparsify(
    model: nn.Module,
    format: str | Format = "auto",
    *,
    policy: Literal["auto", "always"] = "auto",
    batch: int | Iterable[int] | None = None,
    seconds: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    progress: bool = False,
) -> SparsifyReport:
    """Swap the pruned linears (`nn.Linear`, transformers' `Conv1D`) of a model for `SparseLinear`, in place.

    Args:
        format: "2:4" (any "N:M"), "bitmap", "csr"; "auto" takes the N:M that `prune` pruned to, or that a model of
            somebody else has in its weights, else bitmap or CSR, whichever is faster (under policy "always": smaller).
        policy: "auto" times dense against sparse for each distinct shape, dtype, format and sparsity, and leaves a
            layer dense where dense is faster at any of the batch sizes. "always" swaps every layer whose weight
            the format can hold, and measures nothing.
        batch: the batch sizes (rows of activations: 1, the default, for decoding) that count, one or several.
        seconds: to spend on measuring, about, over the whole model; by default 20.
        include, exclude, lm_head: which layers, see `sparseprune.models.sites.find_sites`. Weights shared by several
            layers are left alone.
        progress: show bars on stderr.

    At any time the dense and the packed weights of one layer at most exist side by side (while measuring: copies of one
    layer, 64 MiB of dense ones; on a GPU twice its L2 cache, if that is more).

    Raises:
        ValueError: an argument out of range or without a meaning beside the others, a model without linear layers.
    """
    batches = Conversion(format, policy=policy, batch=batch, seconds=seconds).batches
    form = None if format == "auto" else Format.parse(format)
    seconds = _SECONDS if seconds is None else seconds
    chosen = Layers(include, exclude, lm_head)
    layers = find_sites(model, **vars(chosen))
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to convert under {chosen}; {dense_again(model)}"
        )
    options = {
        layer.name: options_for(layer.weight, form, recall(layer))
        for layer in track(layers, "looking at the weights", enabled=progress)
    }
    choices = {layer.name: Choice(None, layer.stays) for layer in layers if layer.stays is not None}
    choices |= _choose(layers, options, batches, policy, seconds, progress)
    devices = dict.fromkeys(layer.weight.device for layer in layers)
    layers.reverse()
    # Popped, not iterated over: a layer that was swapped must not live on in a list.
    rows = [
        _convert(model, layers.pop(), options, choices)
        for _ in track(range(len(layers)), "to sparse layers", enabled=progress)
    ]
    measured_on = ", ".join(map(describe_device, devices))
    return SparsifyReport(
        tuple(rows),
        policy=policy,
        batches=batches,
        isa=isa(),
        threads=torch.get_num_threads(),
        measured_on=measured_on,
    )


def _choose(
    layers: Sequence[WeightSite],
    options: Mapping[str, Options],
    batches: tuple[int, ...],
    policy: str,
    seconds: float,
    progress: bool,
) -> dict[str, Choice]:
    """What becomes of each layer that a sparse one can take the place of."""
    free = [layer for layer in layers if layer.stays is None]
    if policy == "always":
        return {layer.name: smallest(options[layer.name]) for layer in free}
    return _measured(free, options, batches, seconds, progress)


def _measured(
    layers: Sequence[WeightSite],
    options: Mapping[str, Options],
    batches: tuple[int, ...],
    seconds: float,
    progress: bool,
) -> dict[str, Choice]:
    """The fastest form of each layer, or none, by measuring one layer of each kind."""
    kinds: dict[Any, list[WeightSite]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer, options[layer.name]), []).append(layer)
    model_bytes = sum(layer.weight.nbytes for layer in layers)
    timed = [like for like in kinds.values() if options[like[0].name].candidates]
    share = seconds / max(1, len(timed))
    speedups: dict[str, Mapping[Format, Mapping[int, float]]] = {}
    for like in track(timed, "timing dense against sparse", enabled=progress):
        formats = options[like[0].name].formats
        timings = time_layer(
            like[0].module,
            formats,
            batches,
            seconds=min(share, 0.5 * len(batches)),
            rotated_bytes=min(model_bytes, bytes_past_caches(like[0].weight.device)),
        )
        speedups.update(dict.fromkeys([layer.name for layer in like], speedups_of(formats, timings)))
    return {layer.name: fastest(options[layer.name], speedups.get(layer.name, {})) for layer in layers}


def _kind(layer: WeightSite, options: Options) -> Any:
    """Layers of one kind are as fast as each other."""
    bucket = round(options.sparsity / _BUCKET)
    return (
        options.formats,
        options.shape,
        options.dtype,
        bucket,
        type(layer.module),
        layer.bias is None,
        layer.weight.device,
    )


def _convert(
    model: nn.Module, layer: WeightSite, options: Mapping[str, Options], choices: Mapping[str, Choice]
) -> LayerSparsified:
    found, choice = options[layer.name], choices[layer.name]
    before = after = layer.weight.nbytes
    if choice.format is not None:
        sparse = SparseLinear.from_dense(layer.module, choice.format)
        after = sparse.nbytes
        layer.replace(model, sparse)
    return LayerSparsified(
        layer.name,
        shape=found.shape,
        dtype=str(found.dtype).removeprefix("torch."),
        sparsity=found.sparsity,
        format=None if choice.format is None else str(choice.format),
        bytes_before=before,
        bytes_after=after,
        reason=choice.reason,
        speedups=choice.speedups,
    )
