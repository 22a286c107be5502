"""`prune()`: zero the weights of a model that a method finds least needed, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData, as_data
from sparseprune.models.batches import Batch
from sparseprune.models.losses import Evaluate
from sparseprune.models.sites import WeightSite, dense_again, find_sites
from sparseprune.options import Layers
from sparseprune.pruning.allocation import Allocation, AllocationContext, allocation_name, resolve_allocation
from sparseprune.pruning.auto import choose
from sparseprune.pruning.base import Method
from sparseprune.pruning.job import Job
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.options import Recipe, Reconstruction
from sparseprune.pruning.patterns import Pattern, Scope
from sparseprune.pruning.report import PruneReport
from sparseprune.pruning.rewrite import Rewriter
from sparseprune.pruning.scheduled import find_schedule, prune_scheduled
from sparseprune.pruning.schedules import Gradual, Greedy
from sparseprune.pruning.sequential import BlockRun
from sparseprune.statistics.overlap import remember

__all__ = ["prune"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prune(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    method: str | Method = "magnitude",
    *,
    sparsity: float | None = None,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    allocation: str | Mapping[str, float | str] | Allocation = "uniform",
    scope: Scope | None = None,
    sequential: bool | None = None,
    reconstruction: Reconstruction | bool | None = None,
    schedule: str | Gradual | Greedy = "one-shot",
    minutes: float | None = None,
    recover: Callable[[nn.Module], Any] | None = None,
    evaluate: Evaluate | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> PruneReport:
    """Prunes the model's linear layers, in place.

    Args:
        pattern: "2:4", "4:8", any "N:M", "unstructured", blocks "RxC" such as "16x1". Whole neurons, heads
            or layers are cut out by `sparseprune.cut`.
        method: a name of `sparseprune.pruning.METHODS`, with "+permute", "+swaps" or "+least-squares" behind it, a
            `Method` of your own, or "auto" for the best recipe in `minutes` (see `sparseprune.pruning.auto`).
        sparsity: fraction of weights to remove, in [0, 1); implied by N:M, needed otherwise.
        calibration: what the method runs the model on (`sparseprune.calibration.windows`, or any batches); needed by
            all methods but those that look at weights only.
        allocation: how much each layer loses: "uniform", a name of `sparseprune.pruning.allocation.ALLOCATIONS`, or a
            mapping from layer names (or shell patterns) to sparsities; see `resolve_allocation`.
        scope: what "unstructured" ranks together, "row" or "layer"; by default what suits the method.
        sequential: take each block's inputs from the blocks pruned before it, rather than from the dense model. By
            default where the method gives the remaining weights new values, and the model is a chain of blocks.
        reconstruction: train each block towards the dense one's outputs before the next is pruned; True for the
            defaults of `Reconstruction`, by default only where the method is "auto". Implies `sequential`. A float32
            model's blocks then run in bfloat16 (autocast) where that is several times as fast; the report says so.
        schedule: "one-shot"; "gradual" or "greedy" (or a `Gradual` or `Greedy` with options) for many steps, with
            `recover(model)` after each, any training loop: what is zero stays zero in it. Greedy steps go where
            `evaluate(model)`, a loss, grows least.
        minutes: how long it may take: blocks read fewer of the calibration batches and reconstruction makes fewer
            epochs, if more would not fit (the report says so), and an allocation that searches stops in time.
        recover, evaluate: of a schedule.
        include, exclude, lm_head: which layers, see `sparseprune.models.sites.find_sites`.
        seed: of whatever is drawn at random.
        progress: show bars on stderr.

    An error leaves the model as it was.

    Raises:
        ValueError: an argument out of range or without a meaning beside the others, no layer to prune, a layer whose
            shape the pattern cannot divide, NaN or Inf in weights or activations; the message names the layer.
    """
    recipe = Recipe(
        pattern=pattern, method=method, sparsity=sparsity, allocation=allocation, scope=scope, sequential=sequential,
        reconstruction=reconstruction, schedule=schedule, minutes=minutes, seed=seed,
    )  # fmt: skip
    steps = find_schedule(schedule, recover, evaluate)
    data = None if calibration is None else as_data(calibration)
    recipe.check_calibration(data is not None)
    layers = find_layers(model, Pattern.parse(pattern), Layers(include, exclude, lm_head))
    if steps is None:
        return prune_once(model, layers, recipe, data, progress)
    once = partial(prune_once, model, data=data, progress=False)
    return prune_scheduled(steps, model, layers, recipe, once, recover, evaluate, progress)


def prune_once(
    model: nn.Module,
    layers: Sequence[WeightSite],
    recipe: Recipe,
    data: CalibrationData | None,
    progress: bool,
) -> PruneReport:
    """Prunes `layers`, which fit the recipe's pattern, in one go."""
    begin = clock.now()
    pattern = Pattern.parse(recipe.pattern)
    sparsity = pattern.resolve_sparsity(recipe.sparsity)
    method, reconstruction, notes = _method(model, recipe)
    with warnings.catch_warnings(record=True) as caught, Rewriter() as prepared:
        warnings.simplefilter("always", RuntimeWarning)
        notes += _prepare(model, layers, method, recipe, data, prepared, progress)
        scope = method.scope if recipe.scope is None else recipe.scope
        context = AllocationContext(
            model, layers, method, pattern, sparsity, scope, data, recipe.minutes, recipe.seed, progress, notes=notes
        )  # fmt: skip
        targets = resolve_allocation(recipe.allocation, context)
        job = Job(model, layers, method, targets, data, progress, notes=notes)
        sequential = recipe.sequential
        if sequential is None:
            sequential = method.changes_weights or reconstruction is not None
        until = None if recipe.minutes is None else begin + 60 * recipe.minutes
        job.run(
            BlockRun(sequential, reconstruction, until),
            required=bool(recipe.sequential) or bool(recipe.reconstruction),
        )
    for layer in layers:
        targets[layer.name].note(layer)
    if data is not None:
        remember(model, data)
    warned = [str(it.message) for it in caught if issubclass(it.category, RuntimeWarning)]
    return PruneReport.of(
        model,
        [job.rows[layer.name] for layer in layers],
        method,
        pattern,
        data,
        scope,
        sparsity=sparsity,
        inputs=job.inputs,
        allocation=allocation_name(recipe.allocation),
        blocks=tuple(job.blocks),
        notes=(*job.notes, *dict.fromkeys(warned)),
        seconds=clock.now() - begin,
    )


def _method(model: nn.Module, recipe: Recipe) -> tuple[Method, Reconstruction | None, list[str]]:
    """The method, how blocks are reconstructed after it, and what the report should tell of the choice."""
    given = recipe.reconstruction
    reconstruction = Reconstruction(seed=recipe.seed) if given is True else given or None
    if recipe.method != "auto":
        return find_method(recipe.method, recipe.seed), reconstruction, []
    chosen = choose(Pattern.parse(recipe.pattern), model, recipe.minutes, reconstruct=given is not False)
    return find_method(chosen.method, recipe.seed), reconstruction or chosen.reconstruction, [chosen.reason]


def _prepare(
    model: nn.Module,
    layers: Sequence[WeightSite],
    method: Method,
    recipe: Recipe,
    data: CalibrationData | None,
    rewriter: Rewriter,
    progress: bool,
) -> list[str]:
    """What the method does to the whole model first; notes for the report. `rewriter` puts it back after an error."""
    if method.prepare is None:
        return []
    pattern = Pattern.parse(recipe.pattern)
    try:
        with Rewriter() as half_done:

            def remember_both(parameter: nn.Parameter) -> None:
                rewriter.remember(parameter)
                half_done.remember(parameter)

            return method.prepare(model, layers, method, pattern, data, remember_both, progress)
    except ValueError as error:
        if recipe.method != "auto":
            raise
        return [f"nothing was permuted: {error}"]


def find_layers(model: nn.Module, pattern: Pattern, chosen: Layers) -> list[WeightSite]:
    """The model's linears that are `chosen`, each checked to be fit for the pattern.

    Raises:
        ValueError: no layer at all, or a layer that cannot be pruned so, by name.
    """
    layers = find_sites(model, **vars(chosen))
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to prune under {chosen}; {dense_again(model)}"
        )
    for layer in layers:
        pattern.check_shape(layer.out_features, layer.in_features, layer.name)
        weight = layer.weight
        if weight.dtype not in _DTYPES:
            raise ValueError(
                f"{layer.name}: weights must be float32, bfloat16, float16 or float64, got "
                f"{weight.dtype}; convert the model with .to(dtype)"
            )
        if weight.is_meta:
            raise ValueError(
                f"{layer.name}: its weights must be loaded, they are on the meta device; load the model first"
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"{layer.name}: weights must be finite, got NaN or Inf; repair the checkpoint, or exclude it"
            )
    return layers
