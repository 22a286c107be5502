"""What a model is made of, as `sparseprune inspect` shows it: its linears, their zeros, pattern and size."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparseprune.models.notes import noted, recall
from sparseprune.models.sites import find_sites
from sparseprune.report import Column, Table, human_bytes
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


@dataclass(frozen=True)
class ModelFacts:
    """The linears (output head included) and the whole; `print` shows a table, like layers in one row."""

    architecture: str
    layers: tuple[LayerFacts, ...]
    memory_bytes: int

    def table(self) -> Table:
        groups: dict[Any, list[LayerFacts]] = {}
        for layer in self.layers:
            key = (
                re.sub(r"\d+", "*", layer.name),
                layer.shape,
                layer.dtype,
                layer.format,
                layer.pattern,
                layer.why,
            )
            groups.setdefault(key, []).append(layer)
        rows = []
        for (pattern_of_names, shape, dtype, format, pattern, why), group in groups.items():
            name = pattern_of_names if len(group) > 1 else group[0].name
            sparsity = sum(layer.sparsity for layer in group) / len(group)
            nbytes = sum(layer.nbytes for layer in group)
            rows.append((name, len(group), shape, dtype, format or "dense", pattern, sparsity, nbytes, why))
        columns: list[Column | str] = [
            "layers", "count", "shape", "dtype", "format", "pattern", Column("sparsity", ".1%"),
            Column("bytes", human_bytes), "why",
        ]  # fmt: skip
        sparse = sum(layer.format is not None for layer in self.layers)
        footer = [
            f"{sparse} of {len(self.layers)} linears are sparse; all weights of the model take "
            f"{human_bytes(self.memory_bytes)} in memory"
        ]
        return Table(self.architecture, columns, rows, footer)

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {"architecture": self.architecture, "memory_bytes": self.memory_bytes, "layers": layers}

    def __str__(self) -> str:
        return self.table().render()


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
