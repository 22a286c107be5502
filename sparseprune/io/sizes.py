"""Sizes of a model's linears that its config cannot express, kept in the config under `sparseprune_sizes`.

Structured pruning writes them (fewer heads of the same width in GPT-2, fewer neurons in some layers only); a model
built from the config gets them before its weights are read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseprune.models.sites import is_conv1d

__all__ = ["SIZES", "apply_sizes", "name_sizes"]

SIZES = "sparseprune_sizes"


def name_sizes(module: nn.Module, out: int, inner: int) -> None:
    """Sets what a linear itself says of its size."""
    names = ("nf", "nx") if is_conv1d(module) else ("out_features", "in_features")
    for name, value in zip(names, (out, inner), strict=True):
        setattr(module, name, value)


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
                raise TypeError(f"{module}.{attribute} is no integer")
            setattr(model.get_submodule(module), attribute, value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sizes: must be those of a {type(model).__name__}, got: {error}") from error


def _resize(module: nn.Module, out: int, inner: int) -> None:
    conv = is_conv1d(module)
    if not (isinstance(module, nn.Linear) or conv) or min(out, inner) < 1:
        raise ValueError(f"{type(module).__name__} cannot become [{out}, {inner}]")
    old: nn.Parameter = module.weight  # type: ignore[assignment]
    module.weight = nn.Parameter(
        old.detach().new_empty((inner, out) if conv else (out, inner)), old.requires_grad
    )
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    if bias is not None and bias.shape[0] != out:
        module.bias = nn.Parameter(bias.detach().new_empty(out), bias.requires_grad)
    name_sizes(module, out, inner)
