"""Channel permutation: which columns share an N:M group, so that no group has to lose weights that count.

As in RIA (Zhang et al. 2024): columns are sorted by their summed score and dealt over the groups in snake order,
then refined. They refine by linear assignment; here groups exchange columns in pairs, which needs torch only and
can only raise the score kept.

The new order is folded into the layers before: the hidden neurons of a feed-forward block are named anew, rows of
the producers (a gate and an up projection) and columns of the consumer alike. That costs nothing when the model
runs, and its outputs stay what they were up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch, no_cache
from sparseprune.models.modules import evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method
from sparseprune.pruning.methods.ria import RIA
from sparseprune.pruning.patterns import Pattern
from sparseprune.pruning.rewrite import weight_of
from sparseprune.surgery.probe import NeuronGroup, find_neurons, run, sample_batch

__all__ = ["column_order", "fold_order", "kept_score", "permute_neurons"]

_SWEEPS = 2
_BATCHES = 32  # an order needs less text than a solver does
# Rounding moves a layer's output by 1e-6 (float32) or 1e-2 (bfloat16) of its size, a wrong order by all of it.
_TOLERANCE = 0.1


def kept_score(scores: Tensor, pattern: Pattern) -> float:
    """The summed score, of [out, in], that the N:M mask keeps."""
    groups = scores.reshape(-1, pattern.m)
    return float(groups.topk(pattern.n, dim=1).values.sum(dtype=torch.float64))


def column_order(scores: Tensor, pattern: Pattern, sweeps: int = _SWEEPS) -> Tensor:
    """An order of the columns, int64 [in], in which the N:M mask of `scores` [out, in] keeps more of them.

    Never less than the order given.

    Args:
        sweeps: over the m places of a group; in each, every group may exchange its column in that place with
            another group's.
    """
    columns = scores.shape[1]
    count, m = columns // pattern.m, pattern.m
    ranked = scores.sum(dim=0).argsort(descending=True, stable=True)
    # snake: the first deal goes to groups 0, 1, ..., the second comes back
    deals = ranked.reshape(m, count)
    deals[1::2] = deals[1::2].flip(1)
    groups = deals.t().contiguous()
    given = torch.arange(columns, device=scores.device).reshape(count, m)
    if kept_score(scores[:, groups.flatten()], pattern) < kept_score(scores, pattern):
        groups = given
    for _ in range(sweeps):
        moved = [_exchange(scores, groups, place, pattern.n) for place in range(m)]
        if not any(moved):
            break
    return groups.flatten()


def _exchange(scores: Tensor, groups: Tensor, place: int, n: int) -> bool:
    """Exchanges columns in `place` between pairs of `groups` [groups, m], in place, where both together keep more."""
    count, m = groups.shape
    taken = groups[:, place]
    others = groups[:, [index for index in range(m) if index != place]]
    # Column a adds to group b, in each row, what it has above the n-th best of the others there: a sum over rows
    # of max(x - y, 0) = (|x - y| + x - y) / 2.
    threshold = scores[:, others].topk(n, dim=2).values[:, :, -1].t().contiguous()
    candidates = scores[:, taken].t().contiguous()
    gains = torch.cdist(candidates, threshold, p=1)
    gains.add_(candidates.sum(dim=1)[:, None]).sub_(threshold.sum(dim=1)).mul_(0.5)
    own = gains.diagonal()
    better = gains + gains.t() - own[:, None] - own
    floor = 1e-6 * float(own.mean())  # rounding
    moved = False
    while True:
        best, partner = better.max(dim=1)
        every = torch.arange(count, device=scores.device)
        pairs = (partner[partner] == every) & (best > floor) & (every < partner)
        if not pairs.any():
            return moved
        first, second = every[pairs], partner[pairs]
        groups[first, place], groups[second, place] = taken[second], taken[first]
        used = torch.cat((first, second))
        better[used] = -torch.inf
        better[:, used] = -torch.inf
        moved = True


def fold_order(group: NeuronGroup, order: Tensor, remember: Callable[[nn.Parameter], None]) -> None:
    """Gives the neurons of `group` the order `order`, int64 [width], in all layers that know them, in place.

    Args:
        remember: called with each parameter before it changes.
    """
    for index, producer in enumerate(group.producers):
        rows = group.rows(index, order.to(producer.weight.device))
        _reorder(producer, rows, 0, remember)
    _reorder(group.consumer, order.to(group.consumer.weight.device), 1, remember)


def _reorder(layer: WeightSite, order: Tensor, dim: int, remember: Callable[[nn.Parameter], None]) -> None:
    remember(layer.parameter)
    layer.weight.copy_(layer.weight.index_select(dim, order))
    if dim == 0 and layer.bias is not None:
        remember(layer.module.bias)  # type: ignore[arg-type]
        layer.bias.copy_(layer.bias[order])


def permute_neurons(
    model: nn.Module,
    layers: Sequence[WeightSite],
    method: Method,
    pattern: Pattern,
    calibration: CalibrationData | None,
    remember: Callable[[nn.Parameter], None],
    progress: bool = False,
) -> list[str]:
    """Reorders the hidden neurons of the model, in place, so that N:M keeps more in the layers that read them.

    Neurons are found by what depends on what (`structured.probe`), and must lead to one of `layers`. The scores are
    the method's own, RIA's where it has none, or one that takes passes of the whole model.

    Args:
        remember: called with each parameter before it changes.

    Returns:
        What was done, in words.

    Raises:
        ValueError: a pattern that is not N:M, or no neurons that lead to one of `layers`.
    """
    if not pattern.structured:
        raise ValueError(
            f"method: +permute rearranges the groups of N:M, got pattern {pattern}; leave +permute out"
        )
    batch = sample_batch(model, calibration)
    wanted = {layer.name for layer in layers}
    with torch.enable_grad():  # the probe reads gradients, also where the caller wants none
        groups = [group for group in find_neurons(model, batch) if group.consumer.name in wanted]
    if not groups:
        raise ValueError(
            "method: +permute needs hidden neurons that a pruned layer reads, found none; leave +permute out"
        )
    score, statistic = method.score, method.statistic
    if score is None or (statistic is not None and statistic.whole_model):
        score, statistic = RIA.score, RIA.statistic
    assert score is not None
    statistics = {}
    if calibration is not None and statistic is not None:
        few = list(calibration)[:_BATCHES]
        consumers = [group.consumer for group in groups]
        statistics = (statistic.light or statistic).collect(model, consumers, few, progress=progress)
    elif statistic is not None:
        raise ValueError(f"calibration: method {method.name} needs some, got None")
    outputs = _outputs(model, groups, batch)
    orders, gains = [], []
    for group in groups:
        scores = score(weight_of(group.consumer), statistics.get(group.consumer.name))
        order = column_order(scores, pattern)
        gains.append((kept_score(scores, pattern), kept_score(scores[:, order], pattern)))
        fold_order(group, order, remember)
        orders.append(order)
    alike = list(range(len(groups)))
    while True:
        found = _outputs(model, groups, batch)
        wrong = next((index for index in alike if not _is_close(found[index], outputs[index])), None)
        if wrong is None:
            break
        fold_order(groups[wrong], orders[wrong].argsort(), remember)
        alike.remove(wrong)
    before, after = (sum(gains[index][which] for index in alike) for which in (0, 1))
    notes = []
    if alike:
        notes.append(
            f"the neurons that {len(alike)} layers read were reordered: {pattern} keeps "
            f"{after / before - 1 if before else 0:.1%} more of the scores there"
        )
    if len(alike) < len(groups):
        notes.append(
            f"the neurons that {len(groups) - len(alike)} layers read are not alike, and keep their order"
        )
    return notes


def _outputs(model: nn.Module, groups: Sequence[NeuronGroup], batch: Batch) -> list[Tensor]:
    """What each group's consumer gives for `batch`."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor, Tensor], None]:
        return lambda inputs, output: found.update({name: output})

    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluation_mode(model), no_cache(model)):
            stack.enter_context(context)
        for group in groups:
            stack.enter_context(group.consumer.on_outputs(keep(group.consumer.name)))
        run(model, batch)
    return [found[group.consumer.name] for group in groups]


def _is_close(output: Tensor, expected: Tensor) -> bool:
    difference = (output.double() - expected.double()).norm()
    return bool(difference <= _TOLERANCE * expected.double().norm())
