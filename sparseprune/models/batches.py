"""A batch of inputs: what one call of a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.models.modules import max_length

__all__ = ["Batch", "attention_mask", "call", "check_batches", "no_cache", "to_device", "trunk"]

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]
"""What one call of the model takes: its first argument, its keyword arguments, or its positional ones."""


def attention_mask(batch: Batch) -> Tensor | None:
    """The batch's attention mask, if it is a mapping that has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def check_batches(model: nn.Module, batches: Sequence[Batch]) -> None:
    """That the model can read what it is given, as far as that is known before it runs.

    Raises:
        TypeError: something that is not a batch.
        ValueError: a sequence longer than the model's positions, or token ids that are not in its vocabulary.
    """
    limit, vocabulary = max_length(model), _vocabulary(model)
    for index, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, Mapping, tuple)):
            raise TypeError(
                f"batches: each must be a tensor, a mapping or a tuple, batch {index} is a {type(batch).__name__}; pass "
                "sparseprune.calibration.windows(text, tokenizer)"
            )
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            continue
        if vocabulary is not None and (
            ids.is_floating_point()
            or not ids.is_meta
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
        ):
            found = ids.dtype if ids.is_floating_point() else f"{int(ids.min())} to {int(ids.max())}"
            raise ValueError(
                f"batches: token ids must be whole numbers below {vocabulary}, the model's vocabulary, batch {index} has "
                f"{found}; pass the ids that the model's own tokenizer gives"
            )
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(
                f"batches: the model's positions end at {limit}, batch {index} has {ids.shape[1]} tokens; "
                f"pass windows of length <= {limit}"
            )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model of text knows, None for any other."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


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
