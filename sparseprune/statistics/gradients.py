"""Gradients of a model's loss by the weights of its linear layers, summed over a sample of batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import processes
from sparseprune.models.batches import Batch, check_batches, no_cache
from sparseprune.models.losses import Loss, loss_of
from sparseprune.models.modules import evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track
from sparseprune.statistics.inputs import Statistic, over_processes

__all__ = ["GradientMagnitudes", "GradientSum", "WeightGradients", "collect_gradients"]


class WeightGradients(Statistic):
    """A sum over batches of something of a layer's gradient: `total` float32 [out, in]. `tokens` counts batches.

    Collected by `collect_gradients`, with backward passes of the whole model: a block has no loss of its own.
    """

    whole_model = True
    comparable = True  # what the loss changes by

    @classmethod
    def of(cls, layer: WeightSite, device: torch.device | None = None) -> WeightGradients:
        return cls(layer.in_features, layer.weight.device if device is None else device, layer.out_features)

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        layers: Sequence[WeightSite],
        batches: Iterable[Batch],
        *,
        loss: Loss | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        return collect_gradients(model, layers, batches, statistic=cls, progress=progress, loss=loss)

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
        loss: by default what the batches imply, see `sparseprune.models.losses.loss_of`.

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
    check_batches(model, batches)
    batches = processes.share(batches)
    statistics: dict[str, Any] = {layer.name: statistic.of(layer) for layer in layers}
    with (
        torch.enable_grad(),
        evaluation_mode(model),
        no_cache(model),
        _gradients_to(model, layers, statistics),
    ):
        for batch in track(batches, "gradients", enabled=progress):
            value = loss_of(model, batch, loss)
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
            statistic.update(layer.matrix(gradient))
        except FloatingPointError:
            raise ValueError(
                f"batches: the gradient of {layer.name} must be finite, got NaN or Inf; check the batches, or "
                "load the model in float32"
            ) from None

    return hook
