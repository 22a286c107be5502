"""What solvers take from a Gram matrix G = X^T X: damped, factored, computed once for layers that share it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparseprune.statistics.inputs import Gram

__all__ = ["Damped", "cached", "checked", "damped", "inverse_factor", "unit_diagonal"]

# A damping that is not enough is raised by these in turn.
_LADDER = (1, 10, 100, 1000)

_Result = TypeVar("_Result")
_caches: WeakKeyDictionary[Gram, tuple[Hashable, dict[Hashable, Any]]] = WeakKeyDictionary()


class Damped(NamedTuple):
    """A positive definite matrix, its lower Cholesky factor (both float64), and what its diagonal grew by."""

    matrix: Tensor
    factor: Tensor
    damping: float


def cached(gram: Gram, key: Hashable, build: Callable[[], _Result]) -> _Result:
    """`build()`, once for each Gram and key: a query, key and value projection share their inputs.

    Results live as long as `gram` does, and are built anew after it has seen more tokens.
    """
    state = (gram.tokens, id(gram.matrix), 0 if gram.matrix.is_inference() else gram.matrix._version)
    known_state, results = _caches.get(gram, (state, {}))
    if known_state != state:
        results = {}
    if key not in results:
        results[key] = build()
    _caches[gram] = (state, results)
    return results[key]  # type: ignore[no-any-return]


def checked(gram: Gram) -> Tensor:
    """The matrix of `gram`, float32 [in, in].

    Raises:
        ValueError: NaN or Inf in it.
    """

    def check() -> None:
        if not gram.matrix.isfinite().all():
            raise ValueError(
                "statistic: the Gram matrix must be finite, got NaN or Inf; check the calibration data, or "
                "run the model in float32"
            )

    cached(gram, "finite", check)
    return gram.matrix


def damped(matrix: Tensor, damping: float) -> Damped:
    """A symmetric matrix [in, in] + damping x mean(diagonal) I, positive definite: a damping that is not enough
    is raised tenfold, three times at most. A matrix of zeros becomes the identity: what no input reaches is judged by its weights alone.

    A raised damping is warned of (`RuntimeWarning`): rounding, or few tokens in low precision, made
    the matrix indefinite, and the solvers then trust it less.

    Raises:
        ValueError: no damping is enough, so that it is not a Gram matrix at all.
    """
    matrix = matrix.double()
    mean = float(matrix.diagonal().mean()) or 1.0
    for raised in _LADDER:
        lifted = matrix.clone()
        lifted.diagonal().add_(raised * damping * mean)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if not failed.item() and factor.isfinite().all():
            if raised > 1:
                warnings.warn(
                    f"a Gram matrix of {matrix.shape[0]} channels is not positive definite with "
                    f"{damping:.0%} damping; went on with {raised * damping:.0%}. More calibration tokens help",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return Damped(lifted, factor, raised * damping)
    raise ValueError(
        f"statistic: must be a Gram matrix X^T X, got one that is not positive definite with {_LADDER[-1] * damping:.0%} "
        "damping; collect it again in float32"
    )


def unit_diagonal(gram: Gram, damping: float) -> tuple[Tensor, Damped]:
    """n = sqrt(diag G) float64 [in], and G / n n^T with its diagonal of ones damped.

    Unlike a share of the mean, which a few outlier channels make too much for all others, this damping suits
    each channel. A channel that is always zero gets an n below all others.

    Raises:
        ValueError: NaN or Inf in G, or no Gram matrix.
    """
    matrix = checked(gram).double()
    norm = matrix.diagonal().clamp_min(0).sqrt()
    live = norm > 0
    norm = norm.where(live, 1e-3 * float(norm[live].min()) if live.any() else 1.0)
    scaled = matrix / norm / norm[:, None]
    return norm, damped(scaled.fill_diagonal_(1), damping)


def inverse_factor(gram: Gram, damping: float = 0.01) -> Tensor:
    """Upper triangular R, float32 [in, in], with R^T R = H^-1 and H the damped Gram matrix.

    Row j is what the best update of columns j, j+1, ... looks like when column j is set to zero and the ones
    before it are fixed already: delta = -w_j / R_jj x R_j,:, at a cost of (w_j / R_jj)^2.
    """
    return cached(gram, ("inverse factor", damping), lambda: _inverse_factor(checked(gram), damping))


def _inverse_factor(matrix: Tensor, damping: float) -> Tensor:
    # With the channels in reverse, H = L L^T; turned back, L is an upper U with H = U U^T, and R = U^-1. One
    # factorization of H itself, where inverting H and factoring the inverse would square its condition.
    reverse = damped(matrix.flip(0, 1), damping).factor
    identity = torch.eye(len(matrix), dtype=reverse.dtype, device=reverse.device)
    inverse = torch.linalg.solve_triangular(reverse, identity, upper=False)
    return inverse.flip(0, 1).float()
