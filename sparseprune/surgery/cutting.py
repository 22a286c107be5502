"""The walk that neurons and heads share: statistics, which units go, least squares for what stays, the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.calibration import as_data as as_batches
from sparseprune.models.batches import Batch, check_batches, no_cache
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import Loss
from sparseprune.models.modules import evaluation_mode
from sparseprune.models.sites import WeightSite, matches
from sparseprune.options import Names, require_function
from sparseprune.report import track
from sparseprune.statistics.inputs import Gram, InputSquares, collect
from sparseprune.statistics.walk import Walk, WalkError, advance, block_statistics, capture
from sparseprune.surgery import criteria
from sparseprune.surgery.compensation import compensated
from sparseprune.surgery.edits import Edits, Plan, commit, configured, counts, set_attributes, undo_on_error
from sparseprune.surgery.probe import HeadGroup, NeuronGroup, run
from sparseprune.surgery.report import StructureCut, StructuredReport

__all__ = [
    "Options",
    "Units",
    "as_data",
    "check_criterion",
    "check_fraction",
    "check_used",
    "chosen",
    "chosen_groups",
    "cut",
    "place_holder",
]


@dataclass(frozen=True)
class Options:
    """What the caller asked for, checked."""

    structure: str
    fraction: float
    criterion: str
    data: CalibrationData | None
    compensate: bool
    sequential: bool | None
    loss: Loss | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        check_used(self.criterion, ("taylor",), loss=self.loss)
        require_function("(output, batch) -> loss", loss=self.loss)
        if self.sequential is not None and not self.wants_statistics:
            raise ValueError(
                f"sequential: criterion {self.criterion} without compensation takes no statistics of inputs, got "
                f"{self.sequential}; leave it out"
            )

    @property
    def wants_statistics(self) -> bool:
        """Of the consumers' inputs."""
        return self.data is not None and (self.compensate or self.criterion in ("activation", "obs"))


@dataclass(frozen=True)
class Units:
    """What one consumer may lose.

    Attributes:
        channels: int64 [units, size], of the consumer's inputs.
        rows: for each producer, and each unit, the producer's rows.
        owner: int64 [units]; `quota` says for each owner how many of its units go.
        keep_rows: the rows of producer i that stay if the given units do.
        members: what the report calls the units, several numbers each.
    """

    group: NeuronGroup | HeadGroup
    channels: Tensor
    rows: tuple[Sequence[Tensor], ...]
    owner: Tensor
    quota: dict[int, int]
    keep_rows: Callable[[int, Sequence[int]], Tensor]
    members: Sequence[tuple[int, ...]]

    @property
    def consumer(self) -> WeightSite:
        return self.group.consumer

    def edits(self, gone: Sequence[int]) -> Edits:
        stay = [unit for unit in range(len(self.channels)) if unit not in set(gone)]
        rows = {it.name: self.keep_rows(index, stay) for index, it in enumerate(self.group.producers)}
        return Edits(rows=rows, columns={self.consumer.name: self.channels[stay].flatten().sort().values})


def check_fraction(fraction: float, what: str) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(
            f"fraction: must be in (0, 1), got {fraction!r}; pass the fraction of the {what} to remove, such as 0.25"
        )


def check_criterion(
    criterion: str, known: Sequence[str], calibrated: Sequence[str], calibration: CalibrationData | None
) -> None:
    if criterion not in known:
        raise ValueError(f"criterion: must be one of {', '.join(known)}, got {criterion!r}")
    if criterion in calibrated and calibration is None:
        raise ValueError(
            f"calibration: criterion {criterion} needs some, got None; pass "
            "sparseprune.calibration.windows(text, tokenizer)"
        )


def as_data(
    model: nn.Module, calibration: CalibrationData | Iterable[Batch] | None
) -> CalibrationData | None:
    """The calibration data, of lengths that the model's positions allow."""
    if calibration is None:
        return None
    data = as_batches(calibration)
    check_batches(model, data.batches)
    return data


def check_used(criterion: str, users: Sequence[str], **given: Any) -> None:
    """Raises ValueError where an argument is given that only the criteria `users` read."""
    for name, value in given.items():
        if value is not None and criterion not in users:
            raise ValueError(
                f"{name}: is for criterion {' and '.join(users)}, got {value!r} with {criterion}; leave it out"
            )


def chosen(names: Iterable[str], which: Names) -> bool:
    """Whether some name matches some `include` (None: all), and none an `exclude`."""
    names = list(names)
    included = which.include is None or matches(names, which.patterns("include"))
    return included and not matches(names, which.patterns("exclude"))


def chosen_groups(groups: Sequence[Any], which: Names) -> list[Any]:
    """The groups that are chosen by the names of their linears."""
    return [it for it in groups if chosen((layer.name for layer in (it.consumer, *it.producers)), which)]


def place_holder(units: Sequence[Units]) -> Edits:
    """A cut of the sizes to come: the first units of each owner go."""
    edits = Edits()
    for it in units:
        first = [
            int(unit)
            for owner, count in it.quota.items()
            for unit in (it.owner == owner).nonzero().flatten()[:count]
        ]
        _merge(edits, it.edits(first))
    return edits


def _merge(edits: Edits, more: Edits) -> None:
    edits.rows.update(more.rows)
    edits.columns.update(more.columns)
    edits.weights.update(more.weights)


def cut(
    model: nn.Module, units: Sequence[Units], plan: Plan, batch: Batch, options: Options
) -> StructuredReport:
    """Chooses units and cuts them out of `model`, in place; an error leaves it as it was."""
    for it in units:
        for layer in (it.consumer, *it.group.producers):
            if layer.weight.is_meta:
                raise ValueError(
                    f"{layer.name}: its weights must be loaded, they are on the meta device; load the model"
                )
            if not layer.weight.isfinite().all():
                raise ValueError(
                    f"{layer.name}: weights must be finite, got NaN or Inf; repair the checkpoint"
                )
    before = counts(model)
    first = units[0]
    reference = _input_of(model, first.consumer, batch)
    gone: dict[str, list[int]] = {}
    with undo_on_error(model):
        for part, statistics, prefix in _parts(model, units, plan, options):
            edits = Edits()
            for it in part:
                gone[it.consumer.name], found = _decide(it, statistics, options)
                _merge(edits, found)
            edits.apply(model)
            set_attributes(model, plan, prefix)
        commit(model, Plan(Edits(), plan.attributes, plan.config))
        _check_runs(model, first, gone[first.consumer.name], reference, batch)
    after = counts(model)
    cuts = tuple(
        StructureCut(
            it.consumer.name,
            sum(len(member) for member in it.members),
            tuple(sorted(number for unit in gone[it.consumer.name] for number in it.members[unit])),
        )
        for it in units
    )
    data = options.data if options.compensate or options.criterion not in ("l1", "random") else None
    return StructuredReport(
        structure=options.structure,
        method=options.criterion,
        sparsity=options.fraction,
        cuts=cuts,
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        compensated=options.compensate,
        calibration=None if data is None else data.source,
        reloads=plan.reloads,
        sizes=_sizes(model, units, plan),
    )


def _sizes(model: nn.Module, units: Sequence[Units], plan: Plan) -> dict[str, Any]:
    layers = [layer for it in units for layer in (it.consumer, *it.group.producers)]
    attributes: dict[str, dict[str, int]] = {}
    for module, attribute, value in plan.attributes:
        if type(value) is int:
            attributes.setdefault(module, {})[attribute] = value
    return {
        "linears": {it.name: [it.out_features, it.in_features] for it in layers},
        "attributes": attributes,
    }


_Statistics = dict[str, Any]


def _parts(
    model: nn.Module, units: Sequence[Units], plan: Plan, options: Options
) -> Iterator[tuple[Sequence[Units], _Statistics, str]]:
    """Units to decide on together, their statistics by consumer, and the prefix of the modules they lie in."""
    if options.data is None or not (options.wants_statistics or options.criterion == "taylor"):
        yield units, {}, ""
        return
    data = options.data
    statistic = Gram if options.compensate or options.criterion == "obs" or _wide(units) else InputSquares
    totals: _Statistics = {}
    if options.criterion == "taylor":
        consumers, channels = [it.consumer for it in units], [it.channels for it in units]
        scores = criteria.taylor(model, consumers, channels, data, options.loss, options.progress)
        totals = {it.consumer.name: score for it, score in zip(units, scores, strict=True)}
    if not options.wants_statistics:
        yield units, {name: (None, total) for name, total in totals.items()}, ""
        return
    blocks = find_blocks(model)
    walk = _walk(model, blocks, units, options)
    if walk is None:
        layers = [it.consumer for it in units]
        found = collect(model, layers, data, statistic=statistic, progress=options.progress)
        yield units, {name: (found[name], totals.get(name)) for name in found}, ""
        return
    described = f"removing {options.structure}, block by block"
    for index, (prefix, block) in enumerate(track(blocks, described, enabled=options.progress)):
        part = [it for it in units if it.consumer.name.startswith(f"{prefix}.")]
        if part:
            layers = [it.consumer for it in part]
            found = block_statistics(block, layers, walk, index, statistic)
            yield part, {name: (found[name], totals.get(name)) for name in found}, prefix
        # some attentions ask the config for their heads while they run; blocks to come have the old number
        with configured(model, plan if part else Plan(Edits())):
            advance(block, walk, index)


def _wide(units: Sequence[Units]) -> bool:
    return any(it.channels.shape[1] > 1 for it in units)


def _walk(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], units: Sequence[Units], options: Options
) -> Walk | None:
    """The start of a walk over blocks, if the model is a chain of them, and it is wanted."""
    inside = all(any(it.consumer.name.startswith(f"{name}.") for name, _ in blocks) for it in units)
    if options.sequential is False or options.data is None:
        return None
    if options.sequential is None and not (inside and options.compensate):
        return None
    if not inside:
        raise ValueError(
            f"sequential: the model must be a chain of blocks, a {type(model).__name__} is not; leave it out"
        )
    try:
        return capture(model, [it for _, it in blocks], list(options.data), progress=options.progress)
    except WalkError:
        if options.sequential:
            raise
        return None


def _decide(it: Units, statistics: _Statistics, options: Options) -> tuple[list[int], Edits]:
    statistic, total = statistics.get(it.consumer.name, (None, None))
    gone = _gone(it, statistic, total, options)
    edits = it.edits(gone)
    if options.compensate:
        keep = edits.columns[it.consumer.name]
        edits.weights[it.consumer.name] = compensated(
            it.consumer.weight, statistic.matrix, statistic.tokens, keep
        )
    return gone, edits


def _gone(it: Units, statistic: Any, total: Tensor | None, options: Options) -> list[int]:
    weight, channels = it.consumer.weight, it.channels
    device_channels = channels.to(weight.device)
    if options.criterion == "obs":
        return criteria.obs_removed(weight, statistic.matrix, device_channels, it.quota, it.owner)
    if options.criterion == "l1":
        producers = [(layer.weight, rows) for layer, rows in zip(it.group.producers, it.rows, strict=True)]
        scores = criteria.l1(weight, device_channels, producers)
    elif options.criterion == "random":
        # by name, so that a layer's draw does not depend on which other layers are cut
        seed = sum(it.consumer.name.encode()) * 1000003 + options.seed
        scores = torch.rand(len(channels), generator=torch.Generator().manual_seed(seed))
    elif options.criterion == "taylor":
        assert total is not None
        scores = total
    else:
        scores = criteria.activation(weight, statistic.products, device_channels)
    if not scores.isfinite().all():
        raise ValueError(
            f"{it.consumer.name}: scores must be finite, got NaN or Inf; check the calibration data, or load the model "
            "in float32"
        )
    scores = scores.cpu()
    gone = []
    for owner, count in it.quota.items():
        own = (it.owner == owner).nonzero().flatten()
        gone += own[scores[own].argsort(stable=True)[:count]].tolist()
    return gone


def _input_of(model: nn.Module, layer: WeightSite, batch: Batch) -> Tensor:
    found: list[Tensor] = []
    with (
        torch.no_grad(),
        evaluation_mode(model),
        no_cache(model),
        layer.on_inputs(lambda inputs: found.append(inputs.detach())),
    ):
        run(model, batch)
    return found[0]


def _check_runs(model: nn.Module, first: Units, gone: Sequence[int], reference: Tensor, batch: Batch) -> None:
    """The cut model runs, and what stays of the first layer that was cut gives what it gave before."""
    try:
        inputs = _input_of(model, first.consumer, batch)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"model: {type(model).__name__} must run once cut, it fails with: {error}"
        ) from error
    keep = first.edits(gone).columns[first.consumer.name].to(reference.device)
    expected = reference[..., keep].float()
    tolerance = 1e-3 if reference.dtype in (torch.float32, torch.float64) else 5e-2
    if (inputs.float() - expected).abs().max() > tolerance * expected.abs().max().clamp_min(1e-6):
        raise ValueError(
            f"model: what stays before {first.consumer.name} must give what it gave before the cut, in a "
            f"{type(model).__name__} it does not: something depends on how many there are; exclude it"
        )
