"""How fast is a layer on this machine, dense and in one sparse format or another?

Everything is measured in pairs: the candidates take turns, call by call, so that a busy moment of the machine hits
all of them, and lower quartiles are compared: what else runs can only add time. A layer that the cache would hold is
timed over several copies of its weight, as the layers of a model push each other out.

A layer on a GPU is timed there, by events around several calls in a row: the rate at which a model's layers would
follow each other, the cost of asking for them included.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparseprune import clock
from sparseprune.kernels.native import isa
from sparseprune.measure.evaluate import PROMPT, SpeedResult, decode_speed, prompt_speed
from sparseprune.models.modules import max_length
from sparseprune.models.notes import recall
from sparseprune.models.sites import find_sites, site_of
from sparseprune.report import Column, Report, Table, track
from sparseprune.weights.choose import best_of, options_for
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.options import Conversion

__all__ = [
    "KindTiming", "LayerTiming", "ModelTiming", "alternating_quartiles", "bytes_past_caches",
    "describe_device", "speedups_of", "time_layer", "time_model",
]  # fmt: skip

ROTATED_BYTES = 64 << 20
"""Copies of a weight are made up to this size in all: more than the caches near a core, less than a model."""

_MAX_COPIES = 64
_MIN_ROUNDS = 5
_MAX_ROUNDS = 400
_CUDA_CALLS = 8  # between two events, which cost as much as a small layer


@dataclass(frozen=True)
class LayerTiming:
    """Lower quartiles of one layer at one batch size: dense, and in each form by name ("2:4", "dense int4")."""

    batch: int
    dense_seconds: float
    sparse_seconds: Mapping[str, float]

    def speedup(self, format: str | Format) -> float:
        """Dense time over sparse time."""
        return self.dense_seconds / self.sparse_seconds[str(format)]


def alternating_quartiles(
    candidates: Mapping[str, Sequence[Callable[[], Any]]],
    seconds: float,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Lower quartile of the seconds a call of each candidate takes, a candidate being calls that do the same work on different memory.

    One call of each candidate in turn (on a CUDA device several), then the next copy; at least 5 rounds, at most 400,
    else for about `seconds`.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    per_turn, measure = (
        (_CUDA_CALLS, functools.partial(_event_seconds, device)) if on_gpu else (1, _host_seconds)
    )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for calls in candidates.values():
        for call in calls[:2]:
            call()
    stop, rounds = clock.now() + seconds, 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and clock.now() < stop):
        for name, calls in candidates.items():
            first = rounds * per_turn
            times[name].append(measure([calls[(first + i) % len(calls)] for i in range(per_turn)]))
        rounds += 1
    return {name: sorted(values)[len(values) // 4] for name, values in times.items()}


def _host_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    (call,) = calls
    begin = clock.now()
    call()
    return clock.now() - begin


def _event_seconds(device: torch.device, calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds a call, of calls that follow each other on the current stream of a CUDA device.

    Every turn begins with an idle device, so that none hides its launches behind the turn before it.
    """
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)


def bytes_past_caches(device: torch.device | str) -> int:
    """How many bytes of copies push each other out of the device's caches: `ROTATED_BYTES`, or twice the L2 of a GPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return ROTATED_BYTES
    return max(ROTATED_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def describe_device(device: torch.device | str) -> str:
    """What a timing was made on: the GPU's name, or the CPU's threads and kernels."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {isa()} kernels"


def speedups_of(formats: Sequence[Format], timings: Sequence[LayerTiming]) -> dict[Format, dict[int, float]]:
    """Dense time over sparse time by format and batch size, as `sparseprune.weights.choose.fastest` takes them."""
    return {form: {timing.batch: timing.speedup(form) for timing in timings} for form in formats}


@torch.no_grad()
def time_layer(
    linear: nn.Module,
    formats: Sequence[str | Format],
    batches: Sequence[int] = (1,),
    *,
    seconds: float = 0.5,
    rotated_bytes: int | None = None,
    encoding: str | Encoding = PLAIN,
) -> list[LayerTiming]:
    """Time an `nn.Linear` (or transformers' `Conv1D`) against its sparse twins where it lies, one result per batch size.

    Args:
        formats: those to try; the weight must fit each of them.
        seconds: to spend, about, over all batch sizes together.
        rotated_bytes: how much memory the copies of the dense weight may take, by default `bytes_past_caches`; below
            the weight's own size there is one copy, and the layer is timed in whatever cache holds it.
        encoding: of the sparse twins' values; a twin's name is its spec's, such as "2:4" or "dense int4".
    """
    weight = site_of(linear).weight
    if rotated_bytes is None:
        rotated_bytes = bytes_past_caches(weight.device)
    copies = max(1, min(_MAX_COPIES, math.ceil(rotated_bytes / max(1, weight.nbytes))))
    modules = {"dense": _copies(linear, copies)}
    for form in formats:
        twin = SparseLinear.from_dense(linear, form, encoding)
        modules[str(twin.spec)] = _copies(twin, copies)
    timings = []
    for batch in batches:
        x = torch.randn(batch, weight.shape[1]).to(weight.device, weight.dtype)
        # forward(), not the module: hooks of the user's are not part of a layer's price
        calls = {name: [functools.partial(it.forward, x) for it in its] for name, its in modules.items()}
        quartiles = alternating_quartiles(calls, seconds / len(batches), weight.device)
        timings.append(LayerTiming(batch, quartiles.pop("dense"), quartiles))
    return timings


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


@dataclass(frozen=True)
class KindTiming:
    """The layers of one shape, dtype, sparsity and kind of values: how many, and the timings of one of them.

    `format` is the name of the form in which they are fastest, or which they have: "2:4", "dense int4"; None where they are
    plain and dense.
    """

    example: str
    count: int
    shape: tuple[int, int]
    dtype: str
    sparsity: float
    format: str | None
    timings: tuple[LayerTiming, ...]


COLUMNS = (
    Column("example", value=lambda it: it[0].example),
    Column("count", value=lambda it: it[0].count),
    Column("shape", value=lambda it: it[0].shape),
    Column("dtype", value=lambda it: it[0].dtype),
    Column("sparsity", ".1%", lambda it: it[0].sparsity),
    Column("format", value=lambda it: it[0].format or "dense"),
    Column("batch", value=lambda it: it[1].batch),
    Column("dense, us", ".1f", lambda it: it[1].dense_seconds * 1e6),
    Column("sparse, us", ".1f", lambda it: it[0].format and it[1].sparse_seconds[it[0].format] * 1e6),
    Column("speed-up", ".2f", lambda it: it[0].format and it[1].speedup(it[0].format)),
)
"""What a row shows, of a kind and one of its timings."""


@dataclass(frozen=True)
class ModelTiming(Report):
    """What `time_model` measured; `print(report)` shows tables."""

    kinds: tuple[KindTiming, ...]
    decode: SpeedResult | None
    prompt: SpeedResult | None
    machine: str

    def table(self) -> Table:
        """One row for each kind of layer and batch size."""
        footer = [str(speed) for speed in (self.decode, self.prompt) if speed is not None]
        rows = [(kind, timing) for kind in self.kinds for timing in kind.timings]
        title = "Dense against sparse, lower quartiles of calls in turn"
        return Table.of(title, COLUMNS, rows, [*footer, self.machine])


def time_model(
    model: nn.Module,
    format: str | Format = "auto",
    *,
    batch: int | Iterable[int] = 1,
    seconds: float = 20.0,
    tokens: bool = True,
    progress: bool = False,
) -> ModelTiming:
    """Time each kind of linear of a model, dense against sparse, and the model's tokens per second.

    Sparse and quantized layers are timed in the form they have, pruned dense ones in `format` (or the best that "auto" finds),
    others dense only.

    Args:
        batch: the batch sizes (rows of activations), one or several.
        seconds: to spend on the layers, about.
        tokens: False leaves the whole model out, which must be a causal language model otherwise.
    """
    batches = Conversion(format, batch=batch, seconds=seconds).batches
    if tokens and not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"tokens: needs a causal language model of transformers, {type(model).__name__} is not one; pass tokens=False"
        )
    form = None if format == "auto" else Format.parse(format)
    linears = _linears(model)
    if form is not None and all(isinstance(module, SparseLinear) for _, module in linears):
        raise ValueError(
            f"format: is for dense layers, and the model's {len(linears)} linears have a form of their own, got {format}; "
            "leave it out"
        )
    groups: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, module in linears:
        groups.setdefault(_kind(module, form), []).append((name, module))
    kinds = []
    share = seconds / max(1, len(groups))
    for kind, members in track(list(groups.items()), "timing layers", enabled=progress):
        formats, shape, dtype, zeros, encoding, _ = kind
        name, module = members[0]
        dense = module.to_dense() if isinstance(module, SparseLinear) else module
        timings = tuple(
            time_layer(dense, formats, batches, seconds=min(share, 0.5 * len(batches)), encoding=encoding)
        )
        best = None
        if formats:
            best = best_of(
                {
                    it: {timing.batch: timing.speedup(it) for timing in timings}
                    for it in timings[0].sparse_seconds
                }
            )
        kinds.append(
            KindTiming(
                name,
                count=len(members),
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                sparsity=zeros,
                format=best,
                timings=timings,
            )
        )
    decode = prompt = None
    if tokens:
        limit = max_length(model)
        length = PROMPT if limit is None else min(PROMPT, limit)
        both: list[Callable[[nn.Module], SpeedResult]] = [decode_speed, lambda it: prompt_speed(it, length)]
        measures = track(both, "tokens per second", enabled=progress)
        decode, prompt = (measure(model) for measure in measures)
    devices = dict.fromkeys(kind[-1] for kind in groups) or ["cpu"]
    machine = ", ".join([*map(describe_device, devices), f"torch {torch.__version__}"])
    return ModelTiming(tuple(kinds), decode, prompt, machine)


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    dense = {layer.name for layer in find_sites(model) if layer.stays is None or layer.module is model}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) or name in dense
    ]


def _kind(module: nn.Module, form: Format | None) -> Any:
    if isinstance(module, SparseLinear):
        return (
            (module.format,),
            (module.out_features, module.in_features),
            module.dtype,
            round(module.sparsity, 2),
            module.encoding,
            module.packed.device,
        )
    site = site_of(module)
    options = options_for(site.weight, form, recall(site))
    zeros = round(options.sparsity, 2)
    return options.formats, options.shape, options.dtype, zeros, PLAIN, site.weight.device
