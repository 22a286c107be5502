"""Keeping what is pruned at zero while anything trains the model, and putting a model back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparseprune.models.sites import find_sites

__all__ = ["Snapshot", "Zeros", "hold_zeros"]


class Zeros:
    """Which weights of a model are pruned; once one is, it stays so.

    At first the zeros of the linears that have some and other weights too. `grow` adds what a pruning step has made.
    A parameter that is zero as a whole (the second factor of an adapter) has not been pruned, but waits to be trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._gone: dict[str, Tensor] = {}
        self._grown: set[str] = set()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer in find_sites(model, lm_head=True):
            gone = layer.parameter.detach() == 0
            name = names.get(id(layer.parameter))
            if name is not None and gone.any() and not gone.all():
                self._gone[name] = gone

    def copy(self) -> Zeros:
        """The same zeros, to grow apart from these."""
        twin = object.__new__(Zeros)
        twin.model, twin._gone, twin._grown = self.model, dict(self._gone), set(self._grown)
        return twin

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool, as the parameter's shape: True where a weight is pruned."""
        return dict(self._gone)

    def set(self, masks: dict[str, Tensor]) -> None:
        """Takes `masks`, as `masks()` gives them, for these parameters."""
        self._gone.update(masks)
        self._grown.update(masks)

    def fraction(self) -> float:
        """Zeros as a fraction of the parameters in which they became more."""
        masks = [self._gone[name] for name in self._grown if name in self._gone]
        return sum(int(gone.sum()) for gone in masks) / max(sum(gone.numel() for gone in masks), 1)

    def counts(self) -> dict[str, int]:
        """Zeros of each parameter with two dimensions or more."""
        return {
            name: parameter.numel() - int(parameter.detach().count_nonzero())
            for name, parameter in self.model.named_parameters()
            if parameter.ndim > 1
        }

    def grow(self, before: dict[str, int]) -> None:
        """Takes in what was pruned since `before`, from `counts`; what was pruned earlier is zero again."""
        self.apply()
        parameters = dict(self.model.named_parameters())
        for name, count in self.counts().items():
            gone = self._gone.get(name)
            if gone is not None and gone.shape != parameters[name].shape:
                gone = None  # rows or columns have been cut out: other weights
                del self._gone[name]
            if count > before.get(name, 0):
                self._grown.add(name)
            if gone is not None or name in self._grown:
                self._gone[name] = parameters[name].detach() == 0

    def apply(self) -> None:
        """Zeroes what is pruned."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, gone in self._gone.items():
                parameter = parameters.get(name)
                if parameter is not None and parameter.shape == gone.shape:
                    parameter.masked_fill_(gone.to(parameter.device), 0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """After each step of any torch optimizer inside, and at the end, what is pruned is zero."""

        def zero(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.apply()

        handle = register_optimizer_step_post_hook(zero)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()
            self.apply()


@contextmanager
def hold_zeros(model: nn.Module) -> Iterator[Zeros]:
    """The zeros of the model's linears stay zero inside, whatever loop trains it.

    After each step of any torch optimizer they are set again; a loop that changes weights without one finds them
    zero when the block ends.
    """
    zeros = Zeros(model)
    with zeros.held():
        yield zeros


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
