"""Optimizers by name, and what they may train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["OPTIMIZERS", "Train", "make_optimizer", "trained_parameters"]

Train = Literal["linears", "all"]

# fused: a foreach step makes temporaries as large as the model, whose page faults took 40 times as long on a CPU
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(
        parameters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    ),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, fused=True),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr),
}


def make_optimizer(
    optimizer: str | Callable[[Sequence[nn.Parameter]], Optimizer],
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
) -> Optimizer:
    """An optimizer over `parameters`; a callable brings its own learning rate.

    Raises:
        TypeError: the callable did not return an optimizer.
    """
    if isinstance(optimizer, str):
        return OPTIMIZERS[optimizer](parameters, learning_rate)
    made = optimizer(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimizer: the callable must return a torch.optim.Optimizer, got {type(made).__name__}"
        )
    return made


def trained_parameters(model: nn.Module, train: Train) -> dict[str, nn.Parameter]:
    """name -> parameter. "linears": all but embeddings and the output head, which pruning leaves dense, too.

    Raises:
        ValueError: a model without a parameter to train.
    """
    left_out = set() if train == "all" else _embeddings(model)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in left_out and parameter.is_floating_point()
    }
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no parameter to train under train={train!r}; pass train='all'"
        )
    return found


def _embeddings(model: nn.Module) -> set[int]:
    modules: list[Any] = [it for it in model.modules() if isinstance(it, (nn.Embedding, nn.EmbeddingBag))]
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        id(parameter)
        for module in (*modules, head)
        if module is not None
        for parameter in module.parameters()
    }
