"""Which linears make neurons and attention heads: found by what depends on what in one pass, never by name.

In that pass every linear's output is replaced by random numbers that start a graph of their own. What the input of
a linear then depends on, and in which channels, is read off gradients:

- neurons: channel j at a position depends on the producers' channel j at that position alone (a gate and an up
  projection, an intermediate layer, the two halves of a fused gate and up);
- heads: the channels of head h depend on few rows of the producers (a query's, and its group's key and value),
  separate or fused in whatever order.

A producer whose output goes anywhere else belongs to neither: its width is not free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch, call, no_cache, to_device
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.models.sites import WeightSite, find_sites

__all__ = ["HeadGroup", "NeuronGroup", "NotReachedError", "find_heads", "find_neurons", "run", "sample_batch"]

# Positions of a probe: enough that attention over several and attention to oneself differ.
_TOKENS = 8
# A linear that reads the residual stream depends on all that wrote to it; neurons and heads have at most 3 producers.
_MOST_PRODUCERS = 3


@dataclass(frozen=True)
class NeuronGroup:
    """Hidden neurons: `producers` make them, `consumer` alone reads them.

    `parts` says for each producer how many rows a neuron has in it: row j, j + width, ...
    """

    consumer: WeightSite
    producers: tuple[WeightSite, ...]
    parts: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.consumer.in_features

    def rows(self, index: int, keep: Tensor) -> Tensor:
        """The rows of producer `index` that the neurons `keep` have, in the producer's order."""
        return torch.cat([keep + part * self.width for part in range(self.parts[index])])


@dataclass(frozen=True)
class HeadGroup:
    """The heads of one attention: `producers` make queries, keys and values, `consumer` reads what heads give.

    Attributes:
        head_rows: for each producer and head, the rows that the head depends on, sorted.
        groups: heads that share a key and value, as tuples of head numbers, in order.
    """

    consumer: WeightSite
    producers: tuple[WeightSite, ...]
    head_rows: tuple[tuple[tuple[int, ...], ...], ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def heads(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def head_dim(self) -> int:
        return self.consumer.in_features // self.heads

    def rows(self, index: int, heads: Sequence[int]) -> Tensor:
        """The rows of producer `index` that any of `heads` needs, sorted."""
        return torch.tensor(sorted({row for head in heads for row in self.head_rows[index][head]}))

    def channels(self, heads: Sequence[int]) -> Tensor:
        """The consumer's input channels of `heads`."""
        dim = self.head_dim
        return torch.tensor([head * dim + channel for head in heads for channel in range(dim)])


def sample_batch(model: nn.Module, calibration: CalibrationData | None, whole: bool = False) -> Batch:
    """Something to run the model on: the start of the first batch (or the `whole` of it), or token ids made up.

    Raises:
        ValueError: no calibration, and a model whose inputs are not known without.
    """
    generator = torch.Generator().manual_seed(0)
    if calibration is not None:
        return calibration.batches[0] if whole else _shorten(calibration.batches[0])
    if hasattr(model, "dummy_inputs"):
        return dict(model.dummy_inputs)  # type: ignore[arg-type]
    first = next((it for it in model.modules() if not list(it.children())), model)
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, (2, _TOKENS), generator=generator)
    if isinstance(first, nn.Linear):
        return torch.randn(2, first.in_features, generator=generator, dtype=first.weight.dtype)
    raise ValueError(
        f"calibration: must be given to see what depends on what in a {type(model).__name__}, whose inputs are not "
        "known; pass a list of batches"
    )


def _shorten(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        is_ids = batch.ndim == 2 and not batch.is_floating_point()
        return batch[:1, :_TOKENS] if is_ids else batch
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return batch
        alike = {key: isinstance(value, Tensor) and value.shape == ids.shape for key, value in batch.items()}
        if all(alike.values()):
            return {key: value[:1, :_TOKENS] for key, value in batch.items()}
    return batch


def run(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for `batch`."""
    return call(model, to_device(batch, device_of(model)))


class _Probe:
    """One pass with random numbers behind every linear: inputs by layer name, and the graph's starts by name."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.layers = {layer.name: layer for layer in find_sites(model, lm_head=True)}
        self.inputs: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.repeated: set[str] = set()
        self.generator = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(no_cache(model))
            stack.enter_context(torch.enable_grad())
            for name, layer in self.layers.items():
                stack.enter_context(layer.on_outputs(self._cutting(name)))
                if layer.tied:
                    self.repeated.add(name)
            self.outputs = [it for it in _tensors(run(model, batch)) if it.grad_fn is not None]
        self.dependencies = {name: self.gradients(self.inputs[name]) for name in self.inputs}
        self.readers: dict[str, list[str | None]] = {name: [] for name in self.leaves}
        for reader, found in (*self.dependencies.items(), (None, self.gradients(*self.outputs))):
            for leaf in found:
                self.readers[leaf].append(reader)

    def _cutting(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def cut(inputs: Tensor, output: Tensor) -> Tensor:
            if name in self.inputs:
                self.repeated.add(name)
                return output
            self.inputs[name] = inputs
            leaf = torch.randn(output.shape, generator=self.generator).to(output).requires_grad_()
            self.leaves[name] = leaf
            return leaf

        return cut

    def gradients(self, *targets: Tensor) -> dict[str, Tensor]:
        """Leaf name -> gradient of a random combination of `targets`; only leaves that it depends on."""
        heads = [
            (it * torch.randn(it.shape, generator=self.generator).to(it)).sum()
            for it in targets
            if it.grad_fn is not None and it.is_floating_point()
        ]
        if not heads:
            return {}
        found = torch.autograd.grad(heads, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        return {name: it for name, it in zip(self.leaves, found, strict=True) if it is not None}

    def links(self) -> Iterator[tuple[WeightSite, tuple[WeightSite, ...]]]:
        """Each linear with the linears before it that feed it alone, if all that feed it do so."""
        for name, found in self.dependencies.items():
            producers = tuple(sorted(found, key=list(self.layers).index))
            if not 1 <= len(producers) <= _MOST_PRODUCERS or self.repeated.intersection((name, *producers)):
                continue
            if all(self.readers[producer] == [name] for producer in producers):
                yield self.layers[name], tuple(self.layers[producer] for producer in producers)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class NotReachedError(ValueError):
    """A linear did not run, so that what depends on it is not known."""


@torch.enable_grad()
def find_neurons(model: nn.Module, batch: Batch, needed: Collection[str] = ()) -> list[NeuronGroup]:
    """The model's groups of hidden neurons, in model order.

    Raises:
        NotReachedError: a linear among `needed` did not run on `batch`, such as an expert that got no token.
    """
    probe = _probe(model, batch)
    unseen = [name for name in needed if name in probe.layers and name not in probe.inputs]
    if unseen:
        raise NotReachedError(
            f"calibration: must reach every layer, {len(unseen)} did not run on its first batch, such as {unseen[0]}; "
            "pass a larger first batch, or exclude them"
        )
    groups = []
    for consumer, producers in probe.links():
        parts = _elementwise(probe, consumer, producers)
        if parts is not None:
            groups.append(NeuronGroup(consumer, producers, parts))
    if not groups or _runs_narrowed(model, batch, groups):
        return groups
    return [group for group in groups if _runs_narrowed(model, batch, [group])]


def _probe(model: nn.Module, batch: Batch) -> _Probe:
    try:
        return _Probe(model, batch)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"model: {type(model).__name__} must run on a small batch, it fails with {type(error).__name__}: {error}; "
            "pass calibration batches that it takes"
        ) from error


def _elementwise(
    probe: _Probe, consumer: WeightSite, producers: Sequence[WeightSite]
) -> tuple[int, ...] | None:
    """How many rows a neuron has in each producer, None unless channels stay apart from each other."""
    inputs = probe.inputs[consumer.name]
    width = consumer.in_features
    flat = inputs.reshape(-1, width)
    chosen = torch.randperm(width, generator=probe.generator)[: (width + 1) // 2]
    position = len(flat) - 1
    found = probe.gradients(flat[position, chosen.to(flat.device)])
    parts = []
    for producer in producers:
        gradient = found.get(producer.name)
        out = producer.out_features
        if gradient is None or out % width or gradient.numel() // out != len(flat):
            return None
        nonzero = gradient.reshape(len(flat), out // width, width).ne(0).cpu()
        reached = nonzero[position].any(dim=0)
        others = torch.ones(width, dtype=torch.bool)
        others[chosen] = False
        elsewhere = nonzero.clone()
        elsewhere[position] = False
        if elsewhere.any() or reached[others].any() or not reached.any():
            return None
        parts.append(out // width)
    return tuple(parts)


def _runs_narrowed(model: nn.Module, batch: Batch, groups: Sequence[NeuronGroup]) -> bool:
    """Whether the model runs with the last neuron of each group cut: nothing else of that width is in between."""
    try:
        with torch.no_grad(), evaluation_mode(model), no_cache(model), _narrowed(groups):
            run(model, batch)
    except RuntimeError:
        return False
    return True


@contextmanager
def _narrowed(groups: Sequence[NeuronGroup]) -> Iterator[None]:
    def cut(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda inputs, output: output[..., rows.to(output.device)]

    def pad(width: int) -> Callable[[Tensor], Tensor]:
        def change(inputs: Tensor) -> Tensor:
            if inputs.shape[-1] != width - 1:
                raise RuntimeError("another width")
            return nn.functional.pad(inputs, (0, 1))

        return change

    with ExitStack() as stack:
        for group in groups:
            keep = torch.arange(group.width - 1)
            for index, producer in enumerate(group.producers):
                stack.enter_context(producer.on_outputs(cut(group.rows(index, keep))))
            stack.enter_context(group.consumer.changing_inputs(pad(group.width)))
        yield


@torch.enable_grad()
def find_heads(model: nn.Module, batch: Batch, heads: int) -> list[HeadGroup]:
    """The model's attentions of `heads` query heads each, in model order."""
    probe = _probe(model, batch)
    groups = []
    for consumer, producers in probe.links():
        if consumer.in_features % heads or _elementwise(probe, consumer, producers) is not None:
            continue
        group = _attention(probe, consumer, producers, heads)
        if group is not None:
            groups.append(group)
    return groups


def _attention(
    probe: _Probe, consumer: WeightSite, producers: tuple[WeightSite, ...], heads: int
) -> HeadGroup | None:
    inputs = probe.inputs[consumer.name]
    rows: list[list[tuple[int, ...]]] = [[] for _ in producers]
    for chunk in inputs.reshape(-1, consumer.in_features).chunk(heads, dim=1):
        found = probe.gradients(chunk)
        for producer, of_heads in zip(producers, rows, strict=True):
            gradient = found.get(producer.name)
            if gradient is None:
                return None
            nonzero = gradient.reshape(-1, producer.out_features).ne(0).any(dim=0)
            of_heads.append(tuple(nonzero.nonzero().flatten().tolist()))
    for producer, of_heads in zip(producers, rows, strict=True):
        every = {row for head in of_heads for row in head}
        if len({len(head) for head in of_heads}) > 1 or len(every) != producer.out_features:
            return None
    groups = _sharing(rows, heads)
    own = [_own_rows(rows, head) for head in range(heads)]
    if groups is None or not all(own):
        return None
    return HeadGroup(consumer, producers, tuple(tuple(of_heads) for of_heads in rows), groups)


def _own_rows(rows: Sequence[Sequence[tuple[int, ...]]], head: int) -> int:
    """How many rows no other head needs."""
    count = 0
    for of_heads in rows:
        others = {row for other, found in enumerate(of_heads) if other != head for row in found}
        count += len(set(of_heads[head]) - others)
    return count


def _sharing(rows: Sequence[Sequence[tuple[int, ...]]], heads: int) -> tuple[tuple[int, ...], ...] | None:
    """Heads that share rows, as groups of equal size; None if sharing is not so."""
    groups: list[list[int]] = []
    for head in range(heads):
        shares = [
            group
            for group in groups
            if any(set(of_heads[head]) & set(of_heads[group[0]]) for of_heads in rows)
        ]
        if len(shares) > 1:
            return None
        if shares:
            shares[0].append(head)
        else:
            groups.append([head])
    if len({len(group) for group in groups}) > 1:
        return None
    return tuple(tuple(group) for group in groups)
