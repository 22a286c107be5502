"""Cutting rows, columns and blocks out of a model, and making its config say so, so that it reloads.

What a config can express is found out, not known: a model of no memory is built from the changed config, and its
shapes are compared to those of the cut model. Attributes that follow from sizes (layer numbers for the cache, groups
per key) are copied from there. Sizes that no config expresses (fewer heads of the same width in GPT-2) go into the
config as `sparseprune_sizes`, by which `sparseprune.load` cuts the model that it builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.io.sizes import SIZES, apply_sizes
from sparseprune.models.modules import parent_of
from sparseprune.models.sites import is_linear, site_of
from sparseprune.models.snapshot import Snapshot

__all__ = [
    "Edits",
    "Plan",
    "bare",
    "commit",
    "configured",
    "counts",
    "plain_attributes",
    "plan",
    "set_attributes",
    "undo_on_error",
]

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Edits:
    """What goes: the rows or columns of linears that stay, by layer name, and the blocks that stay.

    `weights` holds new weights [rows, columns that stay], float32, where the cut is compensated.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        for name in {**self.rows, **self.columns, **self.weights}:
            module = model.get_submodule(name)
            _cut(module, self.rows.get(name), self.columns.get(name), self.weights.get(name))
        for name, kept in self.blocks.items():
            parent, attribute = parent_of(model, name)
            container: Any = getattr(parent, attribute)
            items = [container[index] for index in kept]
            setattr(
                parent,
                attribute,
                nn.ModuleList(items) if isinstance(container, nn.ModuleList) else nn.Sequential(*items),
            )

    def renamed(self, name: str) -> str | None:
        """What a module is called after the cut, None if it goes."""
        for stack, kept in self.blocks.items():
            if name.startswith(f"{stack}."):
                number, dot, rest = name.removeprefix(f"{stack}.").partition(".")
                return f"{stack}.{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None
        return name


@dataclass
class Plan:
    """A cut, and how the model's config follows: found on models without memory, before anything changes.

    `attributes`: (module, attribute, value) to set after the cut. `config`: what to set in the config. `reloads` says
    with what a saved model loads.
    """

    edits: Edits
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    reloads: str = "sparseprune.load(folder, model=...)"


def _cut(module: nn.Module, rows: Tensor | None, columns: Tensor | None, weight: Tensor | None) -> None:
    """Makes a linear keep only `rows` and `columns` of its weight [out, in]; `weight`: its new values."""
    site = site_of(module)
    new = site.weight
    if rows is not None:
        new = new[rows.to(new.device)]
    if columns is not None:
        new = new[:, columns.to(new.device)]
    if weight is not None and not new.is_meta:
        new = weight.to(new)
    bias = site.bias
    site.set(new, None if rows is None or bias is None else bias[rows.to(bias.device)])


def counts(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model, and their bytes."""
    parameters = list(model.parameters())
    return sum(it.numel() for it in parameters), sum(it.numel() * it.element_size() for it in parameters)


@contextmanager
def undo_on_error(model: nn.Module) -> Iterator[None]:
    """An error inside leaves the model's modules, parameters, attributes and config as they were."""
    before = Snapshot(model, values=False)  # a cut makes new parameters, and writes to none
    try:
        yield
    except BaseException:
        before.restore()
        raise


def commit(model: nn.Module, plan: Plan) -> None:
    """Carries the plan out on `model`, in place. Wrap it in `undo_on_error`."""
    plan.edits.apply(model)
    set_attributes(model, plan)
    _set_config(model, plan)


def set_attributes(model: nn.Module, plan: Plan, prefix: str = "") -> None:
    """Sets the plan's attributes on modules under `prefix`."""
    for name, attribute, value in plan.attributes:
        if not prefix or name == prefix or name.startswith(f"{prefix}."):
            setattr(model.get_submodule(name), attribute, value)


@contextmanager
def configured(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The config is as after the plan inside, and as it was afterwards."""
    config: Any = getattr(model, "config", None)
    saved = dict(vars(config)) if plan.config else {}
    try:
        _set_config(model, plan)
        yield
    finally:
        if plan.config:
            config.__dict__.clear()
            config.__dict__.update(saved)


def _set_config(model: nn.Module, plan: Plan) -> None:
    config: Any = getattr(model, "config", None)
    for key, value in plan.config.items():
        if value is None and key == SIZES:
            vars(config).pop(SIZES, None)
        else:
            setattr(config, key, value)


def plan(
    model: nn.Module,
    edits: Edits,
    changes: Iterable[Mapping[str, Any]] = (),
    fallback: Callable[[nn.Module], list[tuple[str, str, Any]]] | None = None,
) -> Plan:
    """How `model` becomes what `edits` make of it.

    Args:
        changes: config changes to try in turn; the first under which a model built from the config has the cut
            model's shapes is taken.
        fallback: if none is, what to set on modules, given the model built from the old config; the sizes then go
            into the config as `sparseprune_sizes`. Without it that is an error.

    Raises:
        ValueError: the config cannot express the cut, and there is no `fallback`.
    """
    config: Any = getattr(model, "config", None)
    if not (hasattr(model, "_from_config") and hasattr(config, "to_dict")):
        return Plan(edits)
    before = _build(type(model), config)
    if before is None or _shapes(before) != _shapes(model):
        raise ValueError(
            f"model: must have the shapes that its config says, so that it reloads after the cut; this "
            f"{type(model).__name__} does not, {_difference(before, model)}"
        )
    edits.apply(before)
    wanted = _shapes(before)
    earlier = _carried(getattr(config, SIZES, None), edits)
    for change in changes:
        for sizes in (None, earlier) if earlier else (None,):
            after = bare(type(model), config, change)
            if after is not None and sizes is not None:
                apply_sizes(after, sizes)
            if after is not None and _shapes(after) == wanted:
                reloads = "from_pretrained" if sizes is None else "sparseprune.load"
                return Plan(edits, plain_attributes(before, after), {**change, SIZES: sizes}, reloads)
    if fallback is None:
        raise ValueError(
            f"model: the config of {type(model).__name__} cannot say what would be left; remove others"
        )
    attributes = fallback(before)
    for name, attribute, value in attributes:
        setattr(before.get_submodule(name), attribute, value)
    stated = bare(type(model), config)
    assert stated is not None  # `before` was built like it
    return Plan(edits, attributes, {SIZES: _sizes(stated, before)}, "sparseprune.load")


def _carried(sizes: Any, edits: Edits) -> dict[str, Any] | None:
    """Sizes from an earlier cut that this one leaves alone, under the names after it."""
    if not sizes:
        return None
    carried: dict[str, Any] = {"linears": {}, "attributes": {}}
    for kind, entries in carried.items():
        for name, value in sizes[kind].items():
            new = edits.renamed(name)
            if new is not None and name not in edits.rows and name not in edits.columns:
                entries[new] = value
    return carried


def bare(model_class: Any, config: Any, change: Mapping[str, Any] | None = None) -> nn.Module | None:
    """A model without memory as the config says, sizes beyond it left out; None if the config is not legal."""
    names = getattr(config, "attribute_map", {})
    changed = {names.get(key, key): value for key, value in (change or {}).items()}
    try:
        # through a dict, as a reload does, so that what a reload would refuse is refused here
        config = type(config).from_dict({**config.to_dict(), **changed, SIZES: None})
        with torch.device("meta"):
            built: nn.Module = model_class(config)
    except Exception:  # whatever a model's own code says to sizes that it does not take
        return None
    return built


def _build(model_class: Any, config: Any) -> nn.Module | None:
    built = bare(model_class, config)
    if built is not None and getattr(config, SIZES, None):
        apply_sizes(built, getattr(config, SIZES))
    return built


def _shapes(model: nn.Module) -> Shapes:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _difference(built: nn.Module | None, model: nn.Module) -> str:
    if built is None:
        return "its config builds no model"
    expected, found = _shapes(built), _shapes(model)
    name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
    return f"{name} is {found.get(name)} and should be {expected.get(name)}"


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "training"
        and isinstance(value, (int, float, str, tuple, type(None)))
    }


def plain_attributes(before: nn.Module, after: nn.Module) -> list[tuple[str, str, Any]]:
    """Plain attributes that differ between modules of the same names."""
    changes = []
    others = dict(after.named_modules(remove_duplicate=False))
    for name, module in before.named_modules(remove_duplicate=False):
        old = _plain(module)
        for attribute, value in _plain(others[name]).items() if name in others else ():
            if attribute not in old or old[attribute] != value:
                changes.append((name, attribute, value))
    return changes


def _sizes(stated: nn.Module, cut: nn.Module) -> dict[str, Any]:
    """Where `cut` differs from `stated`: {"linears": {name: [out, in]}, "attributes": {module: {attribute: value}}}."""
    others = dict(stated.named_modules())
    linears, attributes = {}, {}
    for name, module in cut.named_modules():
        other = others[name]
        if is_linear(module) and site_of(module).weight.shape != site_of(other).weight.shape:
            linears[name] = list(site_of(module).weight.shape)
            continue
        old = _plain(other)
        changed = {
            attribute: value
            for attribute, value in _plain(module).items()
            if type(value) is int and attribute in old and old[attribute] != value
        }
        if changed:
            attributes[name] = changed
    return {"linears": linears, "attributes": attributes}
