"""What stays makes up for what goes: least squares on the inputs that a linear keeps.

With inputs X (tokens x in), G = X^T X, kept channels k and removed ones r, the weights W' of the kept channels that
minimise ||X W^T - X_k W'^T||^2 + d ||W' - W_k||^2 are

    W' = W_k + W_r G_rk (G_kk + d I)^-1,

of which W' = W G_:k G_kk^-1 is the limit for d = 0. Pulling to W_k, and not to zero, leaves channels alone that the
calibration data says nothing about.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compensated", "damped", "damping_fraction"]

_LEAST = 0.01


def damped(gram: Tensor, fraction: float = _LEAST) -> tuple[float, Tensor]:
    """What was added to the diagonal, and the lower Cholesky factor [n, n], float64.

    Added is `fraction` of the diagonal's mean, ten times as much where that is not positive definite.

    Raises:
        ValueError: not finite, or not positive definite whatever is added, so that it is not a Gram matrix.
    """
    if not gram.isfinite().all():
        raise ValueError("gram: must be finite, got NaN or Inf; check the calibration data")
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    for _ in range(3):
        # inputs that are zero throughout: any addition will do, nothing is there to make up for
        addition = fraction * mean if mean > 0 else 1.0
        diagonal = addition * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram + diagonal)
        if int(info) == 0:
            return addition, factor
        fraction *= 10
    raise ValueError("gram: must be positive semi-definite, as X^T X is; got a matrix that is not")


def compensated(weight: Tensor, gram: Tensor, tokens: int, keep: Tensor) -> Tensor:
    """float32 [out, kept], for weight [out, in], gram [in, in] over so many tokens, `keep` int64 [kept] sorted.

    d is 2 kept / tokens of the diagonal's mean, at least 1 %: with few tokens for the channels, what the sample says of
    their correlations is mostly noise. On SmolLM2 (8192 tokens, 1152 channels) the error on other text is within 2 % of
    the least for any fraction from 0.3 to 1, and a fifth above it for 1 %.
    """
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[keep] = False
    gone = mask.nonzero().flatten().to(gram.device)
    keep = keep.to(gram.device)
    _, factor = damped(gram[keep][:, keep], damping_fraction(len(keep), tokens))
    weight = weight.double()
    correction = weight[:, gone] @ gram[gone][:, keep].double()
    return (weight[:, keep] + torch.cholesky_solve(correction.t(), factor).t()).float()


def damping_fraction(kept: int, tokens: int) -> float:
    return min(max(2 * kept / max(tokens, 1), _LEAST), 1.0)
