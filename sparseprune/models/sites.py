"""Where a model keeps its weights. Found by structure, never by name; a new kind is a class here and its place in `KINDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseprune.models.modules import put_in_place, require_module
from sparseprune.options import Layers

__all__ = [
    "KINDS",
    "Conv1DSite",
    "EmbeddingSite",
    "ExpertSite",
    "LinearSite",
    "WeightSite",
    "dense_again",
    "find_sites",
    "is_linear",
    "linear_shape",
    "matches",
    "matrix_shape",
    "site_of",
]


@dataclass(frozen=True)
class WeightSite(ABC):
    """A weight `W` [out, in] somewhere in a model, whatever class holds it and however it is stored.

    `name` is its path in the model, `module` what holds it. `tied` lists the other places, by path, that share this
    very weight: they are the same site, and are not listed on their own.
    """

    name: str
    module: nn.Module
    tied: tuple[tuple[str, nn.Module], ...] = field(default=(), repr=False)

    @classmethod
    @abstractmethod
    def holds(cls, module: nn.Module) -> bool:
        """Whether `module` keeps a weight as this kind does."""

    @classmethod
    def within(cls, name: str, module: nn.Module) -> Iterator[WeightSite]:
        """The sites that a module of this kind has, under `name`."""
        yield cls(name, module)

    @property
    def names(self) -> tuple[str, ...]:
        """All its paths, the first one first."""
        return (self.name, *(name for name, _ in self.tied))

    @property
    def parameter(self) -> nn.Parameter:
        """What an optimizer trains and a checkpoint holds."""
        return getattr(self.module, self.parameter_name)  # type: ignore[no-any-return]

    @property
    def parameter_name(self) -> str:
        return "weight"

    @property
    def slot(self) -> str:
        """Tells the weights of one module from each other."""
        return self.parameter_name

    def matrix(self, stored: Tensor) -> Tensor:
        """The site's [out, in] of a tensor (a gradient) that is as the parameter is, a view."""
        return stored

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] (a mask) as the parameter has it, a view."""
        return matrix

    @property
    def weight(self) -> Tensor:
        """[out, in], a view without gradient: writing to it changes the model."""
        return self.matrix(self.parameter.detach())

    def count_zeros(self) -> int:
        """How many of its weights are zero."""
        return self.weight.numel() - int(self.weight.count_nonzero())

    @property
    def bias(self) -> Tensor | None:
        """[out] or None, a view without gradient."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def places(self) -> tuple[nn.Module, ...]:
        """The modules that hold the weight, each once: one object may stand in two places."""
        return tuple(dict.fromkeys((self.module, *(module for _, module in self.tied))))

    @contextmanager
    def on_inputs(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside, `see` gets what the weight multiplies, [..., in], at every call in every place.

        Raises:
            ValueError: a weight that multiplies nothing.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        with ExitStack() as stack:
            for module in self.places:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def changing_inputs(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, the weight multiplies what `change` makes of its inputs [..., in]."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (change(args[0]), *args[1:])

        with ExitStack() as stack:
            for module in self.places:
                stack.callback(module.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def on_outputs(self, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, `see(inputs, outputs)` is called behind every product; what it gives takes the outputs' place."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return see(args[0], output)

        with ExitStack() as stack:
            for module in self.places:
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def set(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Gives the module a weight [out, in] of perhaps another size, as a new parameter; `bias` [out]: None keeps it.

        The sizes that the module states of itself follow.
        """
        old = self.parameter
        stored = self.stored(weight).contiguous()
        if stored.data_ptr() == old.data_ptr():
            stored = stored.clone()
        setattr(self.module, self.parameter_name, nn.Parameter(stored, old.requires_grad))
        if bias is not None:
            was: Any = self.module.bias
            self.module.bias = nn.Parameter(bias, was.requires_grad)
        for attribute, size in zip(self.size_names, weight.shape, strict=True):
            setattr(self.module, attribute, size)

    @property
    def size_names(self) -> tuple[str, str]:
        """The module's attributes that state `out` and `in`."""
        return "out_features", "in_features"

    @property
    def stays(self) -> str | None:
        """Why no other module can take the place of the site's, such as a `SparseLinear`; None where one can."""
        if not self.name:
            return "the model itself, which nothing holds; put it into an nn.Sequential"
        sharing = [name for name, module in self.tied if module is not self.module]
        return f"weight shared with {sharing[0]}" if sharing else None

    def replace(self, model: nn.Module, new: nn.Module) -> None:
        """Puts `new` wherever `model` has the site's module; the hooks on it are on `new` from then on.

        Raises:
            ValueError: the site `stays`.
        """
        if self.stays is not None:
            raise ValueError(f"{self.name}: no other module can take its place: {self.stays}; leave it dense")
        put_in_place(model, self.module, new)


class LinearSite(WeightSite):
    """`nn.Linear`."""

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        # MultiheadAttention reads this one's weight itself: no hook sees its inputs, no other module can stand in
        reads_itself = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return isinstance(module, nn.Linear) and not reads_itself and _is_matrix(module.weight)


class Conv1DSite(WeightSite):
    """transformers' `Conv1D` (GPT-2): a linear with its weight as [in, out]."""

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        # By name: importing transformers here would make every user of a plain torch model pay for it.
        bases = type(module).__mro__
        named = any(it.__name__ == "Conv1D" and it.__module__.startswith("transformers.") for it in bases)
        return named and _is_matrix(module.weight)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    @property
    def size_names(self) -> tuple[str, str]:
        return "nf", "nx"


class EmbeddingSite(WeightSite):
    """`nn.Embedding`: a row for each token. It is looked up, so nothing is multiplied."""

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and _is_matrix(module.weight)

    @property
    def size_names(self) -> tuple[str, str]:
        return "num_embeddings", "embedding_dim"

    @contextmanager
    def on_inputs(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        raise ValueError(
            f"{self.name}: an embedding has no inputs to take statistics of; use a method that looks at weights only"
        )
        yield


@dataclass(frozen=True)
class ExpertSite(WeightSite):
    """One expert's slice of a 3-D parameter [experts, out, in], as transformers keeps a mixture's experts.

    `transposed`: the parameter is [experts, in, out] (GPT-OSS).
    """

    parameter_of: str = ""
    expert: int = 0
    transposed: bool = False

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return bool(_expert_parameters(module))

    @classmethod
    def within(cls, name: str, module: nn.Module) -> Iterator[WeightSite]:
        transposed = bool(getattr(module, "is_transposed", False))
        for parameter in _expert_parameters(module):
            for expert in range(getattr(module, parameter).shape[0]):
                yield cls(f"{name}.{parameter}[{expert}]", module, (), parameter, expert, transposed)

    @property
    def parameter_name(self) -> str:
        return self.parameter_of

    @property
    def slot(self) -> str:
        return f"{self.parameter_of}[{self.expert}]"

    def matrix(self, stored: Tensor) -> Tensor:
        return self.stored(stored[self.expert])

    def stored(self, matrix: Tensor) -> Tensor:
        """As the expert's slice of the parameter has it."""
        return matrix.t() if self.transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, f"{self.parameter_of}_bias", None)
        return None if bias is None else bias.detach()[self.expert]

    @contextmanager
    def on_inputs(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """What is routed to the expert, for the first of its matrices; the second reads what the module keeps to itself."""
        if self.parameter_of != _expert_parameters(self.module)[0]:
            raise ValueError(
                f"{self.name}: what it multiplies never leaves the module; use a method that looks at weights only"
            )

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            rows, routed = given[0], given[1]
            chosen = (routed == self.expert).flatten(1).any(-1)
            see(rows.reshape(-1, rows.shape[-1])[chosen])

        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def set(self, weight: Tensor, bias: Tensor | None = None) -> None:
        raise ValueError(f"{self.name}: one expert cannot change its size, all share a parameter")

    @property
    def stays(self) -> str | None:
        return "a slice of a parameter"


KINDS: tuple[type[WeightSite], ...] = (LinearSite, Conv1DSite)
"""The kinds that are pruned and swapped unless others are asked for."""


def find_sites(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    kinds: Sequence[type[WeightSite]] | None = None,
) -> list[WeightSite]:
    """The sites of the model's floating-point weights, in model order.

    Args:
        include, exclude: shell patterns (`fnmatch`) over names, one or several; a site is listed if it matches some
            `include` (default: all) and no `exclude`.
        lm_head: also list the output head, i.e. what `get_output_embeddings()` returns, and every linear
            whose weight is an embedding's.
        kinds: which to look for, by default `KINDS`; `EmbeddingSite` and `ExpertSite` only where they are named.

    A weight that several modules share is listed once, under its first name, the others in `tied`; it is
    listed if any of its names is included and none excluded. A linear that its owner never calls
    (`nn.MultiheadAttention.out_proj`) is not a site.

    Raises:
        ValueError: a listed site's weight is computed by a parametrization, so that writing to it is lost; a pattern
            that matches no linear, dense or sparse, and so would be ignored.
    """
    require_module(model=model)
    layers = Layers(include, exclude, lm_head)
    included = ("*",) if include is None else layers.patterns("include")
    excluded = layers.patterns("exclude")
    heads = set() if lm_head else _head_weights(model)
    places: dict[Any, list[WeightSite]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = next((it for it in (KINDS if kinds is None else kinds) if it.holds(module)), None)
        for site in () if kind is None else kind.within(name, module):
            # a parametrized weight is a new tensor at each access, its module stands for it
            parametrized = parametrize.is_parametrized(module, site.parameter_name)
            key = id(module) if parametrized else id(site.parameter)
            places.setdefault((key, getattr(site, "expert", 0)), []).append(site)
    _check_patterns(model, [site.name for sites in places.values() for site in sites], layers)
    sites = []
    for (key, _), (first, *others) in places.items():
        names = [site.name for site in (first, *others)]
        if (
            (key in heads and not isinstance(first, EmbeddingSite))
            or not matches(names, included)
            or matches(names, excluded)
        ):
            continue
        if parametrize.is_parametrized(first.module, first.parameter_name):
            raise ValueError(
                f"model: {first.name}.{first.parameter_name} must be a plain parameter, it is computed by a "
                "parametrization; call torch.nn.utils.parametrize.remove_parametrizations on it, or exclude the layer"
            )
        sites.append(replace(first, tied=tuple((site.name, site.module) for site in others)))
    return sites


def dense_again(model: nn.Module) -> str:
    """What to do where `model` has none of the sites that were asked for."""
    held = [
        it for it in model.modules() if linear_shape(it) is not None and hasattr(it, "packed")
    ]  # a SparseLinear, of which this file knows nothing
    see = "see sparseprune.models.sites.find_sites(model)"
    if not held:
        return see
    return f"{len(held)} are sparse or quantized already, sparseprune.recovery.to_dense(model) undoes that; {see}"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear of one of the kinds, dense and with a floating-point weight."""
    return any(kind.holds(module) for kind in KINDS)


def site_of(module: nn.Module, name: str = "") -> WeightSite:
    """The site of a linear that stands for itself; `name`: what errors call it.

    Raises:
        TypeError: `module` is not a linear.
    """
    for kind in KINDS:
        if kind.holds(module):
            return kind(name, module)
    raise TypeError(f"linear: must be an nn.Linear or a transformers Conv1D, got {type(module).__name__}")


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a linear, dense or sparse, by what it states of itself; None for any other module."""
    for kind in KINDS:
        if module is not None and kind.holds(module):
            return kind("", module).out_features, kind("", module).in_features
    return _stated(module, "out_features", "in_features")


def matrix_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(rows, cols) of the weight of a linear or an embedding, dense or not, by what it states; None for other modules."""
    return _stated(module, "num_embeddings", "embedding_dim") or linear_shape(module)


def _stated(module: nn.Module | None, *sizes: str) -> tuple[int, int] | None:
    rows, cols = (getattr(module, size, None) for size in sizes)
    return (rows, cols) if type(rows) is int and type(cols) is int else None


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether some name matches some shell pattern."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(model: nn.Module, names: Sequence[str], layers: Layers) -> None:
    """Every pattern must match a linear of the model, be it sparse already or left out for another reason."""
    sparse = [
        name for name, it in model.named_modules(remove_duplicate=False) if linear_shape(it) is not None
    ]
    layers.check(
        list(dict.fromkeys([*names, *sparse])),
        f"linear layer of this {type(model).__name__}",
        see="sparseprune.models.sites.find_sites(model)",
    )


def _is_matrix(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2


def _expert_parameters(module: nn.Module) -> list[str]:
    """The names of a module's 3-D parameters of one first dimension, in the order in which they multiply."""
    found = [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]
    count = getattr(module, "num_experts", None)
    return found if count and all(getattr(module, name).shape[0] == count for name in found) else []


def _head_weights(model: nn.Module) -> set[int]:
    weights = {id(it.weight) for it in model.modules() if isinstance(it, (nn.Embedding, nn.EmbeddingBag))}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        weight = head._parameters.get("weight") if isinstance(head, nn.Module) else None
        if weight is not None:
            weights.add(id(weight))
    return weights
