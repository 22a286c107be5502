"""Sparse layers back to dense ones, to be trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseprune.models import ties
from sparseprune.models.modules import parent_of, require_module, take_hooks
from sparseprune.weights.embedding import SparseEmbedding
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.module import SparseModule

__all__ = ["to_dense"]


def to_dense(model: nn.Module) -> nn.Module:
    """Swaps every `SparseLinear` and `SparseEmbedding` of the model for its dense twin, in place, and gives the model back.

    A layer that stands in several places stays one layer, a weight that several have one parameter; hooks stay. `sparsify` is
    the way back.
    """
    require_module(model=model)
    twins: dict[SparseModule, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (SparseLinear, SparseEmbedding)):
            continue
        if module not in twins:
            twin: Any = module.to_dense().requires_grad_(True)
            twin.weight = weights.setdefault(id(module.packed), twin.weight)
            twins[module] = twin
            take_hooks(module, twin)
        setattr(*parent_of(model, name), twins[module])
    ties.restore(model)
    return model
