"""What a model is made of, as `sparseprune inspect` shows it: its linears, their zeros, pattern and size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseprune.kernels.packing import CODES
from sparseprune.models.notes import noted, recall
from sparseprune.models.sites import find_sites
from sparseprune.report import Column, Report, Table, alike, human_bytes
from sparseprune.weights.choose import recognise
from sparseprune.weights.encoding import PLAIN
from sparseprune.weights.linear import SparseLinear

__all__ = ["LayerFacts", "ModelFacts", "inspect_model", "memory_bytes"]


@dataclass(frozen=True)
class LayerFacts:
    """One linear. `format` is None where it is an nn.Linear, "dense" where all its values are kept as codes; `values` is
    "int8", "int4" or "int4_minimum" where they are codes, else their dtype; `pattern` is the N:M that its zeros follow, None
    if none, and `why` says how that is known."""

    name: str
    shape: tuple[int, int]
    dtype: str
    format: str | None
    values: str
    pattern: str | None
    why: str
    sparsity: float
    nbytes: int


COLUMNS = (
    Column("layers", value=lambda it: it.name),
    Column("count", value=lambda it: len(it.members)),
    Column("shape", value=lambda it: it.first.shape),
    Column("dtype", value=lambda it: it.first.dtype),
    Column("format", value=lambda it: it.first.format or "dense"),
    Column("values", value=lambda it: it.first.values),
    Column("pattern", value=lambda it: it.first.pattern),
    Column("sparsity", ".1%", lambda it: it.mean(lambda layer: layer.sparsity)),
    Column("bytes", human_bytes, lambda it: it.total(lambda layer: layer.nbytes)),
    Column("why", value=lambda it: it.first.why),
)
"""Of layers that are alike."""


@dataclass(frozen=True)
class ModelFacts(Report):
    """The linears (output head included) and the whole; `print` shows a table, like layers in one row."""

    architecture: str
    layers: tuple[LayerFacts, ...]
    memory_bytes: int

    def table(self) -> Table:
        sparse = sum(layer.format not in (None, "dense") for layer in self.layers)
        codes = sum(layer.values in CODES for layer in self.layers)
        quantized = f", {codes} hold int8 or int4 codes" if codes else ""
        footer = [
            f"{sparse} of {len(self.layers)} linears are sparse{quantized}; all weights of the model take "
            f"{human_bytes(self.memory_bytes)} in memory"
        ]
        groups = alike(self.layers, lambda it: (it.shape, it.dtype, it.format, it.values, it.pattern, it.why))
        return Table.of(self.architecture, COLUMNS, groups, footer)


def inspect_model(model: nn.Module) -> ModelFacts:
    """Looks at every linear of `model`, sparse and dense."""
    dense = {layer.name: layer for layer in find_sites(model, lm_head=True)}
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            shape = (module.out_features, module.in_features)
            pattern = str(module.format) if module.format.kind == "nm" else None
            note = noted(module)
            why = f"held as {module.spec}" if note is None else recognise(module.weight, note).reason
            form, sparsity, dtype = str(module.format), module.sparsity, _name(module.dtype)
            if form == "dense":  # keeps all, zeros too
                sparsity = _sparsity(module.weight)
            values = dtype if module.encoding == PLAIN else module.encoding.kind
            layers.append(LayerFacts(name, shape, dtype, form, values, pattern, why, sparsity, module.nbytes))
        elif name in dense:
            weight = dense[name].weight
            found = recognise(weight, recall(dense[name]))
            pattern = None if found.form is None else str(found.form)
            shape, dtype = (weight.shape[0], weight.shape[1]), _name(weight.dtype)
            sparsity, nbytes = _sparsity(weight), weight.nbytes
            layers.append(
                LayerFacts(name, shape, dtype, None, dtype, pattern, found.reason, sparsity, nbytes)
            )
    return ModelFacts(type(model).__name__, tuple(layers), memory_bytes(model))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, memory that several share counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
