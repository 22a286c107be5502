"""`compress()`: a model within a budget of bytes, each weight in the form that costs the model least for its bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData, as_data
from sparseprune.compression.choice import Choice, Options, choose
from sparseprune.compression.forms import EMBEDDING_FORMS, FORMS, Form
from sparseprune.compression.options import Budget, Compression
from sparseprune.compression.report import CompressReport, LayerCompressed
from sparseprune.compression.sensitivity import form_errors, lookup_losses, sensitivities
from sparseprune.io.checkpoint import file_bytes
from sparseprune.models.batches import Batch
from sparseprune.models.sites import WeightSite, dense_again, find_sites
from sparseprune.models.snapshot import Snapshot
from sparseprune.options import Layers
from sparseprune.pruning.allocation.judge import Judge, hold_out
from sparseprune.pruning.driver import prune
from sparseprune.pruning.report import PruneReport
from sparseprune.pruning.sequential import BlockRun
from sparseprune.quantization.driver import RECONSTRUCTION, encode_layers
from sparseprune.quantization.embedding import embedding_sites, encode_site, no_kernels, stays
from sparseprune.quantization.methods import METHODS
from sparseprune.recovery import Training, recover
from sparseprune.recovery.report import RecoveryReport
from sparseprune.statistics.overlap import remember
from sparseprune.weights.gguf import StoredCodes
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["compress"]

_LEARNING_RATE = 1e-4
_TOKENS = 1024  # held out, to judge by
_MEASURED_ON = 8  # batches at most that errors of forms are solved on
_SOLVED_ON = 32  # batches at most that zeros and codes are solved on; all are trained on
_MEASURING_SHARE = 0.2  # of the minutes, for the sensitivities
_SOLVING_SHARE = 0.45  # of what is left then: for zeros and codes, block by block; training has the rest


@dataclass
class _Plan:
    """What each weight becomes, and what the phases have to tell."""

    linears: dict[str, WeightSite]
    lookups: dict[str, WeightSite]
    choices: Mapping[str, Choice]
    kept: Mapping[str, SparseWeight]
    notes: list[str] = field(default_factory=list)
    pruned: PruneReport | None = None
    recovered: RecoveryReport | None = None


def compress(
    model: nn.Module,
    budget: str | int | Budget,
    *,
    calibration: CalibrationData | Iterable[Batch],
    keep: str | Path | None = None,
    minutes: float = 20.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompressReport:
    """Makes a model fit into a budget, in place: for each weight it picks a form (`FORMS`), prunes, rounds and trains.

    1. On held-out text it measures how much the model minds an error in each layer, and solves what error each form
       makes there; the forms that together cost least within the budget are chosen: dense ones where they win.
    2. Layers that are to lose weights are pruned, embeddings are rounded, and block by block the linears get their codes
       (GPTQ), and are trained through them towards the dense block's outputs.
    3. In what is left of the time the model is trained through its codes towards the dense one's predictions.

    Args:
        budget: of the file with the weights: "62MB", "60MiB", "3.5 bits" a weight, or bytes.
        calibration: windows of text (`sparseprune.calibration.windows`) or batches, at least two: the more there are, the
            better for the training. Zeros and codes are solved on the first 32.
        keep: the GGUF file that the model came from: weights that are what its Q4_0, Q4_1 or Q8_0 codes stand for may keep
            these, at no loss.
        minutes: how long it may take.
        include, exclude: which linears, see `sparseprune.models.sites.find_sites`; embeddings and output head are always
            looked at.
        seed: of what is drawn at random.
        progress: show bars on stderr.

    Weights that keep a file's codes are not trained. What a model does not allow (blocks that are not a chain are not
    reconstructed, one without logits is not trained as a whole) the report's notes say.

    An error leaves the model as it was. Memory: two copies of the model, and training's.

    Raises:
        ValueError: a budget below what the cheapest forms take (the message says how much that is), no linear layer, a
            model that gives no logits or hidden states to judge by.
    """
    begin = clock.now()
    asked = Compression(budget, keep=keep, minutes=minutes)
    data = as_data(calibration)
    fit, pieces = hold_out(data, "compress", _TOKENS)
    until = begin + 60 * asked.minutes
    given = Layers(include, exclude)
    linears = {
        it.name: it
        for it in find_sites(model, include=include, exclude=exclude)
        if not (it.stays or no_kernels(it.weight))
    }
    if not linears:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer to compress under {given}; {dense_again(model)}"
        )
    lookups = {it.name: it for it in embedding_sites(model) if it.name not in linears and not stays(it)}
    sites = [*linears.values(), *lookups.values()]
    before = file_bytes(model)
    allowed = Budget.parse(asked.budget).of(sum(it.numel() for it in model.parameters()))
    stored = None if keep is None else StoredCodes.read(keep)
    kept = {} if stored is None else {it.name: found for it in sites if (found := stored.find(it.weight))}
    fixed = before - sum(it.weight.nbytes for it in sites)
    options = {site.name: _forms(site, site.name in lookups, kept.get(site.name)) for site in sites}
    least = fixed + sum(min(it.prices) for it in options.values())
    if least > allowed:
        raise ValueError(
            f"budget: the least that this model can take is {least:,} bytes, got {allowed:,}; allow "
            "that, or cut neurons, heads or layers first (sparseprune.cut)"
        )
    shapes = {it.name: (it.weight.shape[0], it.weight.shape[1], it.weight.nbytes) for it in sites}
    snapshot = Snapshot(model)
    teacher = copy.deepcopy(model)
    try:
        judge = Judge(model, pieces)
        measured = _measure(judge, linears, lookups, options, fit, until, seed, progress)
        plan = _Plan(linears, lookups, choose(options, allowed - fixed), kept, [measured])
        _solve(model, plan, fit, until, seed, progress)
        if judge.compares_logits:
            _train(model, teacher, plan, data, until, seed, progress)
        else:
            plan.notes.append("not trained towards the dense model: it gives no logits")
    except BaseException:
        snapshot.restore()
        raise
    remember(model, data)
    after = file_bytes(model)
    if after > allowed:
        plan.notes.append(
            f"over the budget by {after - allowed:,} bytes: forms took more than they were reckoned at"
        )
    rows = tuple(_row(name, plan.choices[name], *shapes[name]) for name in options)
    return CompressReport(
        rows,
        allowed,
        before,
        after,
        clock.now() - begin,
        tuple(plan.notes),
        plan.pruned,
        plan.recovered,
    )


def _row(name: str, choice: Choice, rows: int, columns: int, nbytes: int) -> LayerCompressed:
    bits = 8 / max(1, rows * columns)
    other = choice.other
    return LayerCompressed(
        name,
        (rows, columns),
        form=str(choice.form),
        bits=choice.price * bits,
        bytes_before=nbytes,
        bytes_after=choice.price,
        loss=choice.loss,
        runner_up="" if other is None else str(other),
        runner_up_bits=choice.other_price * bits,
        runner_up_loss=choice.other_loss,
    )


def _forms(site: WeightSite, looked_up: bool, kept: SparseWeight | None) -> Options:
    shape = (site.weight.shape[0], site.weight.shape[1])
    forms = [it for it in (EMBEDDING_FORMS if looked_up else FORMS) if it.fits(site.weight)]
    if kept is not None:
        forms.insert(0, Form("dense", kept.encoding, kept=True))
    return Options(tuple(forms), tuple(it.nbytes(site.name, shape, site.weight.dtype) for it in forms))


def _measure(
    judge: Judge,
    linears: Mapping[str, WeightSite],
    lookups: Mapping[str, WeightSite],
    options: dict[str, Options],
    fit: CalibrationData,
    until: float,
    seed: int,
    progress: bool,
) -> str:
    """Gives the options their losses; what there is to say of them."""
    seconds = _MEASURING_SHARE * (until - clock.now())
    few = CalibrationData(fit.batches[:_MEASURED_ON], fit.source)
    errors, spreads = form_errors(judge.model, list(linears.values()), FORMS, few, seconds / 3, progress)
    for name, site in lookups.items():
        losses = lookup_losses(judge, site, [it for it in options[name].forms if not it.kept])
        options[name] = options[name].with_losses(losses)
    deadline = clock.now() + seconds / 2
    minds, count = sensitivities(judge, list(linears.values()), spreads, deadline, seed, progress)
    for name in linears:
        known = dict(zip(FORMS, errors[name], strict=True))
        losses = [minds[name] * known[it] for it in options[name].forms if not it.kept]
        options[name] = options[name].with_losses(losses)
    return f"sensitivity: measured in {count} of {len(linears)} linears, estimated in the others"


def _solve(
    model: nn.Module, plan: _Plan, data: CalibrationData, until: float, seed: int, progress: bool
) -> None:
    """Gives every weight its form."""
    few = CalibrationData(data.batches[:_SOLVED_ON], data.source)
    end = clock.now() + _SOLVING_SHARE * (until - clock.now())
    forms = {name: it.form for name, it in plan.choices.items()}
    to_prune = {name: forms[name] for name in plan.linears if forms[name].target[1]}
    if to_prune:
        allocation: dict[str, Any] = {}
        for name, form in to_prune.items():
            pattern, sparsity = form.target
            allocation[name] = str(pattern) if pattern.structured else sparsity
        plan.pruned = prune(
            model,
            "unstructured",
            "auto",
            sparsity=0.5,
            allocation=allocation,
            include=list(to_prune),
            calibration=few,
            minutes=max(0.05, 0.5 * (end - clock.now()) / 60),
            seed=seed,
            progress=progress,
        )
    for name, site in plan.lookups.items():
        form = forms[name]
        if form.kept:
            encode_site(model, site, plan.kept[name])
        elif not form.plain:
            encode_site(model, site, SparseWeight.from_dense(site.weight, "dense", form.encoding))
    wanted = {
        name: forms[name].encoding for name in plan.linears if not forms[name].plain and not forms[name].kept
    }
    run = BlockRun(True, RECONSTRUCTION, end)
    encoded = encode_layers(
        model, plan.linears.values(), wanted, METHODS["gptq"], few, run, progress, required=False
    )
    plan.notes += encoded.notes
    for name, site in plan.linears.items():
        weight = plan.kept[name] if forms[name].kept else None
        if name in encoded.made:
            weight = encoded.made[name].weight
        if weight is not None:
            site.replace(model, SparseLinear.in_place_of(site.module, weight))


def _train(
    model: nn.Module,
    teacher: nn.Module,
    plan: _Plan,
    data: CalibrationData,
    until: float,
    seed: int,
    progress: bool,
) -> None:
    """Trains the model through its new codes, for what is left of the time."""
    kept = [name for name in plan.linears if plan.choices[name].form.kept]
    if all(plan.choices[name].form.plain or name in kept for name in plan.linears):
        return  # nothing has lost anything that training could give back
    minutes = (until - clock.now()) / 60
    if minutes < 0.1:
        plan.notes.append("not trained towards the dense model: no time was left")
        return
    plan.recovered = recover(
        model,
        data,
        teacher=teacher,
        minutes=minutes,
        training=Training(_LEARNING_RATE),
        exclude=kept,
        seed=seed,
        progress=progress,
    )
