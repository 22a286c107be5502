"""`prune()`: zero the weights of a model that a method finds least needed, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import ops
from sparseprune.calibration import Batch, CalibrationData, collect
from sparseprune.models import LinearLayer, find_linears, is_conv1d
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.patterns import Pattern, Scope, check_scope
from sparseprune.report import Column, Table, track

__all__ = ["LayerPruned", "PruneReport", "prune"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LayerPruned:
    """What happened to one layer: its shape [out, in], and how many of its weights are zero."""

    name: str
    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity_before(self) -> float:
        return self.zeros_before / max(self.size, 1)

    @property
    def sparsity_after(self) -> float:
        return self.zeros_after / max(self.size, 1)


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did, layer by layer; `print(report)` shows it as a table."""

    layers: tuple[LayerPruned, ...]
    method: str
    pattern: str
    sparsity: float
    scope: str
    calibration: str | None
    model_parameters: int

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero now."""
        return sum(layer.zeros_after for layer in self.layers)

    @property
    def sparsity_after(self) -> float:
        """Zeros as a fraction of the pruned layers' weights."""
        return self.zeros / max(self.weights, 1)

    def table(self) -> Table:
        columns = ("layer", "shape", Column("zeros before", ".1%"), Column("zeros after", ".1%"))
        rows = [(it.name, it.shape, it.sparsity_before, it.sparsity_after) for it in self.layers]
        title = f"Pruned by {self.method}, {self.pattern}"
        if self.scope in ("row", "layer"):
            title += f" {self.sparsity:.1%}, ranked per {self.scope}"
        footer = [
            f"total: {len(self.layers)} layers, {self.weights:,} weights, {self.zeros:,} zeros "
            f"({self.sparsity_after:.1%}); the model has {self.model_parameters:,} parameters"
        ]
        if self.calibration is not None:
            footer.append(f"calibration: {self.calibration}")
        return Table(title, columns, rows, footer)

    def to_dict(self) -> dict[str, Any]:
        layers = [
            {
                **asdict(layer),
                "shape": list(layer.shape),
                "sparsity_before": layer.sparsity_before,
                "sparsity_after": layer.sparsity_after,
            }
            for layer in self.layers
        ]
        totals = {"weights": self.weights, "zeros": self.zeros, "sparsity_after": self.sparsity_after}
        fields = ("method", "pattern", "sparsity", "scope", "calibration", "model_parameters")
        return {**{name: getattr(self, name) for name in fields}, **totals, "layers": layers}

    def __str__(self) -> str:
        return self.table().render()


def prune(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    method: str | Method = "magnitude",
    sparsity: float | None = None,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    scope: Scope | None = None,
    progress: bool = False,
) -> PruneReport:
    """Zeroes weights of the model's linear layers, in place.

    Args:
        pattern: "2:4", "4:8", any "N:M", or "unstructured".
        method: "magnitude", "wanda", or a `Method` of your own.
        sparsity: fraction of weights to remove, in [0, 1); needed for "unstructured", implied by N:M.
        calibration: what the method runs the model on (`sparseprune.calibration.windows`, or any batches);
            needed by "wanda". Its statistics are those of the model as given.
        include, exclude, lm_head: which layers, see `sparseprune.models.find_linears`.
        scope: what "unstructured" ranks together, "row" or "layer"; by default what suits the method.
        progress: show bars on stderr.

    An error leaves the model as it was: weights change last, when every mask is known.

    Raises:
        ValueError: an argument out of range, no layer to prune, a layer whose width N:M cannot divide, NaN or
            Inf in weights or activations; the message names the layer.
    """
    pattern = Pattern.parse(pattern)
    method = find_method(method)
    sparsity = pattern.resolve_sparsity(sparsity)
    ranked = _resolve_scope(pattern, method, scope)
    if method.statistic is None and calibration is not None:
        raise ValueError(f"calibration: method {method.name} looks at weights only; leave it out")
    if method.statistic is not None and calibration is None:
        raise ValueError(
            f"calibration: method {method.name} needs some, got None; pass "
            "sparseprune.calibration.windows(text, tokenizer)"
        )
    layers = find_linears(model, include, exclude, lm_head)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to prune under include={include!r}, "
            f"exclude={exclude!r}, lm_head={lm_head}; see sparseprune.models.find_linears(model)"
        )
    for layer in layers:
        _check_layer(layer, pattern)

    statistics: dict[str, Any] = {}
    source = None
    if method.statistic is not None and calibration is not None:
        data = calibration if isinstance(calibration, CalibrationData) else CalibrationData(list(calibration))
        source = data.source
        statistics = collect(model, layers, data, method.statistic, progress)

    # All masks first, as bits (a sixteenth of a bfloat16 model): what fails, fails with the model untouched.
    bits = []
    for layer in track(layers, f"pruning ({method.name})", enabled=progress):
        weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
        try:
            mask = method.prune(weight, statistics.get(layer.name), Target(pattern, sparsity, ranked)).mask
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        bits.append(ops.pack_mask(_stored(layer, mask).cpu()))
    rows = [_apply(layer, mask_bits) for layer, mask_bits in zip(layers, bits, strict=True)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    scope_name = "group" if pattern.structured else ranked
    return PruneReport(tuple(rows), method.name, str(pattern), sparsity, scope_name, source, parameters)


def _resolve_scope(pattern: Pattern, method: Method, scope: Scope | None) -> Scope:
    if scope is None:
        return method.scope
    check_scope(scope)
    if pattern.structured:
        raise ValueError(f"scope: pattern {pattern} ranks within its groups, got {scope!r}; leave it out")
    return scope


def _check_layer(layer: LinearLayer, pattern: Pattern) -> None:
    weight = layer.weight
    pattern.check_shape(layer.out_features, layer.in_features, layer.name)
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{layer.name}: weights must be float32, bfloat16, float16 or float64, got "
            f"{weight.dtype}; convert the model with .to(dtype)"
        )
    if weight.is_meta:
        raise ValueError(
            f"{layer.name}: its weights must be loaded, they are on the meta device; load the model first"
        )
    if not weight.isfinite().all():
        raise ValueError(
            f"{layer.name}: weights must be finite, got NaN or Inf; repair the checkpoint, or exclude it"
        )


def _stored(layer: LinearLayer, matrix: Tensor) -> Tensor:
    """A matrix [out, in] turned as the layer stores its weight."""
    return matrix.t() if is_conv1d(layer.module) else matrix


def _apply(layer: LinearLayer, bits: Tensor) -> LayerPruned:
    weight = _stored(layer, layer.weight)
    before = weight.numel() - int(weight.count_nonzero())
    if weight.is_cpu and weight.is_contiguous() and weight.dtype != torch.float64:
        ops.mask_apply_packed_(weight, bits)
    else:  # float64, or another device; not a product with the mask, that would leave -0.0
        weight.masked_fill_(~ops.unpack_mask(bits, weight.shape[1]).to(weight.device), 0)
    after = weight.numel() - int(weight.count_nonzero())
    return LayerPruned(layer.name, (layer.out_features, layer.in_features), before, after)
