"""Removing whole layers: blocks of a model's stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch, no_cache
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import Loss, loss_of
from sparseprune.models.modules import evaluation_mode
from sparseprune.options import Names
from sparseprune.report import track
from sparseprune.surgery.bridging import bridges, hidden_in, hidden_out
from sparseprune.surgery.cutting import as_data, check_criterion, check_fraction, check_used, chosen
from sparseprune.surgery.edits import Edits, Plan, commit, counts, plan, undo_on_error
from sparseprune.surgery.probe import run, sample_batch
from sparseprune.surgery.report import StructureCut, StructuredReport

__all__ = ["LAYER_CRITERIA", "remove_layers"]

LAYER_CRITERIA = ("influence", "activation", "l1", "loss", "random", "taylor")
CALIBRATED = ("activation", "influence", "loss", "taylor")


def remove_layers(
    model: nn.Module,
    count: int | float,
    criterion: str = "influence",
    *,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    shortlist: int | None = None,
    compensate: bool | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = False,
) -> StructuredReport:
    """Removes whole blocks of the model's stack, in place; those that stay are renumbered.

    Args:
        count: how many, or as a float in (0, 1) the fraction of them, to the nearest number.
        criterion: which go, those with the smallest

            - "influence": mean over tokens of 1 - cos(input, output) (Men et al. 2024, "ShortGPT"),
            - "activation": mean over tokens of ||output - input|| / ||input||,
            - "taylor": sum over tokens of |<output - input, gradient of the loss>|,
            - "l1": sum of |w| over the block,
            - "loss": greedily, at each step the one without which the calibration loss is least; half as many passes
              over the calibration data as there are blocks, for each block that goes,
            - "random": seeded, the control.
        shortlist: "loss" tries only so many blocks, those of the least influence; None tries all.
        compensate: whether the block before removed ones makes up for them, by least squares on the calibration data
            (see `bridging`). Default: with a criterion that needs calibration.
        include, exclude: shell patterns over block names ("model.layers.3"): which may go.
        loss: for "taylor" and "loss", see `remove_neurons`.

    An error leaves the model as it was.

    Raises:
        ValueError: an argument out of range, a model without blocks, or one whose config cannot say what is left.
    """
    data = as_data(model, calibration)
    check_criterion(criterion, LAYER_CRITERIA, CALIBRATED, data)
    check_used(criterion, ("taylor", "loss"), loss=loss)
    check_used(criterion, ("loss",), shortlist=shortlist)
    blocks = find_blocks(model)
    stack = _stack(model, blocks)
    which = Names(include, exclude)
    which.check([name for name, _ in blocks], f"block of this {type(model).__name__}")
    candidates = [index for index, (name, _) in enumerate(blocks) if chosen([name], which)]
    number = _number(count, len(blocks), len(candidates))
    if compensate and data is None:
        raise ValueError("calibration: compensate needs some, got None; pass it, or compensate=False")
    if shortlist is not None and not number <= shortlist:
        raise ValueError(
            f"shortlist: must be at least the {number} layers that go, got {shortlist}; leave it out to try all"
        )
    modules = [module for _, module in blocks]
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ValueError(f"{name}: weights must be finite, got NaN or Inf; repair the checkpoint")
    _plan(model, stack, _kept(len(blocks), candidates[:number]))  # may it be, before the long work
    if criterion == "loss":
        assert data is not None
        if shortlist is not None:
            influence = _scores(model, modules, "influence", data, loss, seed, progress)
            candidates = sorted(candidates, key=lambda index: influence[index])[:shortlist]
        gone = _greedy(model, modules, sorted(candidates), number, data, loss, progress)
    else:
        scores = _scores(model, modules, criterion, data, loss, seed, progress)
        if not all(score == score and abs(score) != float("inf") for score in scores):
            raise ValueError("scores: must be finite, got NaN or Inf; check the calibration data")
        gone = sorted(candidates, key=lambda index: scores[index])[:number]
    kept = _kept(len(blocks), gone)
    planned = _plan(model, stack, kept)
    batch = sample_batch(model, data)
    if data is not None and (compensate or (compensate is None and criterion in CALIBRATED)):
        planned.edits.weights.update(bridges(model, blocks, gone, data, batch, progress))
    before = counts(model)
    with undo_on_error(model):
        commit(model, planned)
        try:
            with torch.no_grad(), evaluation_mode(model), no_cache(model):
                run(model, batch)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"model: {type(model).__name__} must run once cut, it fails with: {error}"
            ) from error
    after = counts(model)
    return StructuredReport(
        structure="layers",
        method=criterion,
        sparsity=number / len(blocks),
        cuts=(StructureCut(stack, len(blocks), tuple(sorted(gone))),),
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        compensated=bool(planned.edits.weights),
        calibration=data.source
        if data is not None and (criterion in CALIBRATED or planned.edits.weights)
        else None,
        reloads=planned.reloads,
    )


def _number(count: int | float, blocks: int, candidates: int) -> int:
    if isinstance(count, float):
        check_fraction(count, "layers")
        number = round(count * blocks)
    elif isinstance(count, int) and not isinstance(count, bool):
        number = count
    else:
        raise ValueError(f"count: must be a number of layers, or a fraction in (0, 1), got {count!r}")
    if not 1 <= number <= min(candidates, blocks - 1):
        raise ValueError(
            f"count: of {blocks} layers, {candidates} of which may go, at least one must go and one stay, got {count}; "
            "pass another, or let more be removed by include and exclude"
        )
    return number


def _stack(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> str:
    """The name of the list that holds the blocks."""
    names = {name.rpartition(".")[0] for name, _ in blocks}
    if len(names) != 1 or "" in names:
        found = "no repeated blocks" if not blocks else f"{len(names)} stacks of blocks"
        raise ValueError(
            f"model: must have one stack of blocks, {type(model).__name__} has {found}; remove neurons or heads instead"
        )
    return names.pop()


def _kept(blocks: int, gone: Iterable[int]) -> list[int]:
    gone = set(gone)
    return [index for index in range(blocks) if index not in gone]


def _plan(model: nn.Module, stack: str, kept: list[int]) -> Plan:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    total = len(model.get_submodule(stack))  # type: ignore[arg-type]
    change: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in values.items():  # what is listed for each layer
        if isinstance(value, (list, tuple)) and len(value) == total:
            change[key] = [value[index] for index in kept]
    planned = plan(model, Edits(blocks={stack: kept}), [change])
    for name, attribute, value in planned.attributes:
        place = name.removeprefix(f"{stack}.").split(".")[0]
        inside = name.startswith(f"{stack}.") and place.isdigit()
        # a number of the layer, or of layers in all, is what changes; anything else would be another computation
        if inside and value != int(place):
            raise ValueError(
                f"model: a layer of {type(model).__name__} must not depend on its number, {attribute} of {name} would "
                f"become {value} after a reload; remove others, or neurons or heads instead"
            )
    return planned


def _scores(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    criterion: str,
    data: CalibrationData | None,
    loss: Loss | None,
    seed: int,
    progress: bool,
) -> list[float]:
    if criterion == "random":
        return torch.rand(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    if criterion == "l1":
        return [sum(float(it.detach().float().abs().sum()) for it in block.parameters()) for block in blocks]
    assert data is not None
    if criterion == "taylor":
        return _taylor(model, blocks, data, loss, progress)
    measure = _influence if criterion == "influence" else _change
    totals = [0.0] * len(blocks)
    tokens = [0] * len(blocks)

    def hook(index: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            values = measure(hidden_in(args, kwargs), hidden_out(output))
            totals[index] += float(values.double().sum())
            tokens[index] += values.numel()

        return add

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(index), with_kwargs=True).remove)
        for batch in track(data, criterion, total=len(data), enabled=progress):
            run(model, batch)
    if not all(tokens):
        raise ValueError(f"batches: must reach every layer, layer {tokens.index(0)} did not run; pass others")
    return [total / count for total, count in zip(totals, tokens, strict=True)]


def _influence(before: Tensor, after: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


def _change(before: Tensor, after: Tensor) -> Tensor:
    before = before.float()
    return (after.float() - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)


def _taylor(
    model: nn.Module, blocks: Sequence[nn.Module], data: CalibrationData, loss: Loss | None, progress: bool
) -> list[float]:
    totals = [0.0] * len(blocks)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(index: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = hidden_out(output)
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            found[index] = (hidden_in(args, kwargs).detach(), hidden)
            return _with_first(output, hidden)

        return keep

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        stack.enter_context(torch.enable_grad())
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(index), with_kwargs=True).remove)
        for batch in track(data, "gradients", total=len(data), enabled=progress):
            found.clear()
            value = loss_of(model, batch, loss)
            gradients = torch.autograd.grad(value, [found[index][1] for index in range(len(blocks))])
            for index, gradient in enumerate(gradients):
                before, after = found[index]
                product = ((after.detach() - before) * gradient).float().sum(dim=-1)
                totals[index] += float(product.abs().sum())
    return totals


def _greedy(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    candidates: Sequence[int],
    number: int,
    data: CalibrationData,
    loss: Loss | None,
    progress: bool,
) -> list[int]:
    gone: list[int] = []
    rounds = [(step, batch) for step in range(number) for batch in data]
    losses: dict[int, float] = {}
    with torch.no_grad(), evaluation_mode(model), no_cache(model):
        for done, (_, batch) in enumerate(track(rounds, "layers, by loss", enabled=progress), 1):
            for index, value in _losses_without(model, blocks, candidates, gone, batch, loss):
                losses[index] = losses.get(index, 0.0) + (value if value == value else float("inf"))
            if done % len(data) == 0:
                gone.append(min(losses, key=lambda index: losses[index]))
                losses = {}
    return gone


def _losses_without(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    candidates: Sequence[int],
    gone: Sequence[int],
    batch: Batch,
    loss: Loss | None,
) -> Iterator[tuple[int, float]]:
    """The loss on one batch without each candidate, next to those that are gone.

    What comes before a candidate is the same with and without it, and so is not computed again: the blocks before it
    pass on what they get, and it gives what it got in the first pass.
    """
    inputs: dict[int, Tensor] = {}
    alone: list[bool] = []

    def record(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[index] = hidden_in(args, kwargs)
            alone.append(isinstance(output, Tensor))

        return hook

    removed = [blocks[index] for index in gone]
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            if index not in gone:
                stack.callback(block.register_forward_hook(record(index), with_kwargs=True).remove)
        stack.enter_context(_skipping(removed))
        loss_of(model, batch, loss)
    for index in candidates:
        if index in gone:
            continue
        skipped = [blocks[it] for it in (*gone, index)]
        if not all(alone):  # a block that returns more than hidden states has to run for the rest
            with _skipping(skipped):
                yield index, float(loss_of(model, batch, loss))
            continue
        with _standing_in(blocks[: index + 1], inputs[index]), _standing_in(skipped, None):
            yield index, float(loss_of(model, batch, loss))


@contextmanager
def _standing_in(blocks: Sequence[nn.Module], hidden: Tensor | None) -> Iterator[None]:
    """The blocks do not run: they give `hidden`, or if it is None what they get."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return hidden_in(args, kwargs) if hidden is None else hidden

    with ExitStack() as stack:
        for block in blocks:
            if "forward" not in vars(block):
                block.forward = forward  # type: ignore[method-assign]
                stack.callback(delattr, block, "forward")
        yield


@contextmanager
def _skipping(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """The blocks give back the hidden states that they get."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return _with_first(output, hidden_in(args, kwargs))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _with_first(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
