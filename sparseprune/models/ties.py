"""Which parameters transformers ties, for as long as they are parameters.

`tie_weights()` sets one name's parameter to another's whenever somebody calls it. A weight that is packed is not a parameter
any more, and its modules see to it themselves that it stays one: transformers has to let go of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["release", "restore"]

_KEYS = ("_tied_weights_keys", "all_tied_weights_keys")
_BEFORE = "_sparseprune_ties"


def release(model: nn.Module, modules: Iterable[str]) -> None:
    """transformers forgets the ties of the weights of these modules, by name; to be called while they are still dense."""
    gone = {f"{name}.weight" for name in modules}
    for name, module in _transformers(model):
        prefix = f"{name}." if name else ""
        expanded = module.get_expanded_tied_weights_keys(all_submodels=False)
        kept = [
            {it: of for it, of in keys.items() if not gone & {prefix + it, prefix + of}}
            for keys in (expanded, module.all_tied_weights_keys)
        ]
        if kept == [expanded, module.all_tied_weights_keys]:
            continue
        if not hasattr(module, _BEFORE):
            setattr(module, _BEFORE, [getattr(module, attribute) for attribute in _KEYS])
        for attribute, keys in zip(_KEYS, kept, strict=True):
            setattr(module, attribute, keys)


def restore(model: nn.Module) -> None:
    """The ties that were released are transformers' again: their modules are dense."""
    for _, module in _transformers(model):
        for attribute, keys in zip(_KEYS, getattr(module, _BEFORE, ()), strict=False):
            setattr(module, attribute, keys)
        module.__dict__.pop(_BEFORE, None)


def _transformers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers models within `model`, itself among them, whose ties are set up."""
    for name, module in model.named_modules():
        if hasattr(module, "get_expanded_tied_weights_keys") and hasattr(module, "all_tied_weights_keys"):
            yield name, module
