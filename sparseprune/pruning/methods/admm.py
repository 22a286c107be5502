"""ADMM-Grad (Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models").

Minimizes ||X W^T - X W0^T||^2 over weights of the pattern by the alternating direction method of multipliers:
the weights W follow the outputs, their copy Z holds the pattern, U sums up what they disagree by. Channels are
scaled to a unit diagonal of G first, so that |W + U| ranks weights by what they do. The sparsity rises by a
cubic over the first steps, then the mask stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparseprune.pruning.base import Method, Pruned, Target
from sparseprune.pruning.methods.gram import cached, unit_diagonal
from sparseprune.pruning.patterns import Pattern, keep_best, removed
from sparseprune.statistics.inputs import Gram

__all__ = ["ADMM", "admm_solve", "gradual_mask"]

_ITERATIONS = 20
_MASK_ITERATIONS = 15
_DAMPING = 0.1


def admm_solve(weight: Tensor, statistic: Gram, target: Target) -> Pruned:
    """Mask and weights of `target` for weight float32 [out, in].

    With n = sqrt(diag G), G scaled to unit diagonal and 10 % added to it, W0 = W n, rho = 1: 20 times
    Z = (W + U) . M, U += W - Z, W = (G + rho I)^-1 (G W0 + rho (Z - U)), the mask M of |W + U| at sparsity
    s_t = s - s (1 - (t + 1) / 15)^3 up to t = 14; the result is Z / n. Counts are exact, as `target` says.

    Raises:
        ValueError: a shape the pattern does not divide, NaN or Inf in the Gram matrix, or one that is none.
    """
    target.pattern.check_shape(*weight.shape)
    norm, inverse = cached(statistic, "admm", lambda: _scaled_inverse(statistic))
    norm, inverse = norm.to(weight.dtype), inverse.to(weight.dtype)
    scaled = weight * norm
    # (G + I)^-1 G W0 = W0 - (G + I)^-1 W0: the layer's own part of every step, computed once
    own = torch.addmm(scaled, scaled, inverse, alpha=-1)
    current, dual = scaled, torch.zeros_like(scaled)
    mask = torch.ones_like(scaled, dtype=torch.bool)
    copy = scaled
    for step in range(_ITERATIONS):
        total = current + dual
        if step < _MASK_ITERATIONS:
            share = 1 - (1 - (step + 1) / _MASK_ITERATIONS) ** 3
            mask = gradual_mask(total.square(), target, share)
        copy = torch.where(mask, total, 0)
        dual = total - copy
        if step + 1 < _ITERATIONS:
            current = torch.addmm(own, copy - dual, inverse)
    return Pruned(copy / norm, mask)


def gradual_mask(scores: Tensor, target: Target, share: float) -> Tensor:
    """The mask on the way to `target` [out, in] that removes `share` of what `target` will.

    N:M has few steps of its own: of the weights that its mask of these scores would remove, the lowest `share`
    of the layer go.
    """
    if not target.pattern.structured:
        return replace(target, sparsity=share * target.sparsity).mask(scores)
    final = target.mask(scores)
    candidates = scores[~final][None]
    final[~final] = keep_best(candidates, Pattern(), "layer", lambda count: removed(count, share))[0]
    return final


def _scaled_inverse(gram: Gram) -> tuple[Tensor, Tensor]:
    """n float32 [in], and (G + (0.1 + rho) I)^-1 float32 [in, in] for G of unit diagonal, rho = 1."""
    norm, scaled = unit_diagonal(gram, _DAMPING)
    lifted = scaled.matrix.clone()
    lifted.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(lifted))
    dead = gram.matrix.diagonal() <= 0
    inverse[dead, dead] = 0  # no input, no step: such a channel's weights stay what they were
    return norm.float(), inverse.float()


ADMM = Method("admm", solve=admm_solve, statistic=Gram)
