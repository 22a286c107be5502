"""Sizes of a model's linears that its config cannot express, kept in the config under `sparseprune_sizes`.

Structured pruning writes them (fewer heads of the same width in GPT-2, fewer neurons in some layers only); a model
built from the config gets them before its weights are read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseprune.models.sites import is_linear, site_of

__all__ = ["SIZES", "apply_sizes"]

SIZES = "sparseprune_sizes"


def apply_sizes(model: nn.Module, sizes: Any) -> None:
    """Gives linears of a model the sizes under "linears", their values lost, and sets the "attributes".

    For a model that a checkpoint fills afterwards; `sizes` is `config.sparseprune_sizes` or `StructuredReport.sizes`.

    Raises:
        ValueError: sizes of another form, or for a model that has no such linears.
    """
    try:
        linears = {name: (int(out), int(inner)) for name, (out, inner) in sizes["linears"].items()}
        attributes = [
            (module, attribute, int(value))
            for module, changed in sizes["attributes"].items()
            for attribute, value in changed.items()
        ]
        for name, shape in linears.items():
            _resize(model.get_submodule(name), *shape)
        for module, attribute, value in attributes:
            if type(getattr(model.get_submodule(module), attribute)) is not int:
                raise TypeError(f"{module}.{attribute} is not an integer")
            setattr(model.get_submodule(module), attribute, value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sizes: must be those of a {type(model).__name__}, got: {error}") from error


def _resize(module: nn.Module, out: int, inner: int) -> None:
    if not is_linear(module) or min(out, inner) < 1:
        raise ValueError(f"{type(module).__name__} cannot become [{out}, {inner}]")
    site = site_of(module)
    bias = site.bias
    resized = None if bias is None or bias.shape[0] == out else bias.new_empty(out)
    site.set(site.weight.new_empty(out, inner), resized)
