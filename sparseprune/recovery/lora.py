"""Low-rank adapters that know the mask: they merge into the pruned weight without losing a zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseprune.models.sites import WeightSite

__all__ = ["adapters"]


class _MaskedLora(nn.Module):
    """W + M . (B A) alpha / rank, with M the mask of W's non-zeros (Hu et al., arXiv 2106.09685, and the mask).

    Without M the product B A is dense: merging would fill the zeros, and cutting it down to them afterwards would
    change the model that was trained. With it, training sees the very weight that merging gives.

    W as stored: [rows, columns]; A [rank, columns] starts uniform in +-1 / sqrt(columns), B [rows, rank] at zero.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.keep: Tensor
        rows, columns = weight.flatten(1).shape
        exact = torch.promote_types(weight.dtype, torch.float32)
        start = torch.rand(rank, columns, generator=generator, dtype=exact).sub_(0.5) * (
            2 / math.sqrt(columns)
        )
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=exact, device=weight.device))
        self.scale = alpha / rank
        self.register_buffer("keep", weight.detach() != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            # a product, where +0.0 + -0.0 is +0.0 again: masked_fill takes four times as long on a CPU
            delta = (self.b @ self.a).view_as(weight) * (self.keep * self.scale)
            return weight + delta.to(weight.dtype)


@contextmanager
def adapters(
    layers: Sequence[WeightSite], rank: int, alpha: float | None = None, seed: int = 0
) -> Iterator[dict[str, nn.Parameter]]:
    """Adapters on `layers` inside; merged into their weights at the end, which then are plain parameters again.

    Args:
        alpha: the product's factor is alpha / rank; by default 2 x rank.
        seed: draws the adapters' first values.

    Yields:
        name -> parameter, what there is to train.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"lora: the rank must be at least 1, got {rank}")
    made: list[tuple[WeightSite, _MaskedLora]] = []
    try:
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            weight = layer.parameter
            adapter = _MaskedLora(weight, rank, 2.0 * rank if alpha is None else alpha, generator)
            made.append((layer, adapter))
            for module in layer.places:  # one adapter for a weight that several layers share
                parametrize.register_parametrization(module, "weight", adapter, unsafe=True)
        yield {
            f"{layer.name}.lora_{name}": parameter
            for layer, adapter in made
            for name, parameter in adapter.named_parameters()
        }
    finally:
        for layer, _ in made:
            _merge(layer)


@torch.no_grad()
def _merge(layer: WeightSite) -> None:
    merged = layer.parameter.detach().clone()
    for module in layer.places:
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    layer.parameter.copy_(merged)
