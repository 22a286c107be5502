"""`prune()`: zero the weights of a model that a method finds least needed, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import Evaluate
from sparseprune.models.sites import WeightSite, find_sites
from sparseprune.pruning.allocation import Allocation, AllocationContext, allocation_name, resolve_allocation
from sparseprune.pruning.auto import choose, fast_dtype
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.patterns import Pattern, Scope, check_scope
from sparseprune.pruning.reconstruction import Reconstruction
from sparseprune.pruning.report import BlockReconstructed, LayerPruned, PruneReport
from sparseprune.pruning.rewrite import Rewriter, apply_mask, pack_layer_mask, weight_of
from sparseprune.pruning.scheduled import find_schedule, prune_scheduled
from sparseprune.pruning.schedules import Gradual, Greedy
from sparseprune.pruning.sequential import BlockRun, prune_blocks, prune_layer
from sparseprune.report import track
from sparseprune.statistics.overlap import remember
from sparseprune.statistics.walk import Walk, WalkError, capture

__all__ = ["prune"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prune(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    method: str | Method = "magnitude",
    *,
    sparsity: float | None = None,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    scope: Scope | None = None,
    allocation: str | Mapping[str, float | str] | Allocation = "uniform",
    sequential: bool | None = None,
    reconstruction: Reconstruction | bool = False,
    schedule: str | Gradual | Greedy = "one-shot",
    recover: Callable[[nn.Module], Any] | None = None,
    evaluate: Evaluate | None = None,
    minutes: float | None = None,
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
        include, exclude, lm_head: which layers, see `sparseprune.models.sites.find_sites`.
        scope: what "unstructured" ranks together, "row" or "layer"; by default what suits the method.
        allocation: how much each layer loses: "uniform", a name of `sparseprune.pruning.allocation.ALLOCATIONS`, or a
            mapping from layer names (or shell patterns) to sparsities; see `resolve_allocation`.
        sequential: take each block's inputs from the blocks pruned before it, rather than from the dense model. By
            default where the method gives the remaining weights new values, and the model is a chain of blocks.
        reconstruction: train each block towards the dense one's outputs before the next is pruned; True for the
            defaults of `Reconstruction`. Implies `sequential`. A float32 model's blocks then run in bfloat16
            (autocast) where that is several times as fast; the report says so.
        schedule: "one-shot"; "gradual" or "greedy" (or a `Gradual` or `Greedy` with options) for many steps, with
            `recover(model)` after each, any training loop: what is zero stays zero in it. Greedy steps go where
            `evaluate(model)`, a loss, grows least.
        minutes: how long it may take: blocks read fewer of the calibration batches and reconstruction makes fewer
            epochs, if more would not fit (the report says so), and an allocation that searches stops in time.
        seed: of whatever is drawn at random.
        progress: show bars on stderr.

    An error leaves the model as it was.

    Raises:
        ValueError: an argument out of range, no layer to prune, a layer whose shape the pattern cannot divide, NaN or
            Inf in weights or activations; the message names the layer.
    """
    begin = clock.now()
    pattern = Pattern.parse(pattern)
    steps = find_schedule(schedule)
    if steps is not None:
        once = partial(
            prune, model, pattern, method,
            calibration=calibration if calibration is None else _as_data(calibration),
            include=include, exclude=exclude, lm_head=lm_head, scope=scope, allocation=allocation,
            sequential=sequential, reconstruction=reconstruction, minutes=minutes, seed=seed,
        )  # fmt: skip
        layers = find_layers(model, pattern, include, exclude, lm_head)
        wanted = pattern.resolve_sparsity(sparsity)
        return prune_scheduled(steps, model, layers, pattern, wanted, once, recover, evaluate, progress)
    for name, given in {"recover": recover, "evaluate": evaluate}.items():
        if given is not None:
            raise ValueError(
                f'{name}: belongs to a schedule of several steps; pass schedule="gradual", or leave it out'
            )
    sparsity = pattern.resolve_sparsity(sparsity)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    options = Reconstruction(seed=seed) if reconstruction is True else reconstruction or None
    notes = []
    automatic = method == "auto"
    if automatic:
        recipe = choose(pattern, model, minutes)
        method, options = recipe.method, options or recipe.reconstruction
        notes.append(recipe.reason)
    method = find_method(method, seed)
    ranked = resolve_scope(pattern, method, scope)
    if sequential is False and options is not None:
        raise ValueError(
            "sequential: reconstruction trains each block on the pruned ones before it, got False; leave it out"
        )
    others = {"reconstruction": options is not None, "allocation": allocation != "uniform"}
    data = resolve_calibration(method, calibration, [name for name, used in others.items() if used])
    layers = find_layers(model, pattern, include, exclude, lm_head)
    if method.statistic is None and sequential and options is None:
        raise ValueError(f"sequential: method {method.name} looks at weights only, got True; leave it out")

    with warnings.catch_warnings(record=True) as caught, Rewriter() as prepared:
        warnings.simplefilter("always", RuntimeWarning)
        if method.prepare is not None:
            try:
                with Rewriter() as half_done:

                    def remember_both(parameter: nn.Parameter) -> None:
                        prepared.remember(parameter)
                        half_done.remember(parameter)

                    notes += method.prepare(model, layers, method, pattern, data, remember_both, progress)
            except ValueError as error:
                if not automatic:
                    raise
                notes.append(f"nothing was permuted: {error}")
        context = AllocationContext(
            model, layers, method, pattern, sparsity, ranked, data, minutes, seed, progress, notes=notes
        )
        targets = resolve_allocation(allocation, context)
        job = _Job(model, layers, method, targets, data, progress, notes=notes)
        walk_sequentially = (
            method.changes_weights or options is not None if sequential is None else sequential
        )
        until = None if minutes is None else begin + 60 * minutes
        job.run(
            BlockRun(walk_sequentially, options, until), required=bool(sequential) or bool(reconstruction)
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
        ranked,
        sparsity=sparsity,
        inputs=job.inputs,
        allocation=allocation_name(allocation),
        blocks=tuple(job.blocks),
        notes=(*job.notes, *dict.fromkeys(warned)),
        seconds=clock.now() - begin,
    )


def find_layers(
    model: nn.Module,
    pattern: Pattern,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
) -> list[WeightSite]:
    """`find_sites`, each checked to be fit for the pattern.

    Raises:
        ValueError: no layer at all, or a layer that cannot be pruned so, by name.
    """
    layers = find_sites(model, include=include, exclude=exclude, lm_head=lm_head)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to prune under include={include!r}, "
            f"exclude={exclude!r}, lm_head={lm_head}; see sparseprune.models.sites.find_sites(model)"
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


def resolve_scope(pattern: Pattern, method: Method, scope: Scope | None) -> Scope:
    """What is ranked together: `scope` if it suits the pattern, by default what suits the method."""
    if scope is None:
        return method.scope
    check_scope(scope)
    if pattern.structured:
        raise ValueError(f"scope: pattern {pattern} ranks within its groups, got {scope!r}; leave it out")
    return scope


def resolve_calibration(
    method: Method, calibration: CalibrationData | Iterable[Batch] | None, others: Sequence[str]
) -> CalibrationData | None:
    """`calibration` as data, None where nothing needs it.

    Args:
        others: arguments beside the method that can use calibration data.

    Raises:
        ValueError: it is missing, or given and of no use.
    """
    if calibration is not None:
        if method.statistic is None and not others:
            raise ValueError(f"calibration: method {method.name} looks at weights only; leave it out")
        return _as_data(calibration)
    if method.statistic is not None or "reconstruction" in others:
        who = f"method {method.name}" if method.statistic is not None else "reconstruction"
        raise ValueError(
            f"calibration: {who} needs some, got None; pass sparseprune.calibration.windows(text, tokenizer)"
        )
    return None


def _as_data(calibration: CalibrationData | Iterable[Batch]) -> CalibrationData:
    return calibration if isinstance(calibration, CalibrationData) else CalibrationData(list(calibration))


@dataclass
class _Job:
    """One run over the model's layers, and what it has to report."""

    model: nn.Module
    layers: Sequence[WeightSite]
    method: Method
    targets: Mapping[str, Target]
    data: CalibrationData | None
    progress: bool
    rows: dict[str, LayerPruned] = field(default_factory=dict)
    blocks: list[BlockReconstructed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: str | None = None

    def run(self, options: BlockRun, required: bool) -> None:
        """Prunes all layers.

        Args:
            required: whether a model that is not a chain of blocks is an error, rather than read as a whole.
        """
        statistic = self.method.statistic
        if self.data is None or (statistic is None and options.reconstruction is None):
            if self.method.changes_weights:
                with Rewriter() as rewriter:
                    self._each(self.layers, {}, rewriter)
            else:
                self._by_masks({})
            return
        self.inputs = "sequential" if options.sequential else "dense"
        if statistic is not None and statistic.whole_model:
            # taken from the dense model, before anything changes
            if options.sequential and options.reconstruction is None:
                raise ValueError(
                    f"sequential: method {self.method.name} takes its statistic from the whole dense model, got True; leave it out"
                )
            options = replace(options, statistics=self._collect(self.layers))
            if options.reconstruction is None:
                self.inputs = "dense"
                self._by_masks(options.statistics or {})
                return
        score_only = not self.method.changes_weights and not options.sequential
        if score_only and statistic is not None and statistic.light is None:
            self._by_masks(self._collect(self.layers))
            return
        blocks = find_blocks(self.model)
        try:
            walk = capture(
                self.model, [block for _, block in blocks], self.data.batches, progress=self.progress
            )
        except WalkError as error:
            if required:
                raise
            self.inputs = "dense"
            self.notes.append(f"inputs are the dense model's, taken in whole passes: {error}")
            if options.reconstruction is not None:
                self.notes.append("no block was reconstructed")
            with Rewriter() as rewriter:
                self._each(self.layers, self._collect(self.layers), rewriter)
            return
        if options.reconstruction is not None:
            walk.autocast = fast_dtype(self.model)
            if walk.autocast is not None:
                self.notes.append(
                    "blocks ran in bfloat16 (autocast) while they were calibrated and reconstructed"
                )
        self._by_blocks(blocks, walk, options)

    def _by_masks(self, statistics: Mapping[str, Any]) -> None:
        # All masks first, as bits (a sixteenth of a bfloat16 model): what fails, fails with the model untouched.
        bits = []
        for layer in track(self.layers, f"pruning ({self.method.name})", enabled=self.progress):
            try:
                pruned = self.method.prune(
                    weight_of(layer), statistics.get(layer.name), self.targets[layer.name]
                )
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from error
            bits.append(pack_layer_mask(layer, pruned.mask))
        for layer, layer_bits in zip(self.layers, bits, strict=True):
            self.rows[layer.name] = apply_mask(layer, layer_bits)

    def _by_blocks(self, blocks: Sequence[tuple[str, nn.Module]], walk: Walk, options: BlockRun) -> None:
        inside: list[WeightSite] = []
        outside: list[WeightSite] = []
        for layer in self.layers:
            (inside if layer.name.startswith(tuple(f"{name}." for name, _ in blocks)) else outside).append(
                layer
            )
        with Rewriter() as rewriter:
            if outside and not options.sequential:
                self._each(outside, self._collect(outside), rewriter)
            batches = len(walk.hidden)
            rows, self.blocks = prune_blocks(
                blocks, inside, walk, self.method, self.targets, options, rewriter, self.progress
            )
            if len(walk.hidden) < batches:
                self.notes.append(
                    f"calibrated on {len(walk.hidden)} of {batches} batches or more in each block: all of them did not fit in the time"
                )
            if options.reconstruction is not None and not self.blocks:
                self.notes.append("no block was reconstructed: not one epoch fits in the time")
            self.rows.update((row.name, row) for row in rows)
            if outside and options.sequential:  # the head, say: it reads what the pruned blocks give
                self._each(outside, self._collect(outside), rewriter)

    def _each(self, layers: Sequence[WeightSite], statistics: Mapping[str, Any], rewriter: Rewriter) -> None:
        for layer in track(layers, f"pruning ({self.method.name})", enabled=self.progress):
            row, _ = prune_layer(
                layer, self.method, statistics.get(layer.name), self.targets[layer.name], rewriter
            )
            self.rows[layer.name] = row

    def _collect(self, layers: Sequence[WeightSite]) -> Mapping[str, Any]:
        return {} if self.data is None else self.method.collect(self.model, layers, self.data, self.progress)
