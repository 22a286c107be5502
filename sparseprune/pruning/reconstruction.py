"""Block-wise reconstruction: a pruned block learns to give what the dense model's block gives.

The weights that are left (and the block's norms and biases) minimize the mean over tokens of ||y - y'||^2 / ||y||^2 by
Adam: y the dense block's output on the dense model's inputs, y' the pruned block's on inputs from the pruned blocks
before it, so that each block also undoes what the earlier ones lost. As in BRECQ (Li et al. 2021) and EBFT (Guo et al.
2024); no labels, and one block of gradients in memory. Two things are ours, and measured: each token counts relative
to its own size, as the next block's norm will read it (a few tokens with massive activations outweigh all others
otherwise), and the learning rate is relative to the size of the weights, so that one value serves any model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import processes
from sparseprune.models.modules import evaluation_mode
from sparseprune.pruning.options import Reconstruction
from sparseprune.pruning.report import BlockReconstructed
from sparseprune.pruning.rewrite import Rewriter
from sparseprune.pruning.zeros import Zeros
from sparseprune.statistics.walk import Walk, run_block

__all__ = ["reconstruct"]


def reconstruct(
    name: str,
    block: nn.Module,
    index: int,
    zeros: Zeros,
    walk: Walk,
    targets: Sequence[Tensor],
    options: Reconstruction,
    rewriter: Rewriter,
) -> BlockReconstructed:
    """Trains block `index` of the walk on its hidden states towards `targets`, one [batch, tokens, features] a batch.

    Args:
        zeros: of the block.

    The block's parameters that are floating point are trained, in float32; passes run in the walk's precision. If the
    outcome is no better than the beginning, the beginning is kept. Where `torch.distributed` runs several processes,
    each holds its share of the batches, and gradients are added up.
    """
    trained = [it for it in block.parameters() if it.is_floating_point()]
    for parameter in trained:
        rewriter.remember(parameter)
    pairs = zip(targets, walk.masks, strict=True)
    weights = [_token_weights(target, mask) for target, mask in pairs]
    tokens = processes.total(sum(int(it.count_nonzero()) for it in weights)) or 1
    precision = walk
    if walk.autocast is None and trained[0].dtype in (torch.float16, torch.bfloat16):
        # float32 weights meet hidden states, masks and positions of the model's own dtype
        precision = replace(walk, autocast=trained[0].dtype)

    def loss(batch: int) -> Tensor:
        with evaluation_mode(block), precision.precision():
            output = run_block(block, walk.hidden[batch], walk.calls[index][batch])
        squares = (output.float() - targets[batch].float()).square().sum(dim=-1)
        return (squares * weights[batch]).sum() / tokens

    def total() -> float:
        with torch.no_grad():
            return processes.total(float(sum(loss(batch) for batch in range(len(targets)))))

    start = [it.detach().clone() for it in trained]
    before = total()
    with _training(trained), torch.enable_grad():
        _train(trained, zeros, loss, len(targets), options, index)
    after = total()
    if not after < before:  # NaN too
        for parameter, value in zip(trained, start, strict=True):
            parameter.data = value
        after = before
    return BlockReconstructed(name, before, after, options.epochs)


def _token_weights(target: Tensor, mask: Tensor | None) -> Tensor:
    """1 / ||y||^2 [batch, tokens] of the targets [batch, tokens, features]; 0 for a padded token or one of zeros."""
    energy = target.float().square().sum(dim=-1)
    weights = torch.where(energy > 0, 1 / energy, 0)
    return weights if mask is None else weights * mask.to(weights.device)


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
    zeros: Zeros,
    loss: Callable[[int], Tensor],
    batches: int,
    options: Reconstruction,
    index: int,
) -> None:
    optimizer = torch.optim.Adam(_groups(parameters), betas=(0.9, 0.95), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(options.seed + index)
    count = processes.world_size()
    most = math.ceil(processes.total(batches) / count)  # a process may have one batch less than others
    steps = options.epochs * math.ceil(most / options.batch)
    step = 0
    with zeros.held(optimizer):
        for _ in range(options.epochs):
            order = torch.randperm(batches, generator=generator)
            for first in range(0, most, options.batch):
                for batch in order[first : first + options.batch].tolist():  # one by one: lengths may differ
                    loss(batch).backward()
                processes.add_gradients(parameters)
                rise, fall = (step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps))
                for group, size in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = options.learning_rate * size * min(1.0, rise) * fall
                optimizer.step()
                optimizer.zero_grad()
                step += 1


def _groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """One group per parameter, its "lr" the root mean square of what is not zero in it; of the matrices, if all is."""
    sizes = [_rms(parameter) for parameter in parameters]
    matrices = [size for size, it in zip(sizes, parameters, strict=True) if it.ndim > 1 and size > 0]
    usual = sum(matrices) / len(matrices) if matrices else 1.0
    return [{"params": [it], "lr": size or usual} for it, size in zip(parameters, sizes, strict=True)]


def _rms(parameter: nn.Parameter) -> float:
    kept = max(int(parameter.count_nonzero()), 1)
    return float(parameter.detach().square().sum() / kept) ** 0.5
