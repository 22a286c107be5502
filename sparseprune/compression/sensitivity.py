"""What each form of each weight would cost the model: the divergence of its predictions from the dense model's.

To measure every form in every place would take a pass of the model for each. By the linearity theorem (Malinovskii et al.
2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", arXiv 2411.17525), which holds
while changes are small, the divergence is a sum over layers of a_l t_l^2: t_l the relative error of the layer, a_l a number
of the layer alone. So one pass with noise in a layer gives a_l, and a form's error is solved for on some of its rows.
Theirs is the error of weights; ours is that of the layer's outputs, which is what the solvers minimise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import clock
from sparseprune.calibration import CalibrationData
from sparseprune.compression.forms import Form
from sparseprune.models.blocks import find_blocks
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.allocation.context import block_of
from sparseprune.pruning.allocation.curves import kind_of, two_factors
from sparseprune.pruning.allocation.judge import Judge
from sparseprune.pruning.base import Target
from sparseprune.pruning.methods.sparsegpt import SPARSEGPT
from sparseprune.quantization.methods.gptq import GPTQ
from sparseprune.report import track
from sparseprune.statistics.inputs import Gram
from sparseprune.statistics.walk import WalkError, advance, block_statistics, capture
from sparseprune.weights.rounding import Grid
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["form_errors", "lookup_losses", "sensitivities"]

_ROWS = 64  # of a weight, solved to estimate its error: rows have nothing to do with each other
_NOISE = 0.04  # relative squared error of a layer's outputs, about what 4 bits and half the weights leave
_LEAST = 1e-9  # of a divergence, so that it has a logarithm


def form_errors(
    model: nn.Module,
    sites: Sequence[WeightSite],
    forms: Sequence[Form],
    data: CalibrationData,
    seconds: float,
    progress: bool,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(site name -> relative squared error of its outputs in each form, site name -> standard deviation of a noise on its
    weight that makes an error of `_NOISE`).

    Errors are those that SparseGPT and GPTQ leave on inputs of the dense model; infinite where a form does not fit. Where all
    would take longer than `seconds`, as the first block shows, only every second block is solved, or third, and so on, and those behind it
    have its errors.
    """
    errors: dict[str, list[float]] = {}
    spreads: dict[str, float] = {}
    last: dict[str, list[float]] = {}  # by kind
    blocks, stride = max(1, len(find_blocks(model))), 1
    for number, (layers, statistics) in enumerate(_statistics(model, sites, data, progress)):
        begin = clock.now()
        for site in layers:
            gram, weight = statistics[site.name], site.weight.float()
            kind = kind_of(site.name)
            if number % stride == 0 or kind not in last:
                at = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()
                last[kind] = _errors(weight[at], gram, forms)
            errors[site.name] = last[kind]
            energy = _energy(weight, gram)
            spreads[site.name] = (
                _NOISE * energy / max(len(weight) * float(gram.matrix.trace()), 1e-30)
            ) ** 0.5
        if number == 0:
            stride = max(1, math.ceil((clock.now() - begin) * blocks / seconds))
    return errors, spreads


def _statistics(
    model: nn.Module, sites: Sequence[WeightSite], data: CalibrationData, progress: bool
) -> Iterator[tuple[list[WeightSite], Mapping[str, Any]]]:
    """Sites, and the Gram matrices of their inputs, block by block where the model is a chain of blocks."""
    blocks = find_blocks(model)
    rest = list(sites)
    try:
        walk = capture(model, [block for _, block in blocks], data.batches, progress=progress)
    except WalkError:
        blocks = []
    for index, (name, block) in enumerate(track(blocks, "errors of each form", enabled=progress)):
        inside = [site for site in rest if site.name.startswith(f"{name}.")]
        rest = [site for site in rest if site not in inside]
        if inside:
            yield inside, block_statistics(block, inside, walk, index, Gram)
        advance(block, walk, index)
    if rest:
        yield rest, Gram.collect(model, rest, data, progress=progress)


def _energy(change: Tensor, gram: Gram) -> float:
    """Sum of squares of what `change` [rows, in] makes of the inputs."""
    return float(((change @ gram.matrix.to(change.dtype)) * change).sum(dtype=torch.float64))


def _errors(weight: Tensor, gram: Gram, forms: Sequence[Form]) -> list[float]:
    whole = max(_energy(weight, gram), 1e-30)
    pruned: dict[Any, tuple[Tensor, Tensor | None]] = {}
    found = []
    for form in forms:
        if form.plain or not form.fits(weight):
            found.append(0.0 if form.plain else float("inf"))
            continue
        if form.target not in pruned:
            pattern, sparsity = form.target
            left: tuple[Tensor, Tensor | None] = (weight, None)
            if sparsity:
                left = SPARSEGPT.prune(weight, gram, Target(pattern, sparsity))
            pruned[form.target] = left
        start, kept = pruned[form.target]
        codes, grid = GPTQ.solve(start, kept, form.encoding, gram)
        found.append(_energy(_values(codes, kept, grid) - weight, gram) / whole)
    return found


def _values(codes: Tensor, kept: Tensor | None, grid: Grid) -> Tensor:
    scale, zero = grid.columns(0, codes.shape[1])
    values = codes * scale + zero
    return values if kept is None else torch.where(kept, values, 0)


def sensitivities(
    judge: Judge,
    sites: Sequence[WeightSite],
    spreads: Mapping[str, float],
    deadline: float,
    seed: int,
    progress: bool,
) -> tuple[dict[str, float], int]:
    """(site name -> the divergence for each unit of relative squared error of its outputs, how many were measured).

    Sites come in random order; those left at the deadline are estimated from the others, by block and kind.
    """
    blocks = block_of(judge.model, sites)
    order = list(sites)
    random.Random(seed).shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for site in track(order, "sensitivity of each layer", enabled=progress):
        if clock.now() > deadline and found:
            break
        before = site.weight.clone()
        noise = torch.randn(before.shape, generator=generator).to(before.device) * spreads[site.name]
        site.weight.copy_(before.float() + noise)
        try:
            found[site.name] = max(judge(blocks[site.name]), _LEAST) / _NOISE
        finally:
            site.weight.copy_(before)
    places = {name: (block, kind_of(name)) for name, block in blocks.items()}
    logs = two_factors(places, {name: math.log(it) for name, it in found.items()})
    estimated = {name: math.exp(log) for name, log in logs.items()}
    return {**estimated, **found}, len(found)


def lookup_losses(judge: Judge, site: WeightSite, forms: Sequence[Form]) -> list[float]:
    """The divergence that each form of an embedding's or a head's weight gives, rounded to nearest."""
    before = site.weight.clone()
    losses = []
    try:
        for form in forms:
            if form.plain:
                losses.append(0.0)
                continue
            site.weight.copy_(SparseWeight.from_dense(before, form.format, form.encoding).dense())
            losses.append(max(judge(), _LEAST))
    finally:
        site.weight.copy_(before)
    return losses
