"""Removing hidden neurons of feed-forward layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch
from sparseprune.models.losses import Loss
from sparseprune.models.sites import find_sites
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
from sparseprune.surgery.edits import plan
from sparseprune.surgery.probe import NeuronGroup, NotReachedError, find_neurons, sample_batch
from sparseprune.surgery.report import StructuredReport

__all__ = ["remove_neurons"]

CALIBRATED = ("activation", "obs", "taylor")


def remove_neurons(
    model: nn.Module,
    fraction: float,
    criterion: str = "activation",
    *,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    multiple_of: int = 8,
    compensate: bool | None = None,
    sequential: bool | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = False,
) -> StructuredReport:
    """Removes a fraction of each feed-forward layer's hidden neurons, in place: the linears get smaller.

    Args:
        fraction: in (0, 1), of each layer's neurons.
        criterion: which go, see `criteria`; all but "l1" and "random" need `calibration`.
        multiple_of: the number that stays is the nearest multiple of this, for the kernels' sake.
        compensate: whether the down projection's other columns make up for what goes, by least squares on the
            calibration inputs. Default: with a criterion that needs calibration, unless the model holds zeros
            from an earlier pruning, which it would fill.
        sequential: take a block's statistics on what the already cut blocks before it give. Default: where the
            model is a chain of blocks, and it compensates.
        include, exclude: shell patterns over names of linears; a layer goes by any of its linears.
        loss: for "taylor", (output, batch) -> scalar; a causal language model's, or one of batches with labels, is
            known.
        seed: of "random".

    A layer is cut where its hidden neurons are found: see `probe`. An error leaves the model as it was.

    Raises:
        ValueError: an argument out of range, nothing to remove, or a model in which no neurons are found.
    """
    check_fraction(fraction, "neurons")
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of: must be at least 1, got {multiple_of!r}")
    data = as_data(model, calibration)
    check_criterion(criterion, CRITERIA, CALIBRATED, data)
    batch, found = _found(
        model, data, [layer.name for layer in find_sites(model, include=include, exclude=exclude)]
    )
    groups = chosen_groups(found, Names(include, exclude))
    if not groups:
        raise ValueError(
            f"model: {type(model).__name__} has no hidden neurons to remove under include={include!r}, "
            f"exclude={exclude!r}; they are found where a linear reads, channel by channel, what other linears give it "
            "alone"
        )
    units = [_units(group, _kept(group, fraction, multiple_of)) for group in groups]
    compensates = resolve_compensate(compensate, criterion, data, groups)
    options = Options("neurons", fraction, criterion, data, compensates, sequential, loss, seed, progress)
    widths = {group.width for group in groups}
    changes: Iterable[dict[str, int]] = ()
    if len(widths) == 1:
        changes = _config_changes(model, groups[0].width, _kept(groups[0], fraction, multiple_of))
    planned = plan(model, place_holder(units), changes, fallback=lambda before: [])
    return cut(model, units, planned, batch, options)


def _found(
    model: nn.Module, data: CalibrationData | None, needed: Sequence[str]
) -> tuple[Batch, list[NeuronGroup]]:
    batch = sample_batch(model, data)
    try:
        return batch, find_neurons(model, batch, needed)
    except NotReachedError:
        if data is None:
            raise
    batch = sample_batch(model, data, whole=True)
    return batch, find_neurons(model, batch, needed)


def resolve_compensate(
    compensate: bool | None, criterion: str, data: CalibrationData | None, groups: Sequence[Any]
) -> bool:
    if compensate and data is None:
        raise ValueError("calibration: compensate needs some, got None; pass it, or compensate=False")
    if compensate is not None:
        return compensate
    if data is None or criterion not in CALIBRATED:
        return False
    weights = [group.consumer.weight for group in groups]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros <= 0.01 * sum(weight.numel() for weight in weights)


def _kept(group: NeuronGroup, fraction: float, multiple_of: int) -> int:
    wanted = group.width * (1 - fraction)
    # half a multiple stays
    kept = int(wanted / multiple_of + 0.5) * multiple_of
    if not 0 < kept < group.width:
        raise ValueError(
            f"fraction: of the {group.width} neurons before {group.consumer.name} a multiple of {multiple_of} below "
            f"{group.width} must stay, {fraction} makes it {kept}; pass another fraction, or a smaller multiple_of"
        )
    return kept


def _units(group: NeuronGroup, kept: int) -> Units:
    width = group.width
    rows = tuple(
        [group.rows(index, torch.tensor([neuron])) for neuron in range(width)]
        for index in range(len(group.producers))
    )
    return Units(
        group,
        torch.arange(width).unsqueeze(1),
        rows,
        torch.zeros(width, dtype=torch.int64),
        {0: width - kept},
        lambda index, stay: group.rows(index, torch.tensor(stay)),
        [(neuron,) for neuron in range(width)],
    )


def _config_changes(model: nn.Module, width: int, kept: int) -> Iterator[dict[str, int]]:
    """Entries of the config that may mean this width: those of its value, one or two of them; those left open."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    equal = [key for key, value in values.items() if value == width and type(value) is int]
    for count in (1, 2):
        for keys in itertools.combinations(equal, count):
            yield dict.fromkeys(keys, kept)
    for key, value in values.items():
        if value is None:
            yield {key: kept}
