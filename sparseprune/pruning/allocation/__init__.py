"""How much each layer loses: an allocation gives every layer its target.

An allocation is a function from an `AllocationContext` to the sparsity of each layer, which `resolve_allocation` then
makes add up; or a mapping from layer names to sparsities or patterns, taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from sparseprune.models.sites import WeightSite
from sparseprune.processes import broadcast
from sparseprune.pruning.allocation.context import AllocationContext, exact_targets, uniform_targets
from sparseprune.pruning.allocation.curves import sensitivity
from sparseprune.pruning.allocation.scores import global_threshold, outliers, standard_deviations
from sparseprune.pruning.allocation.search import Search, default_search
from sparseprune.pruning.base import Target
from sparseprune.pruning.patterns import Pattern

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "AllocationContext",
    "Search",
    "allocation_name",
    "check_allocation",
    "needs_calibration",
    "resolve_allocation",
    "searches",
]

Allocation = Callable[[AllocationContext], Mapping[str, float]]
"""Wished sparsities by layer name."""

ALLOCATIONS: dict[str, Allocation] = {
    "global": global_threshold,
    "std": standard_deviations,
    "owl": outliers,
    "sensitivity": sensitivity,
    "search": default_search,
}
"""By name, next to "uniform". A new one is a function in a file beside this one, and its line here."""

_CALIBRATED = {"owl", "sensitivity", "search"}
"""Those that read the calibration text by themselves, whatever the method."""


def check_allocation(allocation: Any, pattern: Pattern) -> None:
    """What can be known of an allocation without the layers.

    Raises:
        ValueError: an unknown name, an N:M pattern with anything but "uniform" or a mapping to patterns, or a mapping's
            value that is neither a sparsity nor a pattern.
    """
    if isinstance(allocation, Mapping):
        for key, value in allocation.items():
            _value(key, value, pattern)
        return
    if allocation == "uniform":
        return
    if not callable(allocation) and not (isinstance(allocation, str) and allocation in ALLOCATIONS):
        raise ValueError(
            f"allocation: must be one of uniform, {', '.join(sorted(ALLOCATIONS))}, a mapping from layers to "
            f"sparsities, or a function, got {allocation!r}"
        )
    if pattern.structured:
        raise ValueError(
            f"allocation: pattern {pattern} removes the same share of every layer, got "
            f'{allocation_name(allocation)!r}; pass "uniform", a mapping such as {{"*.down_proj": "dense"}}, or '
            'pattern="unstructured"'
        )


def needs_calibration(allocation: Any) -> bool:
    """Whether it reads calibration text by itself; a function of the user's may."""
    return allocation in _CALIBRATED if isinstance(allocation, str) else isinstance(allocation, Search)


def searches(allocation: Any) -> bool:
    """Whether it tries for as long as it may, so that minutes bound it; a function of the user's may."""
    return allocation in ("search", "sensitivity") if isinstance(allocation, str) else callable(allocation)


def resolve_allocation(
    allocation: str | Mapping[str, float | str] | Allocation, context: AllocationContext
) -> dict[str, Target]:
    """What each layer of the context is to become.

    Args:
        allocation: "uniform", a name of `ALLOCATIONS`, a function such as these, or a mapping from layer names or
            shell patterns to a sparsity in [0, 1) or a pattern ("dense", "2:4", "4:8"); a layer takes the first entry
            that matches it, and the context's own pattern and sparsity without one.

    The named ones and functions remove as many weights in all as "uniform" does, whatever they wish for; a mapping,
    and a `Search` with a budget of bytes or seconds, are taken at their word.

    Raises:
        ValueError: what `check_allocation` refuses, a key that matches no layer, a wish that is missing, or calibration
            text that is needed.
    """
    check_allocation(allocation, context.pattern)
    if isinstance(allocation, Mapping):
        return _from_mapping(allocation, context)
    if allocation == "uniform":
        return uniform_targets(context)
    function = ALLOCATIONS[allocation] if isinstance(allocation, str) else allocation
    wishes = function(context)
    for layer in context.layers:
        wish = wishes.get(layer.name)
        if wish is None or not math.isfinite(wish):
            raise ValueError(
                f"allocation: {allocation_name(allocation)} must give every layer a sparsity, gave {layer.name} {wish}"
            )
    wishes = _of_first_process(wishes, context)
    if isinstance(function, Search) and not function.sums_to_sparsity:
        return {name: Target(context.pattern, wish, context.scope) for name, wish in wishes.items()}
    return exact_targets(context, wishes)


def _of_first_process(wishes: Mapping[str, float], context: AllocationContext) -> dict[str, float]:
    """Every process's wishes become the first one's: a search goes by the clock, which no two share."""
    values = torch.tensor([wishes[layer.name] for layer in context.layers], dtype=torch.float64)
    values = values.to(context.layers[0].weight.device)
    broadcast(values, 0)
    return {layer.name: value for layer, value in zip(context.layers, values.tolist(), strict=True)}


def allocation_name(allocation: str | Mapping[str, float | str] | Allocation) -> str:
    """For reports: the name, "given" for a mapping, a function's own."""
    if isinstance(allocation, str):
        return allocation
    if isinstance(allocation, Mapping):
        return "given"
    return str(getattr(allocation, "__name__", type(allocation).__name__)).lower()


def _from_mapping(allocation: Mapping[str, float | str], context: AllocationContext) -> dict[str, Target]:
    targets = uniform_targets(context)
    for layer in context.layers:
        key = next((key for key in allocation if fnmatchcase(layer.name, key)), None)
        if key is not None:
            targets[layer.name] = _target(key, allocation[key], layer, context)
    matching = {key for key in allocation if any(fnmatchcase(it.name, key) for it in context.layers)}
    unknown = [key for key in allocation if key not in matching]
    if unknown:
        raise ValueError(
            f"allocation: {unknown[0]!r} matches no layer to prune; names are such as {context.layers[0].name}"
        )
    return targets


def _target(key: str, value: float | str, layer: WeightSite, context: AllocationContext) -> Target:
    pattern, sparsity = _value(key, value, context.pattern)
    pattern.check_shape(layer.out_features, layer.in_features, layer.name)
    return Target(pattern, sparsity, context.scope)


def _value(key: str, value: float | str, general: Pattern) -> tuple[Pattern, float]:
    """What a mapping's entry asks for: a pattern, and the fraction of weights to remove."""
    if isinstance(value, str):
        if value == "dense":
            return Pattern(), 0.0
        try:
            pattern = Pattern.parse(value)
            return pattern, pattern.resolve_sparsity(None)
        except ValueError as error:
            raise ValueError(f"allocation[{key!r}]: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:  # NaN fails too
        raise ValueError(
            f"allocation[{key!r}]: must be in [0, 1), got {value}; pass the fraction of weights to remove"
        )
    if general.structured and value != 0:
        raise ValueError(
            f"allocation[{key!r}]: pattern {general} fixes the sparsity, got {value}; pass a pattern "
            'such as "4:8" or "dense", or prune with pattern="unstructured"'
        )
    return Pattern() if general.structured else general, float(value)
