"""Small questions to a model: which module holds which, on what device, in which mode, how long a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = [
    "device_of",
    "evaluation_mode",
    "max_length",
    "mode",
    "parent_of",
    "put_in_place",
    "require_module",
    "take_hooks",
]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def require_module(**models: object) -> None:
    """Raises TypeError unless each of `models` is a module."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            pair = ", the first of the pair that load_dense gives" if isinstance(model, tuple) else ""
            raise TypeError(
                f"{name}: must be a torch.nn.Module, got a {type(model).__name__}; pass the model itself{pair}"
            )


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds submodule `name`, and its attribute: `setattr(*parent_of(m, n), new)` swaps it.

    Raises:
        ValueError: `model` has no submodule of that name, or `name` is empty (a model has no parent).
    """
    path, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        if not attribute or not isinstance(getattr(parent, attribute, None), nn.Module):
            raise AttributeError(attribute)
    except AttributeError:
        raise ValueError(
            f"name: must be the path of a submodule of {type(model).__name__}, got {name!r}; see "
            "model.named_modules()"
        ) from None
    return parent, attribute


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks on the calls of `old`, whose place `new` takes, are on `new` too; a handle removes its hook from both."""
    for name in _HOOKS:  # the very dictionaries: handles know them
        new.__dict__[name] = old.__dict__[name]


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first parameter, the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, each module's own mode again afterwards."""
    with mode(model, training=False):
        yield


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model.train(training)` inside, each module's own mode again afterwards."""
    others = [module for module in model.modules() if module.training is not training]
    model.train(training)
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def max_length(model: nn.Module) -> int | None:
    """The longest sequence the model's positions allow, None where its config does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `model` has `old` as a submodule; it takes over its hooks."""
    take_hooks(old, new)
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is old:
                parent._modules[attribute] = new
