"""Least squares on a fixed mask: the weights that stay take over what they can of the ones that left.

For each output row, (w - w0)^T H (w - w0) is minimized over the w that are zero outside the mask, by conjugate
gradients preconditioned with H's diagonal, all rows at once: one product with H an iteration, where solving
each row's normal equations would cost a Cholesky factorization a row. As in ALPS (Meng et al. 2024, "ALPS:
Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models"), which ends so too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.pruning.methods.gram import cached, unit_diagonal
from sparseprune.statistics.inputs import Gram

__all__ = ["least_squares_update"]


def least_squares_update(
    weight: Tensor,
    mask: Tensor,
    statistic: Gram,
    damping: float = 0.1,
    iterations: int = 60,
    tolerance: float = 1e-3,
) -> Tensor:
    """The best weights float32 [out, in], zero outside `mask` [out, in], for the dense `weight`.

    H is G with its diagonal times 1 + `damping`, which pulls towards the dense weights: where the inputs do not
    determine a weight it keeps its value, as in a channel that is always zero.

    Args:
        damping: 0.1 rather than 0.01: on layers of SmolLM2 calibrated with 8192 tokens it loses 3 % more on
            them and 3 % less on others.
        iterations: at most so many.
        tolerance: a row is done when its residual, in the preconditioner's norm, has fallen to this share.

    Raises:
        ValueError: NaN or Inf in the Gram matrix, or one that is none.
    """
    norm, scaled = cached(statistic, ("unit diagonal", damping), lambda: unit_diagonal(statistic, damping))
    norm, matrix = norm.to(weight.dtype), scaled.matrix.to(weight.dtype)
    # With H scaled to an even diagonal the preconditioner is the identity. The unknown is what the kept weights
    # gain; the removed ones' effect on their residual is where it starts.
    dense = weight * norm
    change = torch.where(mask, 0, -dense)
    residual = (change @ matrix).mul_(mask).neg_()
    gain = torch.zeros_like(dense)
    direction = residual.clone()
    energy = residual.square().sum(dim=1, keepdim=True)
    enough = energy * tolerance**2
    for _ in range(iterations):
        going = energy > enough
        if not going.any():
            break
        product = (direction @ matrix).mul_(mask)
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(going, energy / curvature, 0)
        gain.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(going, energy / before, 0)).add_(residual)
    return torch.where(mask, weight + gain / norm, 0)
