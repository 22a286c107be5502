"""Where zeros may lie: a pattern, and the mask that keeps a score's best positions in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Pattern", "Scope", "mask_from_scores", "removed"]

Scope = Literal["row", "layer"]

# Up to here sorting a slice beats selecting its threshold (11008x4096 in groups of 4: 0.5 s against 1.2 s).
_SORT_LENGTH = 32


@dataclass(frozen=True)
class Pattern:
    """`n` of each `m` neighbouring columns are kept; with both 0, any weights at all ("unstructured")."""

    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if (self.n, self.m) != (0, 0) and not 1 <= self.n < self.m:
            raise ValueError(
                f"pattern: N:M needs 1 <= N < M, got {self.n}:{self.m}; 2:4 keeps 2 of each 4 columns"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """From "2:4", "4:8", any "N:M", or "unstructured"; `str()` gives it back."""
        if isinstance(text, Pattern):
            return text
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'pattern: must be "N:M" such as "2:4", or "unstructured", got {text!r}')
        n, m = int(match[1]), int(match[2])
        if m == 0:  # 0:0 is how the unstructured pattern is stored, nobody means it by writing so
            raise ValueError(f"pattern: N:M needs 1 <= N < M, got {text}; 2:4 keeps 2 of each 4 columns")
        return cls(n, m)

    @property
    def structured(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else "unstructured"

    def resolve_sparsity(self, sparsity: float | None) -> float:
        """The fraction of weights to remove: N:M implies it, unstructured needs it.

        Raises:
            ValueError: `sparsity` is missing, outside [0, 1), or not the one that N:M implies.
        """
        if sparsity is not None and not 0 <= sparsity < 1:  # NaN fails too
            raise ValueError(
                f"sparsity: must be in [0, 1), got {sparsity}; pass the fraction of weights to remove"
            )
        if not self.structured:
            if sparsity is None:
                raise ValueError(
                    "sparsity: must be given for the unstructured pattern; pass 0.5 to remove half"
                )
            return float(sparsity)
        implied = 1 - self.n / self.m
        if sparsity is not None and abs(sparsity - implied) > 1e-6:
            raise ValueError(
                f"sparsity: pattern {self} removes {implied:g}, got {sparsity}; leave it out, or pass "
                'pattern="unstructured"'
            )
        return implied

    def check_columns(self, columns: int, owner: str = "scores") -> None:
        """Raises ValueError, naming `owner`, unless `columns` is a multiple of m."""
        if self.structured and columns % self.m:
            raise ValueError(
                f"{owner}: columns must be a multiple of {self.m} for {self}, got {columns}; exclude the "
                'layer, or use pattern="unstructured"'
            )


def removed(count: int, sparsity: float) -> int:
    """How many of `count` weights go: the nearest integer, halves to the even one."""
    return round(count * sparsity)


def mask_from_scores(
    scores: Tensor, pattern: Pattern | str, sparsity: float | None = None, scope: Scope = "row"
) -> Tensor:
    """The positions to keep, bool [rows, columns]: those with the highest scores.

    Args:
        scores: floating point [rows, columns], finite.
        sparsity: for the unstructured pattern, in [0, 1); see `Pattern.resolve_sparsity`.
        scope: what the unstructured pattern ranks together, each row or the whole matrix. N:M ranks in its
            groups.

    The number kept is exact: n of each group, or all but `removed(columns, sparsity)` of each row, or all but
    `removed(rows * columns, sparsity)`. Of equal scores the first in row-major order is kept, so that the
    same scores give the same mask everywhere.

    Raises:
        ValueError: not such a matrix, NaN or Inf in it, or an argument out of range.
    """
    pattern = Pattern.parse(pattern)
    sparsity = pattern.resolve_sparsity(sparsity)
    check_scope(scope)
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores: must be floating point [rows, columns], got {scores.dtype} {list(scores.shape)}"
        )
    pattern.check_columns(scores.shape[1])
    if not scores.isfinite().all():
        raise ValueError("scores: must be finite, got NaN or Inf; check the weights and the calibration data")
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern.structured:
        return _keep_top(scores.reshape(-1, pattern.m), pattern.n).reshape(scores.shape)
    slices = scores if scope == "row" else scores.reshape(1, -1)
    length = slices.shape[1]
    return _keep_top(slices, length - removed(length, sparsity)).reshape(scores.shape)


def check_scope(scope: str) -> None:
    if scope not in ("row", "layer"):
        raise ValueError(f'scope: must be "row" or "layer", got {scope!r}')


def _keep_top(scores: Tensor, keep: int) -> Tensor:
    """Marks the `keep` highest of each row of [slices, length]; among equals the first."""
    slices, length = scores.shape
    if keep in (0, length):
        return torch.full((slices, length), keep > 0, dtype=torch.bool, device=scores.device)
    if length <= _SORT_LENGTH:
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        return torch.zeros((slices, length), dtype=torch.bool, device=scores.device).scatter_(1, order, True)
    threshold = scores.kthvalue(length - keep + 1, dim=1, keepdim=True).values
    above = scores > threshold
    equal = scores == threshold
    vacant = keep - above.sum(dim=1, keepdim=True)
    # only rows with more equals than vacancies need the count along the row, and mostly there are none
    crowded = (equal.sum(dim=1, keepdim=True) > vacant).flatten()
    if crowded.any():
        equal[crowded] &= equal[crowded].cumsum(dim=1, dtype=torch.int64) <= vacant[crowded]
    return above | equal
