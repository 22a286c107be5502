"""Weights change in place; an error puts them back."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from sparseprune.kernels import ops
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Pruned
from sparseprune.pruning.report import LayerPruned

__all__ = ["Rewriter", "apply_mask", "pack_layer_mask", "weight_of"]


class Rewriter:
    """Remembers each parameter before its first change, for as long as the `with` block runs.

    Memory: a copy of what has changed so far.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for parameter, before in self._before.values():
                parameter.data = before
        self._before.clear()

    def remember(self, parameter: nn.Parameter) -> None:
        if id(parameter) not in self._before:
            self._before[id(parameter)] = (parameter, parameter.detach().clone())

    def write(self, layer: WeightSite, pruned: Pruned, error: float | None = None) -> LayerPruned:
        """Gives the layer its new weight."""
        before = layer.count_zeros()
        self.remember(layer.parameter)
        layer.weight.copy_(pruned.weight)
        layer.weight.masked_fill_(~pruned.mask, 0)
        return LayerPruned.of(layer, before, error)


def weight_of(layer: WeightSite) -> Tensor:
    """The layer's weight as the methods want it, [out, in] in float32 (float64 stays)."""
    weight = layer.weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def pack_layer_mask(layer: WeightSite, mask: Tensor) -> Tensor:
    """A mask [out, in] as bits, turned as the layer stores its weight: an eighth of a byte a weight."""
    return ops.pack_mask(layer.stored(mask).cpu().flatten(1))


def apply_mask(layer: WeightSite, bits: Tensor) -> LayerPruned:
    """Zeroes what `pack_layer_mask`'s bits leave out."""
    weight = layer.stored(layer.weight).flatten(1)
    before = layer.count_zeros()
    if weight.is_cpu and weight.is_contiguous() and weight.dtype != torch.float64:
        ops.mask_apply_packed_(weight, bits)
    else:  # float64, or another device; not a product with the mask, that would leave -0.0
        weight.masked_fill_(~ops.unpack_mask(bits, weight.shape[1]).to(weight.device), 0)
    return LayerPruned.of(layer, before)
