"""Removing attention heads: whole groups with their key and value, or equally many query heads of every group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.io.sizes import SIZES
from sparseprune.models.batches import Batch
from sparseprune.models.losses import Loss
from sparseprune.options import Names
from sparseprune.surgery.criteria import CRITERIA
from sparseprune.surgery.cutting import (
    Options,
    Units,
    as_data,
    check_criterion,
    check_fraction,
    chosen_groups,
    cut,
    place_holder,
)
from sparseprune.surgery.edits import Plan, bare, plain_attributes, plan
from sparseprune.surgery.neurons import CALIBRATED, resolve_compensate
from sparseprune.surgery.probe import HeadGroup, find_heads, sample_batch
from sparseprune.surgery.report import StructuredReport

__all__ = ["remove_heads"]

Unit = Literal["group", "query"]


def remove_heads(
    model: nn.Module,
    fraction: float,
    criterion: str = "activation",
    *,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    unit: Unit | None = None,
    compensate: bool | None = None,
    sequential: bool | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = False,
) -> StructuredReport:
    """Removes attention heads of every layer, in place: equally many in each, those that matter least.

    Args:
        fraction: in (0, 1), of each layer's query heads. What comes nearest to it, and the config can say, is
            removed; the report tells.
        unit: "group" removes groups of query heads with the key and value that they share, "query" equally many
            query heads of every group, whose keys and values stay. Default: what comes nearer to `fraction`, groups if
            both do. Without grouped queries it is all the same.

    The other arguments are those of `remove_neurons`; the output projection is what makes up for the heads that go.

    Raises:
        ValueError: an argument out of range, no number of heads near `fraction` that can go, or a model in which no
            heads are found.
    """
    check_fraction(fraction, "heads")
    if unit not in (None, "group", "query"):
        raise ValueError(
            f'unit: must be "group" or "query", got {unit!r}; leave it out for what comes nearer'
        )
    data = as_data(model, calibration)
    check_criterion(criterion, CRITERIA, CALIBRATED, data)
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"model: its config must give num_attention_heads, that of {type(model).__name__} does not; remove neurons "
            "or layers instead"
        )
    batch = sample_batch(model, data)
    groups: list[HeadGroup] = []
    known: dict[str, None] = {}
    which = Names(include, exclude)
    for count in _head_counts(config, heads):
        found = find_heads(model, batch, count)
        known |= dict.fromkeys(layer.name for it in found for layer in (it.consumer, *it.producers))
        groups = chosen_groups(found, which)
        if groups:
            break
    which.check(list(known), f"linear of attention heads in this {type(model).__name__}")
    if not groups:
        raise ValueError(
            f"model: {type(model).__name__} has no attention heads to remove under include={include!r}, "
            f"exclude={exclude!r}; they are found where a linear reads what {heads} heads give it, each of which "
            "depends on rows of the query, key and value linears"
        )
    units, planned = _plan(model, groups, fraction, unit)
    compensates = resolve_compensate(compensate, criterion, data, groups)
    options = Options("heads", fraction, criterion, data, compensates, sequential, loss, seed, progress)
    return cut(model, units, planned, batch, options)


def _head_counts(config: Any, heads: int) -> Iterator[int]:
    """How many heads a layer may have: what the config says, and where it cannot say, what an earlier cut left."""
    yield heads
    yield from range(heads - 1, 1, -1) if getattr(config, SIZES, None) else ()


def _options(group: HeadGroup, fraction: float, unit: Unit | None) -> Iterator[tuple[Unit, int]]:
    """(unit, how many of the groups, or of each group's heads, go), what comes nearest to `fraction` first."""
    size = len(group.groups[0])
    found: list[tuple[float, Unit, int]] = []
    target = fraction * group.heads
    if unit in (None, "group"):
        found += [(abs(count * size - target), "group", count) for count in range(len(group.groups))]
    if unit in (None, "query") and size > 1:
        found += [(abs(count * len(group.groups) - target), "query", count) for count in range(size)]
    if unit == "query" and size == 1:
        found += [(abs(count - target), "group", count) for count in range(len(group.groups))]
    for _, kind, count in sorted(found, key=lambda it: (it[0], it[2] == 0)):
        yield kind, count


def _plan(
    model: nn.Module, groups: Sequence[HeadGroup], fraction: float, unit: Unit | None
) -> tuple[list[Units], Plan]:
    first = groups[0]
    if any(group.groups != first.groups for group in groups):
        raise ValueError("model: its layers must have the same heads, they differ; exclude some")
    fallback: tuple[Unit, int] | None = None
    for kind, count in _options(first, fraction, unit):
        if count == 0:
            break
        fallback = fallback or (kind, count)
        units = [_units(group, kind, count) for group in groups]
        left, keys = _left(first, kind, count)
        try:
            return units, plan(model, place_holder(units), _config_changes(model, first, left, keys))
        except ValueError:  # not a number of heads that the config can say
            continue
    if fallback is None:
        raise ValueError(
            f"fraction: of {first.heads} heads in {len(first.groups)} groups none can go at {fraction}; the fewest that "
            f"can is {1 / max(len(first.groups), len(first.groups[0])):.0%}, see unit"
        )
    kind, count = fallback
    units = [_units(group, kind, count) for group in groups]
    left, keys = _left(first, kind, count)

    def attributes(before: nn.Module) -> list[tuple[str, str, Any]]:
        return _attributes(model, groups, left, keys)

    return units, plan(model, place_holder(units), fallback=attributes)


def _left(group: HeadGroup, kind: Unit, count: int) -> tuple[int, int]:
    """Query heads, and key and value heads, that stay."""
    size, keys = len(group.groups[0]), len(group.groups)
    return ((keys - count) * size, keys - count) if kind == "group" else (keys * (size - count), keys)


def _units(group: HeadGroup, kind: Unit, count: int) -> Units:
    members = [*group.groups] if kind == "group" else [(head,) for head in range(group.heads)]
    owner = torch.zeros(len(members), dtype=torch.int64)
    quota = {0: count}
    if kind == "query":
        owner = torch.tensor(
            [next(i for i, it in enumerate(group.groups) if head in it) for (head,) in members]
        )
        quota = dict.fromkeys(range(len(group.groups)), count)
    rows = tuple([group.rows(index, member) for member in members] for index in range(len(group.producers)))

    def keep_rows(index: int, stay: Sequence[int]) -> torch.Tensor:
        return group.rows(index, [head for unit in stay for head in members[unit]])

    channels = torch.stack([group.channels(member) for member in members])
    return Units(group, channels, rows, owner, quota, keep_rows, members)


def _config_changes(model: nn.Module, group: HeadGroup, left: int, keys: int) -> Iterator[dict[str, int]]:
    config: Any = getattr(model, "config", None)
    change = {"num_attention_heads": left}
    if getattr(config, "num_key_value_heads", None) is not None:
        change["num_key_value_heads"] = keys
    yield change
    yield {**change, "head_dim": group.head_dim}


def _attributes(
    model: nn.Module, groups: Sequence[HeadGroup], left: int, keys: int
) -> list[tuple[str, str, Any]]:
    """What attention modules must know of the heads that stay, where their config cannot say it."""
    config: Any = model.config
    first = groups[0]
    old = bare(type(model), config)
    assert old is not None  # the plan before was built from it
    for change in _config_changes(model, first, left, keys):
        new = bare(type(model), config, change)
        name = first.consumer.name
        if new is not None and new.get_submodule(name).weight.numel() == (  # type: ignore[union-attr, operator]
            first.consumer.out_features * left * first.head_dim
        ):
            # the config can say it for all layers, and only some are cut
            return [
                (module, attribute, value)
                for module, attribute, value in plain_attributes(old, new)
                if any(_within(module, group) for group in groups)
            ]
    if keys != left:
        raise ValueError(f"model: the config of {type(model).__name__} cannot say which heads would be left")
    # heads that make a single one of the whole width: what is 1 then counts heads, what is the width does not change
    single = bare(type(model), config, {"num_attention_heads": 1})
    others = {} if single is None else dict(single.named_modules())
    width = first.heads * first.head_dim
    found = []
    for name, module in model.named_modules():
        if name not in others or not any(_within(name, group) for group in groups):
            continue
        for attribute, value in vars(others[name]).items():
            if type(value) is not int or type(getattr(module, attribute, None)) is not int:
                continue
            now = getattr(module, attribute)
            if value == 1 and now == first.heads:
                found.append((name, attribute, left))
            elif now == width and not isinstance(getattr(module, "weight", None), torch.Tensor):
                found.append((name, attribute, left * first.head_dim))
    return found


def _within(module: str, group: HeadGroup) -> bool:
    """Whether a module lies under the one that holds all of the group's linears."""
    paths = [layer.name.split(".") for layer in (group.consumer, *group.producers)]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    parent = ".".join(shared)
    return module == parent or module.startswith(f"{parent}.")
