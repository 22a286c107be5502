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

__all__ = ["compensated", "damped"]

_DAMPINGS = (0.01, 0.1, 1.0)


def damped(gram: Tensor) -> tuple[float, Tensor]:
    """What was added to the diagonal, and the lower Cholesky factor [n, n], float64.

    The least of a ladder of fractions of the diagonal's mean under which the matrix is positive definite.

    Raises:
        ValueError: not finite, or not positive definite whatever is added, so that it is no Gram matrix.
    """
    if not gram.isfinite().all():
        raise ValueError("gram: must be finite, got NaN or Inf; check the calibration data")
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    # inputs that are zero throughout: any positive damping will do, nothing is there to make up for
    for fraction in _DAMPINGS:
        addition = fraction * mean if mean > 0 else 1.0
        factor, info = torch.linalg.cholesky_ex(
            gram + addition * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        if int(info) == 0:
            return addition, factor
    raise ValueError("gram: must be positive semi-definite, as X^T X is; got a matrix that is not")


def compensated(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """float32 [out, kept], for weight [out, in], gram [in, in] and `keep` int64 [kept] sorted."""
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[keep] = False
    gone = mask.nonzero().flatten().to(gram.device)
    keep = keep.to(gram.device)
    _, factor = damped(gram[keep][:, keep])
    weight = weight.double()
    correction = weight[:, gone] @ gram[gone][:, keep].double()
    return (weight[:, keep] + torch.cholesky_solve(correction.t(), factor).t()).float()
