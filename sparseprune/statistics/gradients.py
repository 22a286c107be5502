"""Gradients of a model's loss by the weights of its linear layers, summed over a sample of batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import processes
from sparseprune.models.batches import Batch, call, check_lengths, no_cache, to_device
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track
from sparseprune.statistics.inputs import Statistic, over_processes

__all__ = ["GradientMagnitudes", "GradientSum", "Loss", "WeightGradients", "collect_gradients", "model_loss"]

Loss = Callable[[Any, Batch], Tensor]
"""(what the model gives for a batch, the batch) -> a scalar to differentiate."""


class WeightGradients(Statistic):
    """A sum over batches of something of a layer's gradient: `total` float32 [out, in]. `tokens` counts batches.

    Collected by `collect_gradients`, with backward passes; `sparseprune.statistics.inputs.collect` has none.
    """

    def __init__(self, in_features: int, device: torch.device, out_features: int = 0) -> None:
        super().__init__(in_features, device)
        self.total = torch.zeros(out_features, in_features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        """Adds the gradient [out, in] of one batch's loss.

        Raises:
            FloatingPointError: it holds NaN or Inf.
        """
        if not inputs.isfinite().all():
            raise FloatingPointError
        self.add(inputs.float())
        self.tokens += 1

    @abstractmethod
    def add(self, gradient: Tensor) -> None:
        """Adds one batch's gradient, float32 [out, in], to `total`."""


class GradientSum(WeightGradients):
    """Sum of the gradients: that of the summed loss."""

    def add(self, gradient: Tensor) -> None:
        self.total += gradient


class GradientMagnitudes(WeightGradients):
    """Sum of the gradients' absolute values."""

    def add(self, gradient: Tensor) -> None:
        self.total += gradient.abs()


def model_loss(model: nn.Module) -> Loss:
    """The loss that a model's batches imply: its own where a batch has `labels`, otherwise the cross entropy of
    the next token, for a transformers causal language model.
    """

    def loss(output: Any, batch: Batch) -> Tensor:
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or not _is_causal(model):
            raise ValueError(
                f"loss: {type(model).__name__} gives none for these batches, and is not a causal language model; "
                'pass batches with "labels", or a loss (output, batch) -> scalar'
            )
        return next_token_loss(logits, batch)

    return loss


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of each token after the first, given those before it; padding is left out.

    Args:
        logits: [batch, tokens, vocabulary].
        batch: token ids int64 [batch, tokens], alone, first in a tuple, or as `input_ids`.
    """
    mask = None
    ids: Any = batch
    if isinstance(batch, Mapping):
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    elif isinstance(batch, tuple):
        ids = batch[0]
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:2] or ids.shape[1] < 2:
        raise ValueError(
            "batches: must hold token ids [batch, tokens] of at least 2 tokens for the next-token loss, got "
            f"{list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__}; pass such ids, or a loss"
        )
    targets = ids[:, 1:].to(logits.device)
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:].to(logits.device) == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def _is_causal(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    return callable(can_generate) and can_generate() and not getattr(config, "is_encoder_decoder", False)


def collect_gradients(
    model: nn.Module,
    layers: Sequence[WeightSite],
    batches: Iterable[Batch],
    *,
    statistic: type[WeightGradients] = GradientSum,
    progress: bool = False,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Runs the model forward and backward over `batches`, in evaluation mode, and sums up each layer's gradients.

    Where `torch.distributed` runs several processes, each reads its share of the batches, and all get the sums.
    A weight that several layers share gets the gradient of all its uses.

    Args:
        batches: as for `sparseprune.statistics.inputs.collect`.
        loss: by default `model_loss`.

    Returns:
        layer name -> statistic. Memory: one float32 matrix for each layer, one gradient at a time, and the
        activations of one batch. The model's own gradients stay as they are.

    Raises:
        ValueError: a sequence longer than the model's positions, a loss that is missing, no scalar or not
            finite, NaN or Inf in a gradient, a layer that the loss does not depend on.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: must hold at least one batch, got none")
    check_lengths(model, batches)
    batches = processes.share(batches)
    statistics: dict[str, Any] = {
        layer.name: statistic(layer.in_features, layer.weight.device, layer.out_features) for layer in layers
    }
    measure = model_loss(model) if loss is None else loss
    with (
        torch.enable_grad(),
        evaluation_mode(model),
        no_cache(model),
        _gradients_to(model, layers, statistics),
    ):
        for batch in track(batches, "gradients", enabled=progress):
            batch = to_device(batch, device_of(model))
            value = measure(call(model, batch), batch)
            _check_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
    statistics = over_processes(layers, statistics, statistic)
    unseen = [layer.name for layer in layers if not statistics[layer.name].tokens]
    if unseen:
        raise ValueError(
            f"batches: the loss must depend on every layer, {len(unseen)} got no gradient, the first is "
            f"{unseen[0]}; pass other batches, or exclude it"
        )
    return statistics


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss: must be one number that depends on the weights, got {found}; average it over the batch"
        )
    if not value.isfinite():
        raise ValueError(
            f"loss: must be finite, got {value.item()}; check the batches, or load the model in float32"
        )


@contextmanager
def _gradients_to(
    model: nn.Module, layers: Sequence[WeightSite], statistics: Mapping[str, Any]
) -> Iterator[None]:
    """Sends each layer's gradients to its statistic as they come, and keeps none; other weights get none."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for layer in layers:
            weight = layer.parameter
            weight.requires_grad_(True)
            weight.grad = None
            hooks.append(weight.register_post_accumulate_grad_hook(_hook(layer, statistics[layer.name])))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _hook(layer: WeightSite, statistic: WeightGradients) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        gradient = weight.grad
        weight.grad = None
        assert gradient is not None
        try:
            statistic.update(layer.stored(gradient))
        except FloatingPointError:
            raise ValueError(
                f"batches: the gradient of {layer.name} must be finite, got NaN or Inf; check the batches, or "
                "load the model in float32"
            ) from None

    return hook
