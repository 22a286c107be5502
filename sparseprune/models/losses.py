"""What a loss is, which one a model's batches imply, and what judges a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune.models.batches import Batch, attention_mask, call, to_device
from sparseprune.models.modules import device_of

__all__ = ["IGNORED", "Evaluate", "Loss", "is_causal", "judged", "loss_of", "next_token_loss"]

Loss = Callable[[Any, Batch], Tensor]
"""(what the model gives for a batch, the batch) -> the mean loss over the batch, a scalar to differentiate."""

Evaluate = Callable[[nn.Module], float]
"""The model -> how well it does, in one number."""

IGNORED = -100
"""A label that counts for nothing, as in transformers."""


def judged(evaluate: Evaluate, model: nn.Module) -> float:
    """What `evaluate` says of the model.

    Raises:
        TypeError: it gives something that is not one number.
    """
    value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"evaluate: must give one number, got a {type(value).__name__}; return the loss as a float"
        ) from error


def is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers."""
    can_generate = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    return (
        callable(can_generate) and bool(can_generate()) and not getattr(config, "is_encoder_decoder", False)
    )


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None = None) -> Tensor:
    """The model's loss on a batch, which moves to its device.

    Args:
        loss: by default what the batch implies: the model's own loss where the batch has `labels`, otherwise the
            cross-entropy of the next token, for a causal language model of transformers.

    Raises:
        ValueError: none is given, and none implied.
    """
    batch = to_device(batch, device_of(model))
    output = call(model, batch)
    if loss is not None:
        return loss(output, batch)
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not is_causal(model):
        raise ValueError(
            f"loss: {type(model).__name__} gives none for these batches, and is not a causal language model; "
            'pass batches with "labels", or a loss (output, batch) -> scalar'
        )
    return next_token_loss(logits, batch)


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each token after the first, given those before it; padding is left out.

    Args:
        logits: [batch, tokens, vocabulary].
        batch: token ids int64 [batch, tokens], alone, first in a tuple, or as `input_ids`.
    """
    ids: Any = batch
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    elif isinstance(batch, tuple):
        ids = batch[0]
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:2] or ids.shape[1] < 2:
        raise ValueError(
            "batches: must hold token ids [batch, tokens] of at least 2 tokens for the next-token loss, got "
            f"{list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__}; pass such ids, or a loss"
        )
    targets = ids[:, 1:].to(logits.device)
    mask = attention_mask(batch)
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:].to(logits.device) == 0, IGNORED)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
