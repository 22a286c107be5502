"""Where zeros may lie: a pattern, and the mask that keeps a score's best positions in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseprune.memory import all_finite
from sparseprune.options import require_share

__all__ = ["Pattern", "Scope", "keep_best", "mask_from_scores", "removed"]

Scope = Literal["row", "layer"]

# Up to here sorting a slice beats selecting its threshold (11008x4096 in groups of 4: 0.5 s against 1.2 s).
_SORT_LENGTH = 32
# scores looked at together: sorting takes 24 bytes for each, and slices have nothing to do with each other
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie.

    N:M: `n` of each `m` neighbouring columns are kept. Blocks: `rows` x `columns` neighbouring weights are
    kept or removed together. With all 0, any weights at all ("unstructured").
    """

    n: int = 0
    m: int = 0
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        if (self.n, self.m) != (0, 0) and not 1 <= self.n < self.m:
            raise ValueError(
                f"pattern: N:M needs 1 <= N < M, got {self.n}:{self.m}; 2:4 keeps 2 of each 4 columns"
            )
        if (self.rows, self.columns) == (0, 0):
            return
        if self.m or min(self.rows, self.columns) < 1 or self.rows * self.columns == 1:
            raise ValueError(
                f"pattern: a block RxC needs R, C >= 1 and more than one weight, got {self.rows}x"
                f'{self.columns}; 16x1 removes 16 rows of a column together, "unstructured" single weights'
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """From "2:4", "4:8", any "N:M", a block "16x1", or "unstructured"; `str()` gives it back."""
        if isinstance(text, Pattern):
            return text
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d{1,4})([:x])(\d{1,4})", text) if isinstance(text, str) else None
        if match is None:
            cut = "; whole neurons, heads and layers are cut out: sparseprune.cut"
            hint = cut if text in ("neurons", "heads", "layers") else ""
            raise ValueError(
                'pattern: must be "N:M" such as "2:4", a block of rows x columns such as "16x1", or '
                f'"unstructured", got {text!r}{hint}'
            )
        first, second = int(match[1]), int(match[3])
        if match[2] == "x":
            if first == second == 0:  # zeros are how their absence is stored, nobody means it by writing so
                raise ValueError(f"pattern: a block RxC needs R, C >= 1, got {text}; such as 16x1")
            return cls(rows=first, columns=second)
        if second == 0:
            raise ValueError(f"pattern: N:M needs 1 <= N < M, got {text}; 2:4 keeps 2 of each 4 columns")
        return cls(first, second)

    @property
    def structured(self) -> bool:
        """Whether it is N:M, which implies the sparsity and what is ranked together."""
        return self.m > 0

    @property
    def block(self) -> tuple[int, int]:
        """The rows and columns that are kept or removed together, (1, 1) where each weight is on its own."""
        return (self.rows or 1, self.columns or 1)

    def __str__(self) -> str:
        if self.structured:
            return f"{self.n}:{self.m}"
        return f"{self.rows}x{self.columns}" if self.rows else "unstructured"

    def resolve_sparsity(self, sparsity: float | None) -> float:
        """The fraction of weights to remove: N:M implies it, the other patterns need it.

        Raises:
            ValueError: `sparsity` is missing, outside [0, 1), or not the one that N:M implies.
        """
        require_share("pass the fraction of weights to remove", sparsity=sparsity)
        if not self.structured:
            if sparsity is None:
                kind = f"block pattern {self}" if self.rows else "unstructured pattern"
                raise ValueError(f"sparsity: must be given for the {kind}; pass 0.5 to remove half")
            return float(sparsity)
        implied = 1 - self.n / self.m
        if sparsity is not None and abs(sparsity - implied) > 1e-6:
            raise ValueError(
                f"sparsity: pattern {self} removes {implied:g}, got {sparsity}; leave it out, or pass "
                'pattern="unstructured"'
            )
        return implied

    def check_shape(self, rows: int, columns: int, owner: str = "scores") -> None:
        """Raises ValueError, naming `owner`, unless the pattern divides a matrix [rows, columns]."""
        sizes = (("rows", rows, self.block[0]), ("columns", columns, self.m or self.block[1]))
        for side, size, unit in sizes:
            if size % unit:
                raise ValueError(
                    f"{owner}: {side} must be a multiple of {unit} for {self}, got {size}; exclude the "
                    'layer, or use pattern="unstructured"'
                )


def removed(count: int, sparsity: float) -> int:
    """How many of `count` weights, or blocks, go: the nearest integer, halves to the even one."""
    return round(count * sparsity)


def mask_from_scores(
    scores: Tensor, pattern: Pattern | str, sparsity: float | None = None, *, scope: Scope = "row"
) -> Tensor:
    """The positions to keep, bool [rows, columns]: those with the highest scores.

    Args:
        scores: floating point [rows, columns], finite.
        sparsity: in [0, 1), but for N:M, which implies it; see `Pattern.resolve_sparsity`.
        scope: what is ranked together, each row (with blocks, each strip of their height) or the whole
            matrix. N:M ranks in its groups. A block's score is the sum over its weights.

    The number kept is exact: n of each group, or all but `removed(columns, sparsity)` of each row, or all but
    `removed(rows * columns, sparsity)`, counted in blocks where there are blocks. Of equal scores the first in row-major order is kept, so that the
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
    pattern.check_shape(*scores.shape)
    if not all_finite(scores):
        raise ValueError("scores: must be finite, got NaN or Inf; check the weights and the calibration data")
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern.structured:
        return _keep_top(scores.reshape(-1, pattern.m), pattern.n).reshape(scores.shape)
    return keep_best(scores, pattern, scope, lambda count: removed(count, sparsity))


def keep_best(scores: Tensor, pattern: Pattern, scope: Scope, remove: Callable[[int], int]) -> Tensor:
    """`mask_from_scores` for single weights or blocks, by count: `remove` is told how many units, weights or
    blocks, are ranked together, and answers how many of them go.
    """
    height, width = pattern.block
    units = scores
    if pattern.rows:
        grid = scores.reshape(scores.shape[0] // height, height, scores.shape[1] // width, width)
        units = grid.sum(dim=(1, 3))
    slices = units if scope == "row" else units.reshape(1, -1)
    length = slices.shape[1]
    mask = _keep_top(slices, length - remove(length)).reshape(units.shape)
    return mask.repeat_interleave(height, 0).repeat_interleave(width, 1) if pattern.rows else mask


def check_scope(scope: str) -> None:
    if scope not in ("row", "layer"):
        raise ValueError(f'scope: must be "row" or "layer", got {scope!r}')


def _keep_top(scores: Tensor, keep: int) -> Tensor:
    """Marks the `keep` highest of each row of [slices, length]; among equals the first."""
    slices, length = scores.shape
    if keep in (0, length):
        return torch.full((slices, length), keep > 0, dtype=torch.bool, device=scores.device)
    chunk = max(1, _CHUNK // length)
    if slices > chunk:
        mask = torch.empty((slices, length), dtype=torch.bool, device=scores.device)
        for part, place in zip(scores.split(chunk), mask.split(chunk), strict=True):
            place.copy_(_keep_top(part, keep))
        return mask
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
