"""SparseSwaps (Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale").

With d = w . (1 - m) what a row has lost and c = G d, its error is d^T G d. Taking back the removed weight p and
removing the kept weight u instead changes it by

    2 (w_u c_u - w_p c_p) + w_u^2 G_uu + w_p^2 G_pp - 2 w_u w_p G_up

so that the best exchange is known without trying it. Counts stay as they are in every row, and every N:M group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.pruning.base import Target
from sparseprune.pruning.methods.gram import checked
from sparseprune.statistics.inputs import Gram

__all__ = ["swap_refine"]

# Exchanges tried together in a row: the most promising ones, each accepted only if the error falls still after
# those accepted before it. One at a time would need a product with G for each.
_TOGETHER = 16
# Rows at once: bounds the candidates' small Gram matrices (float32 [rows, 2 x 16, 2 x 16]) to 8 MB.
_ROWS = 2048


def swap_refine(
    weight: Tensor, mask: Tensor, statistic: Gram, target: Target, passes: int = 30, gain: float = 1e-3
) -> Tensor:
    """A mask bool [out, in] of the same pattern whose rows lose less of the output; rows that find no exchange
    stay as they are.

    Args:
        passes: at most so many rounds over all rows, up to 16 exchanges of a row in each.
        gain: a row is done when a round lowers its error by less than this share.

    Raises:
        ValueError: a block pattern, whose weights cannot be exchanged one by one; NaN or Inf in the Gram
            matrix.
    """
    if target.pattern.rows:
        raise ValueError(
            f"refine: swaps exchange single weights, got pattern {target.pattern}; leave +swaps out"
        )
    matrix = checked(statistic).to(weight.dtype)
    # only ratios matter, and a mean diagonal of 1 keeps products of large inputs within float32
    matrix = matrix / matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    refined = mask.clone()
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        refined[rows] = _refine(weight[rows], mask[rows], matrix, target.pattern.m, passes, gain)
    return refined


def _refine(weight: Tensor, mask: Tensor, matrix: Tensor, m: int, passes: int, gain: float) -> Tensor:
    mask = mask.clone()
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(passes):
        rows, kept = weight[active], mask[active]
        lost = torch.where(kept, 0, rows)
        pull = lost @ matrix
        take, give = _candidates(rows, kept, pull, matrix, m)
        changes, accepted = _accept(rows, kept, pull, matrix, take, give)
        kept.scatter_(1, take, kept.gather(1, take) & ~accepted)
        kept.scatter_(1, give, kept.gather(1, give) | accepted)
        mask[active] = kept
        error = (lost * pull).sum(dim=1)
        active = active[-changes > gain * error]
        if len(active) == 0:
            break
    return mask


def _costs(rows: Tensor, kept: Tensor, pull: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] each: what removing each kept weight, and taking back each removed one, does to the error on
    its own; infinite for the others.
    """
    own = rows.square() * matrix.diagonal()
    cross = 2 * rows * pull
    removal = torch.where(kept, own + cross, torch.inf)
    return removal, torch.where(kept, torch.inf, own - cross)


def _candidates(rows: Tensor, kept: Tensor, pull: Tensor, matrix: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The exchanges to try: kept positions and removed positions, int64 [rows, tries], no position twice in a
    row, the most promising first.
    """
    removal, return_ = _costs(rows, kept, pull, matrix)
    return _by_group(rows, removal, return_, matrix, m) if m else _by_row(rows, removal, return_, matrix)


def _by_group(
    rows: Tensor, removal: Tensor, returned: Tensor, matrix: Tensor, m: int
) -> tuple[Tensor, Tensor]:
    # all m x m pairs of a group, those that exchange nothing infinite
    count, columns = rows.shape
    groups = columns // m
    grouped = rows.reshape(count, groups, m)
    near = matrix.reshape(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    pairs = removal.reshape(count, groups, m, 1) + returned.reshape(count, groups, 1, m)
    pairs -= 2 * grouped[..., :, None] * grouped[..., None, :] * near
    best, which = pairs.reshape(count, groups, m * m).min(dim=2)
    chosen = best.topk(min(_TOGETHER, groups), dim=1, largest=False).indices
    which = which.gather(1, chosen)
    return chosen * m + which // m, chosen * m + which % m


def _by_row(rows: Tensor, removal: Tensor, returned: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    # The cheapest removals against the cheapest returns; a pair outside these may be better through its
    # G_up alone, and comes up once the cheaper ones are gone.
    tries = min(_TOGETHER, rows.shape[1])
    removal, take = removal.topk(tries, dim=1, largest=False)
    returned, give = returned.topk(tries, dim=1, largest=False)
    pairs = removal[:, :, None] + returned[:, None, :]
    pairs -= (
        2
        * rows.gather(1, take)[:, :, None]
        * rows.gather(1, give)[:, None, :]
        * matrix[take[:, :, None], give[:, None, :]]
    )
    pairs.clamp_(
        max=torch.finfo(pairs.dtype).max
    )  # what exchanges nothing comes last, and infinite is used up
    every = torch.arange(len(rows), device=rows.device)
    ordered = []
    for _ in range(tries):
        best = pairs.reshape(len(rows), -1).argmin(dim=1)
        i, j = best // tries, best % tries
        ordered.append((take[every, i], give[every, j]))
        pairs[every, i, :] = torch.inf
        pairs[every, :, j] = torch.inf
    takes, gives = zip(*ordered, strict=True)
    return torch.stack(takes, dim=1), torch.stack(gives, dim=1)


def _accept(
    rows: Tensor, kept: Tensor, pull: Tensor, matrix: Tensor, take: Tensor, give: Tensor
) -> tuple[Tensor, Tensor]:
    """What the accepted exchanges change each row's error by [rows], and which they are, bool [rows, tries]."""
    tries = take.shape[1]
    places = torch.cat((take, give), dim=1)
    moved = rows.gather(1, places)
    moved[:, tries:].neg_()
    linear = 2 * moved * pull.gather(1, places)
    linear = linear[:, :tries] + linear[:, tries:]
    both = matrix[places[:, :, None], places[:, None, :]] * moved[:, :, None] * moved[:, None, :]
    both = both.reshape(len(rows), 2, tries, 2, tries).sum(dim=(1, 3))
    possible = kept.gather(1, take) & ~kept.gather(1, give)
    accepted = torch.zeros_like(possible)
    total = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
    for index in range(tries):
        with_others = 2 * (both[:, index] * accepted).sum(dim=1)
        change = linear[:, index] + both[:, index, index] + with_others
        accepted[:, index] = possible[:, index] & (change < 0)
        total += torch.where(accepted[:, index], change, 0)
    return total, accepted
