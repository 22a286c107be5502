"""Where a model keeps its linear weights. Found by structure, never by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["LinearLayer", "find_linears", "is_conv1d", "is_linear"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2), a linear layer with its weight as [in, out]."""
    # By name: importing transformers here would make every user of a plain torch model pay for it.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer `y = x W^T + b` of a model, whatever class holds it.

    `name` is its path in the model, `module` an `nn.Linear` or a transformers `Conv1D`. `tied` lists the
    other places, by path, that share this very weight: they are the same layer, and are not listed on their
    own.
    """

    name: str
    module: nn.Module
    tied: tuple[tuple[str, nn.Module], ...] = field(default=(), repr=False)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view without gradient: writing to it changes the model."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[union-attr, operator]
        return weight.t() if is_conv1d(self.module) else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None, a view without gradient."""
        bias = self.module.bias
        return None if bias is None else bias.detach()  # type: ignore[union-attr, operator]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def find_linears(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
) -> list[LinearLayer]:
    """The model's linear layers (`nn.Linear`, transformers' `Conv1D`), in model order.

    Only those with floating-point weights.

    Args:
        include, exclude: shell patterns (`fnmatch`) over layer names, one or several; a layer is listed if it
            matches some `include` (default: all) and no `exclude`.
        lm_head: also list the output head, i.e. what `get_output_embeddings()` returns, and every linear
            whose weight is an embedding's.

    A weight that several layers share is listed once, under its first name, the others in `tied`; it is
    listed if any of its names is included and none excluded. A linear that its owner never calls
    (`nn.MultiheadAttention.out_proj`) is no layer here.

    Raises:
        ValueError: a listed layer's weight is computed by a parametrization, so that writing to it is lost.
    """
    included = _patterns("include", "*" if include is None else include)
    excluded = _patterns("exclude", () if exclude is None else exclude)
    heads = set() if lm_head else _head_weights(model)
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            # a parametrized weight is a new tensor at each access, its module stands for it
            key = id(module) if parametrize.is_parametrized(module, "weight") else id(module.weight)
            places.setdefault(key, []).append((name, module))
    layers = []
    for key, ((name, module), *tied) in places.items():
        names = [name, *(other for other, _ in tied)]
        if key in heads or not _match(names, included) or _match(names, excluded):
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(
                f"model: {name}.weight must be a plain parameter, it is computed by a parametrization; call "
                "torch.nn.utils.parametrize.remove_parametrizations on it, or exclude the layer"
            )
        layers.append(LinearLayer(name, module, tuple(tied)))
    return layers


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _patterns(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: must be shell patterns over layer names, got {pattern!r}")
    return patterns


def is_linear(module: nn.Module) -> bool:
    # MultiheadAttention reads this one's weight itself: no hook sees its inputs, no other module can stand in
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return False
    return isinstance(module.weight, Tensor) and module.weight.is_floating_point() and module.weight.ndim == 2


def _head_weights(model: nn.Module) -> set[int]:
    weights = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            weights.add(id(module.weight))
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor):
            weights.add(id(weight))
    return weights
