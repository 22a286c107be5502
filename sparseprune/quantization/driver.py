"""`quantize()`: linears become layers of int8 or int4 codes, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData, as_data
from sparseprune.kernels import ops
from sparseprune.kernels.packing import CODES
from sparseprune.models.batches import Batch
from sparseprune.models.notes import recall
from sparseprune.models.sites import WeightSite, dense_again, find_sites
from sparseprune.options import Layers
from sparseprune.pruning.base import Method, Pruned, Target
from sparseprune.pruning.job import Job
from sparseprune.pruning.options import Reconstruction
from sparseprune.pruning.patterns import Pattern
from sparseprune.pruning.report import BlockReconstructed
from sparseprune.pruning.sequential import BlockRun
from sparseprune.quantization.embedding import embedding_codes, no_kernels
from sparseprune.quantization.methods import METHODS, QuantizationMethod
from sparseprune.quantization.options import Quantization
from sparseprune.quantization.report import LayerQuantized, QuantizeReport, error_of
from sparseprune.statistics.overlap import remember
from sparseprune.weights.choose import smallest_codes
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.gguf import StoredCodes
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.quantizer import TrainedCodes
from sparseprune.weights.rounding import check_scales
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import WeightSpec

__all__ = ["RECONSTRUCTION", "Encoded", "Made", "encode_layers", "quantize", "solver_for"]

RECONSTRUCTION = Reconstruction(learning_rate=0.01)
"""Of blocks of codes: pruned ones stand three times the learning rate; here it undid what GPTQ had found (SmolLM2-135M)."""


def quantize(
    model: nn.Module,
    encoding: Literal["int4", "int4_minimum", "int8"] = "int4",
    method: Literal["auto", "nearest", "gptq"] = "auto",
    *,
    group_size: Literal[32, 64, 128] = 64,
    scale_dtype: Literal["float16", "bfloat16"] = "float16",
    calibration: CalibrationData | Iterable[Batch] | None = None,
    keep: str | Path | None = None,
    embeddings: Literal["int4", "int8"] | None = None,
    reconstruction: Reconstruction | bool | None = None,
    minutes: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    progress: bool = False,
) -> QuantizeReport:
    """Swaps a model's linears for `SparseLinear` layers of int8 or int4 codes, in place.

    A linear that was pruned becomes sparse codes, of the N:M that its zeros follow or a bitmap, where they take fewer bytes: in int4
    (groups of 64, float16 scales) 3.25 bits a weight in 2:4 or with half of the weights anywhere. Any other becomes dense ones, and
    on a GPU, whose kernels are for dense and 2:4, any but 2:4: 4.25 bits, in which zeros stay zeros but are stored (int4_minimum has no code for 0: the report says how many weights
    were). The model computes in the dtype it has.

    Args:
        encoding: "int8"; "int4"; "int4_minimum", int4 with a minimum for each group, for dense weights (sparse ones become
            int4).
        method: "gptq" makes up for each rounding in the weights that are left, block by block, and needs `calibration`;
            "nearest" rounds. "auto": gptq where there is calibration data and fewer than 8 bits.
        group_size: columns that share a scale (and a minimum).
        calibration: what gptq runs the model on (`sparseprune.calibration.windows`, or any batches).
        keep: the GGUF file that the model came from: a linear whose weight is still what the file's Q4_0, Q4_1 or Q8_0
            codes stand for gets these, bit by bit, whatever the other arguments say.
        embeddings: "int8" or "int4": the token embeddings and the output head become codes, too, rounded to nearest (or kept);
            a tied head and its embedding share the memory. None: they stay as they are. In a small model they are a fifth
            or more of the weights.
        reconstruction: train each block through its codes towards the dense one's outputs, before the next is solved: what is
            trained is what is stored. True for `RECONSTRUCTION`. Needs `calibration`.
        minutes: how long it may take: fewer of the calibration batches are read and fewer epochs made, if more would not fit.
        include, exclude, lm_head: which layers, see `sparseprune.models.sites.find_sites`. Weights shared by several
            layers are left alone.
        progress: show bars on stderr.

    An error leaves the model as it was.

    Raises:
        ValueError: an argument out of range or of no use, no linear layer, NaN or Inf in weights or activations; the
            message names the layer.
    """
    begin = clock.now()
    options = Quantization(
        encoding,
        method,
        group_size=group_size,
        scale_dtype=scale_dtype,
        keep=keep,
        embeddings=embeddings,
        reconstruction=reconstruction,
        minutes=minutes,
    )
    solver = solver_for(options, calibration is not None)
    data = None if calibration is None else as_data(calibration)
    given = Layers(include, exclude, lm_head)
    layers = find_sites(model, **vars(given))
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to quantize under {given}; {dense_again(model)}"
        )
    stored = None if keep is None else StoredCodes.read(keep)
    held = [it for it in model.modules() if isinstance(it, SparseLinear)]  # from before; no parameters
    size = sum(it.numel() for it in model.parameters())
    size += sum(it.in_features * it.out_features for it in held)
    reasons = {layer.name: _left_alone(layer) for layer in layers}
    chosen = [layer for layer in layers if not reasons[layer.name]]
    kept: dict[str, SparseWeight] = {}
    if stored is not None:
        found = {layer.name: stored.find(layer.weight) for layer in chosen}
        kept = {name: weight for name, weight in found.items() if weight is not None}
    values = getattr(torch, scale_dtype)
    rest = (
        [] if embeddings is None else embedding_codes(model, Encoding(embeddings, group_size, values), stored)
    )
    encoded_as = Encoding(encoding, group_size, values)
    wanted = {layer.name: encoded_as for layer in chosen if layer.name not in kept}
    until = None if minutes is None else begin + 60 * minutes
    trained = RECONSTRUCTION if reconstruction is True else reconstruction or None
    run = BlockRun(True, trained, until)
    encoded = encode_layers(model, chosen, wanted, solver, data, run, progress)
    rows = []
    for layer in layers:
        if reasons[layer.name]:
            rows.append(LayerQuantized.unchanged(layer, reasons[layer.name]))
            continue
        if layer.name in kept:
            weight, error, how = kept[layer.name], error_of(layer.weight, kept[layer.name]), "kept"
        else:
            (weight, error, _), how = encoded.made[layer.name], solver.name
        rows.append(LayerQuantized.of(layer, weight, how, error))
        layer.replace(model, SparseLinear.in_place_of(layer.module, weight))
    rows += [it.put(model) for it in rest]
    notes = list(encoded.notes)
    if stored is not None:
        notes.append(
            f"{len(kept)} of {len(chosen)} layers have the codes of {Path(stored.path).name}, bit by bit"
        )
    zeros = sum(it.zeros for it in encoded.made.values())
    if zeros:
        notes.append(
            f"{zeros:,} weights were zero, for which int4_minimum has no code; int4 and int8 keep zeros"
        )
    return QuantizeReport(tuple(rows), size, clock.now() - begin, tuple(notes), encoded.blocks)


class Made(NamedTuple):
    """A layer's codes, their error, and how many weights were zero and have no code for it."""

    weight: SparseWeight
    error: float
    zeros: int


class Encoded(NamedTuple):
    """What layers became, by name, and what there is to say of it."""

    made: dict[str, Made]
    notes: list[str]
    blocks: tuple[BlockReconstructed, ...]


def encode_layers(
    model: nn.Module,
    layers: Iterable[WeightSite],
    wanted: Mapping[str, Encoding],
    solver: QuantizationMethod,
    data: CalibrationData | None,
    run: BlockRun,
    progress: bool,
    required: bool = True,
) -> Encoded:
    """The codes of those of `layers` that are `wanted`, whose weights are then what the codes stand for.

    Which codes: `smallest_codes` says it.

    Args:
        required: whether a model whose blocks cannot be reconstructed is an error; the notes say so otherwise.
    """
    todo = [layer for layer in layers if layer.name in wanted]
    trained = run.reconstruction is not None
    targets = {it.name: _Quantized.of(it, wanted[it.name], solver, trained) for it in todo}
    needs = solver.statistic is not None or trained
    job = Job(model, todo, _as_method(solver), targets, data if needs else None, progress)
    if todo:
        job.run(run, required=trained and required)
    if data is not None:
        remember(model, data)
    return Encoded({name: it.made[0] for name, it in targets.items()}, list(job.notes), tuple(job.blocks))


def solver_for(options: Quantization, calibrated: bool) -> QuantizationMethod:
    """The method, with calibration data or without.

    Raises:
        ValueError: data that is missing, or of no use.
    """
    name = options.method
    if name == "auto":
        name = "gptq" if calibrated and options.encoding != "int8" else "nearest"
    solver = METHODS[name]
    reader = f"method {name}" if solver.statistic is not None else ""
    if options.reconstruction:
        reader = reader or "reconstruction"
    if reader and not calibrated:
        raise ValueError(
            f"calibration: {reader} needs some, got None; pass sparseprune.calibration.windows(text, tokenizer)"
        )
    if calibrated and not reader:
        raise ValueError(f"calibration: method {name} looks at weights only; leave it out")
    if options.minutes is not None and not reader:
        raise ValueError(
            f"minutes: bounds what is solved block by block, method {name} rounds, got {options.minutes:g}; leave it out"
        )
    return solver


def _left_alone(layer: WeightSite) -> str:
    """Why a layer keeps its weight as it is; empty where nothing keeps it."""
    if layer.stays is not None:
        return layer.stays
    return no_kernels(layer.weight)


@dataclass(frozen=True)
class _Quantized(Target):
    """What a layer is to become, and a place for what it has become."""

    spec: WeightSpec | None = None
    solver: QuantizationMethod | None = None
    made: list[Made] = field(default_factory=list)
    """One item, once the layer is solved."""
    reconstructed: bool = False
    original: list[Tensor] = field(default_factory=list)
    """The weight as it was, from when it is solved until its block is trained."""

    @classmethod
    def of(
        cls, layer: WeightSite, values: Encoding, solver: QuantizationMethod, reconstructed: bool
    ) -> _Quantized:
        weight = layer.weight
        spec = smallest_codes(weight, values, recall(layer))
        return cls(Pattern.parse("unstructured"), 0.0, spec=spec, solver=solver, reconstructed=reconstructed)

    def solve(self, weight: Tensor, statistic: Any) -> Tensor:
        """The codes' weight, float32 [out, in]; what came of it is left in `made`."""
        assert self.spec is not None and self.solver is not None
        mask = kept = None
        code = CODES[self.spec.encoding.kind]
        if self.spec.format != Format("dense"):
            mask = SparseWeight.from_dense(weight.float(), self.spec.format).mask
            kept = None if mask is None else ops.unpack_mask(mask, weight.shape[1])
        elif not code.minimums and not bool(weight.all()):
            kept = weight != 0
        codes, grid = self.solver.solve(weight.float(), kept, self.spec.encoding, statistic)
        check_scales(weight, grid)
        if kept is not None:
            codes = torch.where(kept, codes, float(code.zero))
        made = SparseWeight.from_codes(codes, mask, grid, self.spec)
        zeros = weight.numel() - int(weight.count_nonzero()) if code.minimums else 0
        self.made[:] = [Made(made, error_of(weight, made), zeros)]
        if self.reconstructed:
            self.original[:] = [weight]
        return made.to(dtype=torch.float32).dense()

    @contextmanager
    def trained(self, site: WeightSite) -> Iterator[None]:
        (before,), (original,) = self.made, self.original
        self.original.clear()
        with TrainedCodes([(site, before.weight)]) as codes:
            yield
        weight = codes.weights()[site.name]
        self.made[:] = [Made(weight, error_of(original, weight), before.zeros)]


def _as_method(solver: QuantizationMethod) -> Method:
    def solve(weight: Tensor, statistic: Any, target: Target) -> Pruned:
        assert isinstance(target, _Quantized)
        rounded = target.solve(weight, statistic)
        return Pruned(rounded, torch.ones_like(rounded, dtype=torch.bool))

    return Method(solver.name, solve=solve, statistic=solver.statistic)
