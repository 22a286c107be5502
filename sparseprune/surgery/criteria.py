"""How much a neuron, a head or a group of heads matters: one number each, the smallest go.

A unit is a set of channels of the linear that reads it (`consumer`), together with the rows that make it. W is the
consumer's weight [out, in], G = X^T X the Gram matrix of its inputs, W_u and G_uu the unit's part of them.

- l1: sum of |w| over the unit's rows and columns (Li et al. 2017, "Pruning Filters for Efficient ConvNets").
- activation: ||X_u W_u^T||_F = tr(W_u G_uu W_u^T)^(1/2), what the unit adds to the output.
- taylor: sum over tokens of |sum over the unit of a da|, a its activations, da their gradients: what the loss would
  change by, to first order (Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
  Inference").
- obs: tr(W_u ([G^-1]_uu)^-1 W_u^T), what the output loses at least once the units that stay make up for it, greedily,
  with G^-1 and W updated as units go (Hassibi and Stork 1993; for structures Kurtic et al. 2023, "ZipLM").
- random: seeded, the control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import no_cache
from sparseprune.models.losses import Loss, loss_of
from sparseprune.models.modules import evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track
from sparseprune.surgery.compensation import damped

__all__ = ["CRITERIA", "activation", "l1", "obs_removed", "taylor"]

CRITERIA = ("activation", "l1", "obs", "random", "taylor")


def l1(consumer: Tensor, channels: Tensor, producers: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Tensor:
    """float32 [units], for `channels` int64 [units, size] of the consumer's weight [out, in].

    producers: of each its weight [out, in], and for each unit its rows.
    """
    total = consumer.float().abs().sum(dim=0)[channels].sum(dim=1)
    for weight, rows in producers:
        of_rows = weight.float().abs().sum(dim=1)
        total += torch.stack([of_rows[it.to(of_rows.device)].sum() for it in rows])
    return total


def activation(weight: Tensor, gram: Tensor, channels: Tensor) -> Tensor:
    """float32 [units], for weight [out, in], `gram` [in, in], or its diagonal [in] if units are one channel each."""
    columns = weight.float().t()[channels]  # [units, size, out]
    if gram.ndim == 1:
        inner = gram.float()[channels].unsqueeze(2)
    else:
        inner = gram.float()[channels.unsqueeze(2), channels.unsqueeze(1)]
    return ((inner @ columns) * columns).sum(dim=(1, 2)).clamp_min(0).sqrt()


def obs_removed(
    weight: Tensor, gram: Tensor, channels: Tensor, quota: Mapping[int, int], owner: Tensor
) -> list[int]:
    """Which units go, in the order in which they go.

    Args:
        channels: int64 [units, size].
        quota: how many units of each owner go.
        owner: int64 [units].
    """
    size = channels.shape[1]
    # float32 from here on: the damping bounds the condition number, and each step only downdates
    inverse = torch.cholesky_inverse(damped(gram)[1]).float()
    weight = weight.float().clone()
    left = dict(quota)
    total = sum(left.values())
    # a 32nd of them at a time: one at a time is no better and costs a pass over G^-1 for each of a thousand neurons
    step = max(1, total // 32)
    gone: list[int] = []
    is_gone = torch.zeros(len(channels), dtype=torch.bool, device=weight.device)
    while len(gone) < total:
        cost = _cost(weight, inverse, channels, size).masked_fill(is_gone, torch.inf)
        chosen: list[int] = []
        for unit in cost.argsort(stable=True).tolist():
            if len(chosen) == min(step, total - len(gone)):
                break
            if left[int(owner[unit])] > 0:
                left[int(owner[unit])] -= 1
                chosen.append(unit)
        index = channels[chosen].flatten()
        # G^-1 of the rest, and the rest's least-squares weights; rows and columns of what goes become zero
        solved = torch.linalg.solve(inverse[index][:, index], inverse[index])
        weight.addmm_(weight[:, index], solved, alpha=-1)
        inverse.addmm_(inverse[:, index], solved, alpha=-1)
        # an identity block where nothing is left keeps later divisions by it defined
        inverse[index, :] = 0
        inverse[:, index] = 0
        inverse[index, index] = 1
        weight[:, index] = 0
        is_gone[chosen] = True
        gone += chosen
    return gone


def _cost(weight: Tensor, inverse: Tensor, channels: Tensor, size: int) -> Tensor:
    """tr(W_u ([G^-1]_uu)^-1 W_u^T) of each unit."""
    if size == 1:
        return (weight.square().sum(dim=0) / inverse.diagonal())[channels.flatten()]
    blocks = inverse[channels.unsqueeze(2), channels.unsqueeze(1)].double()
    columns = weight.t()[channels].double()  # [units, size, out]
    return (torch.linalg.solve(blocks, columns) * columns).sum(dim=(1, 2))


def taylor(
    model: nn.Module,
    consumers: Sequence[WeightSite],
    channels: Sequence[Tensor],
    data: CalibrationData,
    loss: Loss | None,
    progress: bool = False,
) -> list[Tensor]:
    """For each consumer float32 [units]: sum over tokens of |sum over the unit's channels of a da|.

    `channels`: int64 [units, size] of each consumer.
    """
    totals = [torch.zeros(len(it)) for it in channels]
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def change(given: Tensor) -> Tensor:
            inputs[name] = given if given.requires_grad else given.detach().requires_grad_()
            return inputs[name]

        return change

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        stack.enter_context(torch.enable_grad())
        for layer in consumers:
            stack.enter_context(layer.changing_inputs(keep(layer.name)))
        for batch in track(data, "gradients", total=len(data), enabled=progress):
            inputs.clear()
            value = loss_of(model, batch, loss)
            missing = next((layer.name for layer in consumers if layer.name not in inputs), None)
            if missing is not None:
                raise ValueError(
                    f"batches: must reach every layer, {missing} did not run; pass others, or exclude it"
                )
            # grad, not backward: parameters keep their own gradients
            found = torch.autograd.grad(value, [inputs[layer.name] for layer in consumers], allow_unused=True)
            for layer, units, total, gradient in zip(consumers, channels, totals, found, strict=True):
                if gradient is None:
                    raise ValueError(
                        f"loss: must depend on {layer.name}, it does not; pass another, or exclude it"
                    )
                product = (inputs[layer.name].detach() * gradient).float().reshape(-1, layer.in_features)
                total += product[:, units.to(product.device)].sum(dim=2).abs().sum(dim=0).cpu()
    return totals
