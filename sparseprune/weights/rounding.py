"""Weights rounded to the nearest code, each group of columns by the scale that leaves the smallest error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseprune.kernels.codes import join_nibbles
from sparseprune.kernels.packing import CODES
from sparseprune.weights.encoding import Encoding

__all__ = ["Grid", "check_scales", "codes_of", "fit_grid", "joined", "nearest", "rounded", "stored_codes"]

_SHRINK = tuple(1 - 0.03 * step for step in range(10))
"""Scales tried, as fractions of the one that reaches the largest weight: clipping it a little often pays for the rest."""


_LEAST_STEPS = 8
"""Of the scales' dtype next to 0, for the largest scale of a weight: rounding it moves the weights by 1/16 at most."""

_AT_ONCE = 1 << 19
"""Entries of the blocks of rows that are rounded one after the other: some ten copies of one in float32 are alive at a time."""


class Grid:
    """What the codes of a weight stand for: `scales` `[rows, groups]`, `minimums` likewise or None, as they are stored."""

    def __init__(self, encoding: Encoding, scales: Tensor, minimums: Tensor | None = None) -> None:
        assert encoding.scale_dtype is not None
        self.encoding = encoding
        self.scales = scales.to(encoding.scale_dtype)
        self.minimums = None if minimums is None else minimums.to(encoding.scale_dtype)

    def parts(self) -> list[Tensor]:
        """The scales, and the minimums where there are any."""
        return [self.scales] if self.minimums is None else [self.scales, self.minimums]

    def columns(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """float32 `[rows, end - begin]`: the scale of each entry, and what its code 0 stands for."""
        groups = torch.arange(begin, end, device=self.scales.device) // self.encoding.group_size
        scale = self.scales.float()[:, groups]
        if self.minimums is not None:
            return scale, self.minimums.float()[:, groups]
        return scale, scale * -CODES[self.encoding.kind].zero


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """(codes, what they stand for), float32: `weight` rounded; `scale` and what code 0 stands for broadcast to it."""
    code = CODES[encoding.kind]
    # A group of zeros has the scale 0; its code is the one that stands for 0 with any scale.
    steps = torch.where(scale == 0, float(code.zero), (weight.float() - zero) / scale)
    codes = steps.round_().clamp_(code.least, code.largest)
    return codes, codes * scale + zero


def codes_of(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(codes, what they stand for), float32 `[rows, cols]`, for a weight of that shape."""
    return nearest(weight, *grid.columns(0, weight.shape[1]), grid.encoding)


def joined(grids: Sequence[Grid], along: int = 1) -> Grid:
    """The grid of a weight whose groups of columns have these; along 0: whose blocks of rows."""
    minimums = [grid.minimums for grid in grids if grid.minimums is not None]
    scales = torch.cat([grid.scales for grid in grids], along)
    return Grid(grids[0].encoding, scales, torch.cat(minimums, along) if minimums else None)


def check_scales(weight: Tensor, grid: Grid) -> None:
    """ValueError where all of `weight` `[rows, cols]` is so small that the scales' dtype cannot tell its scales from 0."""
    dtype = grid.scales.dtype
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest and max(float(part.abs().max()) for part in grid.parts()) < _LEAST_STEPS * step:
        raise ValueError(
            f"weight: must have scales of at least {_LEAST_STEPS * step:.2g}, for {dtype} tells no finer ones apart, got "
            f"weights up to {largest:.2g}; use bfloat16 scales, or leave the layer out"
        )


def stored_codes(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes `[n]` of any dtype as `SparseWeight.values` has them."""
    return codes.to(torch.int8) if CODES[encoding.kind].bits == 8 else join_nibbles(codes.to(torch.uint8))


def rounded(weight: Tensor, encoding: Encoding, kept: Tensor | None = None) -> tuple[Tensor, Grid]:
    """(codes, int8 `[rows, cols]`, their grid): a weight of that shape rounded by the grid that fits it best (`fit_grid`).

    Memory: the codes, and what is computed of a block of rows.
    """
    rows = max(1, _AT_ONCE // max(1, weight.shape[1]))
    masks = [None] * -(-max(1, weight.shape[0]) // rows) if kept is None else kept.split(rows)
    codes, grids = [], []
    for block, mask in zip(weight.split(rows), masks, strict=True):
        grids.append(fit_grid(block, encoding, mask))
        codes.append(codes_of(block, grids[-1])[0].to(torch.int8))
    return torch.cat(codes), joined(grids, 0)


def fit_grid(weight: Tensor, encoding: Encoding, kept: Tensor | None = None) -> Grid:
    """The grid of least squared error, group by group, for rounding `weight` `[rows, cols]` to the nearest code.

    kept: bool `[rows, cols]`; entries that are False count for nothing. Scales are tried from the one that reaches the
    group's largest weight down to 0.73 of it.

    Raises:
        ValueError: NaN or Inf among the weights, or weights too large for the scales' dtype.
    """
    rows, cols = weight.shape
    size = encoding.group_size
    padding = -cols % size
    shape = (rows, (cols + padding) // size, size)
    groups = torch.nn.functional.pad(weight.float(), (0, padding)).view(shape)
    counts = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    counts = torch.nn.functional.pad(counts, (0, padding)).view(shape)
    if not bool(torch.isfinite(groups).all()):
        raise ValueError("weight: must be finite to be quantized, got NaN or Inf; repair the checkpoint")
    groups = torch.where(counts, groups, 0.0)
    code = CODES[encoding.kind]
    if code.minimums:
        low = torch.where(counts, groups, torch.inf).amin(-1).nan_to_num(posinf=0.0)
        high = torch.where(counts, groups, -torch.inf).amax(-1).nan_to_num(neginf=0.0)
        tried = [
            Grid(encoding, (high - low) * f / code.largest, low + (high - low) * (1 - f) / 2) for f in _SHRINK
        ]
    elif code.zero:  # the largest weight gets the code 0, which stands for `zero` scales of either sign
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        tried = [Grid(encoding, largest * f / -code.zero) for f in _SHRINK]
    else:  # so many codes that clipping gains nothing
        tried = [Grid(encoding, groups.abs().amax(-1) / code.largest)]
    if not all(bool(torch.isfinite(part).all()) for part in tried[0].parts()):
        raise ValueError(
            f"weight: must have scales and minimums within {encoding.scale_dtype}, got weights up to "
            f"{float(groups.abs().max()):g}; use bfloat16 scales"
        )
    best, least = tried[0], None
    for grid in tried:
        _, rounded = codes_of(groups.flatten(1), grid)
        error = torch.where(counts, rounded.view_as(groups) - groups, 0.0).square().sum(-1)
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        minimums = None
        if grid.minimums is not None and best.minimums is not None:
            minimums = torch.where(better, grid.minimums, best.minimums)
        best = Grid(encoding, torch.where(better, grid.scales, best.scales), minimums)
    return best
