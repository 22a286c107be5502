"""A model as it was: its modules, their attributes and its numbers, to go back to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """A model's modules, attributes, config, and with `values` all its parameters and buffers, to go back to.

    Memory: with `values` one copy of the model.
    """

    def __init__(self, model: nn.Module, values: bool = True) -> None:
        self.model = model
        self._modules = [(module, _state_of(module)) for module in model.modules()]
        self._config: Any = getattr(model, "config", None)
        self._config_state = dict(vars(self._config)) if hasattr(self._config, "__dict__") else None
        self._values: list[tuple[Tensor, Tensor]] = []
        if values:
            tensors = {id(it): it for it in (*model.parameters(), *model.buffers())}
            self._values = [(it, it.detach().clone()) for it in tensors.values()]

    def restore(self) -> None:
        """The very same parameters hold the very same numbers again. Gradients and optimizers are not touched."""
        for module, state in self._modules:
            module.__dict__.clear()
            module.__dict__.update(_copied(state))
        if self._config_state is not None:
            self._config.__dict__.clear()
            self._config.__dict__.update(self._config_state)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


_OWN = ("_parameters", "_buffers", "_modules")


def _state_of(module: nn.Module) -> dict[str, Any]:
    return _copied(vars(module))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, **{name: dict(state[name]) for name in _OWN}}
