"""The methods by name. A new one is a file beside this one, and its line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparseprune.pruning.base import Method
from sparseprune.pruning.methods.admm import ADMM
from sparseprune.pruning.methods.gradient import GRADIENT, TAYLOR
from sparseprune.pruning.methods.least_squares import least_squares_update
from sparseprune.pruning.methods.magnitude import MAGNITUDE
from sparseprune.pruning.methods.permutation import permute_neurons
from sparseprune.pruning.methods.random_scores import RANDOM, random_method
from sparseprune.pruning.methods.ria import RIA
from sparseprune.pruning.methods.sparsegpt import SPARSEGPT
from sparseprune.pruning.methods.swaps import swap_refine
from sparseprune.pruning.methods.wanda import WANDA
from sparseprune.statistics.inputs import Gram

__all__ = ["METHODS", "SUFFIXES", "find_method"]

METHODS: dict[str, Method] = {
    method.name: method for method in (MAGNITUDE, RANDOM, GRADIENT, TAYLOR, WANDA, RIA, SPARSEGPT, ADMM)
}

SUFFIXES: dict[str, dict[str, Any]] = {
    "permute": {"prepare": permute_neurons},
    "swaps": {"refine": swap_refine, "statistic": Gram},
    "least-squares": {"update": least_squares_update, "statistic": Gram},
}
"""Steps around a method, by name: "ria+permute", "wanda+swaps+least-squares"."""


def find_method(method: str | Method, seed: int = 0) -> Method:
    """The method of that name, with the steps that its suffixes add; one given as such, registered or not,
    passes through.

    Args:
        seed: of what a method draws at random.

    Raises:
        ValueError: no such method or suffix, or a suffix twice.
    """
    if isinstance(method, Method):
        return method
    base, *suffixes = method.split("+") if isinstance(method, str) else [method]
    if base not in METHODS:
        raise ValueError(
            f"method: must be one of {', '.join(sorted(METHODS))}, with any of +{', +'.join(SUFFIXES)} after "
            f"it, got {method!r}"
        )
    found = random_method(seed) if base == "random" else METHODS[base]
    for suffix in suffixes:
        if suffix not in SUFFIXES or suffixes.count(suffix) > 1:
            raise ValueError(
                f"method: what follows {base} must be among +{', +'.join(SUFFIXES)}, each once, got {method!r}"
            )
        step = SUFFIXES[suffix]
        wanted = [it for it in (found.statistic, step.get("statistic")) if it is not None]
        # what a step reads of a statistic, it also reads of its subclasses
        both = next((it for it in wanted if all(issubclass(it, other) for other in wanted)), None)
        if wanted and both is None:
            needs = " and ".join(it.__name__ for it in wanted)
            raise ValueError(
                f"method: {base} and +{suffix} need one statistic that serves both, they need {needs}, got {method!r}; "
                "leave the suffix out, or start from wanda"
            )
        found = replace(found, **{**step, "statistic": both})
    return replace(found, name=method) if suffixes else found
