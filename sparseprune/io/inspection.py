"""What a model is made of, as `sparseprune inspect` shows it: its linears, their zeros, pattern and size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparseprune.models.notes import noted, recall
from sparseprune.models.sites import find_sites
from sparseprune.report import Column, Report, Table, alike, human_bytes
from sparseprune.weights.choose import recognise
from sparseprune.weights.linear import SparseLinear

__all__ = ["LayerFacts", "ModelFacts", "inspect_model", "memory_bytes"]


@dataclass(frozen=True)
class LayerFacts:
    """One linear. `format` is None where it is dense; `pattern` is the N:M that its zeros follow, None if none, and `why`
    says how that is known."""

    name: str
    shape: tuple[int, int]
    dtype: str
    format: str | None
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
        sparse = sum(layer.format is not None for layer in self.layers)
        footer = [
            f"{sparse} of {len(self.layers)} linears are sparse; all weights of the model take "
            f"{human_bytes(self.memory_bytes)} in memory"
        ]
        groups = alike(self.layers, lambda it: (it.shape, it.dtype, it.format, it.pattern, it.why))
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
            why = f"held as {module.format}" if note is None else recognise(module.weight, note).reason
            form, sparsity, nbytes = str(module.format), module.sparsity, module.nbytes
            layers.append(LayerFacts(name, shape, _name(module.dtype), form, pattern, why, sparsity, nbytes))
        elif name in dense:
            weight = dense[name].weight
            found = recognise(weight, recall(dense[name]))
            pattern = None if found.form is None else str(found.form)
            sparsity = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
            shape = (weight.shape[0], weight.shape[1])
            layers.append(
                LayerFacts(
                    name, shape, _name(weight.dtype), None, pattern, found.reason, sparsity, weight.nbytes
                )
            )
    return ModelFacts(type(model).__name__, tuple(layers), memory_bytes(model))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, memory that several share counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
