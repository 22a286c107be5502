"""A batch of inputs: what one call of a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.models.modules import max_length

__all__ = ["Batch", "attention_mask", "call", "check_lengths", "no_cache", "to_device", "trunk"]

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]
"""What one call of the model takes: its first argument, its keyword arguments, or its positional ones."""


def attention_mask(batch: Batch) -> Tensor | None:
    """The batch's attention mask, if it is a mapping that has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def check_lengths(model: nn.Module, batches: Sequence[Batch]) -> None:
    limit = max_length(model)
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if limit is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            continue
        if ids.shape[1] > limit:
            raise ValueError(
                f"batches: the model's positions end at {limit}, batch {index} has {ids.shape[1]} tokens; "
                f"pass windows of length <= {limit}"
            )


def trunk(model: nn.Module, places: Iterable[nn.Module], batches: Sequence[Batch]) -> nn.Module:
    # A transformers model's head costs a fifth of SmolLM2's pass and feeds no layer: skip it if it holds none
    # of ours, and no batch has labels, which only the whole model takes.
    trunk = getattr(model, "base_model", None) if hasattr(model, "base_model_prefix") else None
    labels = any(isinstance(batch, Mapping) and "labels" in batch for batch in batches)
    if labels or not isinstance(trunk, nn.Module):
        return model
    return trunk if set(trunk.modules()).issuperset(places) else model


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    return value


def call(model: nn.Module, batch: Batch) -> Any:
    """What the model gives for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    # a transformers model would keep the keys and values of the whole pass, for nothing
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
