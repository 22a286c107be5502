"""Sparse layers back to dense ones, to be trained."""

from __future__ import annotations

from torch import nn

from sparseprune.models.modules import parent_of, take_hooks
from sparseprune.weights.linear import SparseLinear

__all__ = ["to_dense"]


def to_dense(model: nn.Module) -> nn.Module:
    """Swaps every `SparseLinear` of the model for its dense twin, in place, and gives the model back.

    A layer that stands in several places stays one layer; hooks stay. `sparsify` is the way back.
    """
    twins: dict[SparseLinear, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, SparseLinear):
            continue
        if module not in twins:
            twins[module] = module.to_dense().requires_grad_(True)
            take_hooks(module, twins[module])
        setattr(*parent_of(model, name), twins[module])
    return model
