"""Block-wise reconstruction: a pruned block learns to give what the dense model's block gives.

The weights that are left (and the block's norms and biases) minimize ||Y - Y'||^2 by Adam: Y the dense block's outputs
on the dense model's inputs, Y' the pruned block's on inputs from the pruned blocks before it, so that each block also
undoes what the earlier ones lost. As in BRECQ (Li et al. 2021) and EBFT (Guo et al. 2024); no labels, and one block of
gradients in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseprune.blockwise import Walk, run_block
from sparseprune.pruning.report import BlockReconstructed
from sparseprune.pruning.rewrite import Rewriter

__all__ = ["Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """How a block is reconstructed.

    Attributes:
        epochs: passes over the calibration batches.
        learning_rate: Adam's at its peak; it rises over the first tenth and falls to zero by a cosine.
        batch: calibration batches a step.
        seed: of their order.
    """

    epochs: int = 6
    learning_rate: float = 3e-4
    batch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: must be positive, got {self.learning_rate}")


def reconstruct(
    name: str,
    block: nn.Module,
    index: int,
    masks: Mapping[nn.Parameter, Tensor],
    walk: Walk,
    targets: Sequence[Tensor],
    options: Reconstruction,
    rewriter: Rewriter,
) -> BlockReconstructed:
    """Trains block `index` of the walk on its hidden states towards `targets`, one [batch, tokens, features] a batch.

    Args:
        masks: parameter -> bool of its shape, False where it stays zero.

    The block's parameters that are floating point are trained, in float32; passes run in the walk's precision. If the
    outcome is no better than the beginning, the beginning is kept.
    """
    trained = [it for it in block.parameters() if it.is_floating_point()]
    for parameter in trained:
        rewriter.remember(parameter)
    pairs = list(zip(targets, walk.hidden, walk.masks, strict=True))
    scale = sum(float(_squares(target, hidden, mask)) for target, hidden, mask in pairs) or 1.0

    def loss(batch: int) -> Tensor:
        with walk.precision():
            output = run_block(block, walk.hidden[batch], walk.calls[index][batch])
        return _squares(output, targets[batch], walk.masks[batch]) / scale

    def total() -> float:
        with torch.no_grad():
            return float(sum(loss(batch) for batch in range(len(targets))))

    start = [it.detach().clone() for it in trained]
    before = total()
    with _training(trained), torch.enable_grad():
        _train(trained, masks, loss, len(targets), options, index)
    after = total()
    if not after < before:  # NaN too
        for parameter, value in zip(trained, start, strict=True):
            parameter.data = value
        after = before
    return BlockReconstructed(name, before, after)


def _squares(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squared differences, without padded tokens."""
    squares = (output.float() - target.float()).square()
    return squares.sum() if mask is None else (squares.sum(dim=-1) * mask.to(squares.device)).sum()


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters in float32 and with gradients; afterwards as they were."""
    dtypes = [it.dtype for it in parameters]
    required = [it.requires_grad for it in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, dtype, flag in zip(parameters, dtypes, required, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.data = parameter.data.to(dtype)


def _train(
    parameters: Sequence[nn.Parameter],
    masks: Mapping[nn.Parameter, Tensor],
    loss: Callable[[int], Tensor],
    batches: int,
    options: Reconstruction,
    index: int,
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(options.seed + index)
    steps = options.epochs * math.ceil(batches / options.batch)
    step = 0
    for _ in range(options.epochs):
        for chosen in torch.randperm(batches, generator=generator).split(options.batch):
            for batch in chosen.tolist():  # one at a time: batches may differ in length
                loss(batch).backward()
            for parameter, mask in masks.items():
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)  # Adam never moves what never had a gradient
            rise, fall = (step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = options.learning_rate * min(1.0, rise) * fall
            optimizer.step()
            optimizer.zero_grad()
            step += 1
