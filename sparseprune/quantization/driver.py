"""`quantize()`: linears become layers of int8 or int4 codes, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData, as_data
from sparseprune.kernels import ops
from sparseprune.kernels.codes import CODES
from sparseprune.models.batches import Batch
from sparseprune.models.notes import recall
from sparseprune.models.sites import WeightSite, dense_again, find_sites
from sparseprune.options import Layers
from sparseprune.pruning.base import Method, Pruned, Target
from sparseprune.pruning.job import Job
from sparseprune.pruning.patterns import Pattern
from sparseprune.pruning.sequential import BlockRun
from sparseprune.quantization.embedding import embedding_codes, no_kernels
from sparseprune.quantization.methods import METHODS, QuantizationMethod
from sparseprune.quantization.options import Quantization
from sparseprune.quantization.report import LayerQuantized, QuantizeReport, error_of
from sparseprune.statistics.overlap import remember
from sparseprune.weights.choose import recognise
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.gguf import StoredCodes
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.rounding import check_scales
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import WeightSpec

__all__ = ["quantize", "solver_for"]

_TWO_FOUR = Format("nm", 2, 4)


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
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    progress: bool = False,
) -> QuantizeReport:
    """Swaps a model's linears for `SparseLinear` layers of int8 or int4 codes, in place.

    A linear that was pruned to 2:4 becomes 2:4 codes, 3.25 bits a weight in int4 (groups of 64, float16 scales); any other
    becomes dense ones, 4.25 bits, in which zeros stay zeros but are stored (int4_minimum has no code for 0: the report
    says how many weights were). The model computes in the dtype it has.

    Args:
        encoding: "int8"; "int4"; "int4_minimum", int4 with a minimum for each group, for dense weights (those in 2:4
            become int4).
        method: "gptq" makes up for each rounding in the weights that are left, block by block, and needs `calibration`;
            "nearest" rounds. "auto": gptq where there is calibration data and fewer than 8 bits.
        group_size: columns that share a scale (and a minimum).
        calibration: what gptq runs the model on (`sparseprune.calibration.windows`, or any batches).
        keep: the GGUF file that the model came from: a linear whose weight is still what the file's Q4_0, Q4_1 or Q8_0
            codes stand for gets these, bit by bit, whatever the other arguments say.
        embeddings: "int8" or "int4": the token embeddings and the output head become codes, too, rounded to nearest (or kept);
            a tied head and its embedding share the memory. None: they stay as they are. In a small model they are a fifth
            or more of the weights.
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
        encoding, method, group_size=group_size, scale_dtype=scale_dtype, keep=keep, embeddings=embeddings
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
    todo = [layer for layer in chosen if layer.name not in kept]
    targets = {layer.name: _Quantized.of(layer, options, solver) for layer in todo}
    values = getattr(torch, scale_dtype)
    rest = (
        [] if embeddings is None else embedding_codes(model, Encoding(embeddings, group_size, values), stored)
    )
    job = Job(model, todo, _as_method(solver), targets, data if solver.statistic else None, progress)
    if todo:
        job.run(BlockRun(sequential=True), required=False)
    if data is not None:
        remember(model, data)
    rows = []
    for layer in layers:
        if reasons[layer.name]:
            rows.append(LayerQuantized.unchanged(layer, reasons[layer.name]))
            continue
        if layer.name in kept:
            weight, error, how = kept[layer.name], error_of(layer.weight, kept[layer.name]), "kept"
        else:
            (made,) = targets[layer.name].made
            weight, error, how = made.weight, made.error, solver.name
        rows.append(LayerQuantized.of(layer, weight, how, error))
        layer.replace(model, SparseLinear.in_place_of(layer.module, weight))
    rows += [it.put(model) for it in rest]
    zeros = sum(made.zeros for target in targets.values() for made in target.made)
    notes = list(job.notes)
    if stored is not None:
        notes.append(
            f"{len(kept)} of {len(chosen)} layers have the codes of {Path(stored.path).name}, bit by bit"
        )
    if zeros:
        notes.append(
            f"{zeros:,} weights were zero, for which int4_minimum has no code; int4 and int8 keep zeros"
        )
    return QuantizeReport(tuple(rows), size, clock.now() - begin, tuple(notes))


def solver_for(options: Quantization, calibrated: bool) -> QuantizationMethod:
    """The method, with calibration data or without.

    Raises:
        ValueError: data that is missing, or of no use.
    """
    name = options.method
    if name == "auto":
        name = "gptq" if calibrated and options.encoding != "int8" else "nearest"
    solver = METHODS[name]
    if solver.statistic is not None and not calibrated:
        raise ValueError(
            f"calibration: method {name} needs some, got None; pass sparseprune.calibration.windows(text, tokenizer)"
        )
    if solver.statistic is None and calibrated:
        raise ValueError(f"calibration: method {name} looks at weights only; leave it out")
    return solver


def _left_alone(layer: WeightSite) -> str:
    """Why a layer keeps its weight as it is; empty where nothing keeps it."""
    if layer.stays is not None:
        return layer.stays
    return no_kernels(layer.weight)


class _Made(NamedTuple):
    """A layer's codes, their error, and how many weights were zero and have no code for it."""

    weight: SparseWeight
    error: float
    zeros: int


@dataclass(frozen=True)
class _Quantized(Target):
    """What a layer is to become, and a place for what it has become."""

    spec: WeightSpec | None = None
    solver: QuantizationMethod | None = None
    made: list[_Made] = field(default_factory=list)
    """One item, once the layer is solved."""

    @classmethod
    def of(cls, layer: WeightSite, options: Quantization, solver: QuantizationMethod) -> _Quantized:
        weight = layer.weight
        form = recognise(weight, recall(layer)).form
        two_four = form == _TWO_FOUR
        kind = options.encoding.removesuffix("_minimum") if two_four else options.encoding
        values = Encoding(kind, options.group_size, getattr(torch, options.scale_dtype))
        spec = WeightSpec(
            (weight.shape[0], weight.shape[1]),
            weight.dtype,
            form if two_four and form else Format("dense"),
            values,
        )
        return cls(Pattern.parse("unstructured"), 0.0, spec=spec, solver=solver)

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
        self.made[:] = [_Made(made, error_of(weight, made), zeros)]
        return made.to(dtype=torch.float32).dense()


def _as_method(solver: QuantizationMethod) -> Method:
    def solve(weight: Tensor, statistic: Any, target: Target) -> Pruned:
        assert isinstance(target, _Quantized)
        rounded = target.solve(weight, statistic)
        return Pruned(rounded, torch.ones_like(rounded, dtype=torch.bool))

    return Method(solver.name, solve=solve, statistic=solver.statistic)
