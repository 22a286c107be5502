"""Statistics of the inputs of a model's linear layers, taken by hooks while it reads a sample of text."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparseprune import processes
from sparseprune.models.batches import (
    Batch,
    attention_mask,
    call,
    check_batches,
    no_cache,
    to_device,
    trunk,
)
from sparseprune.models.losses import Loss
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track

__all__ = ["Gram", "InputSquares", "Statistic", "collect"]


class Statistic(ABC):
    """A running summary of what passes a layer: of its inputs, or of what a subclass collects instead.

    Every tensor that it keeps is a sum over tokens, so that processes can add theirs up (`sparseprune.processes`).
    `in_features` and `device` say what to make room for. How it is collected, it says itself:

    Attributes:
        whole_model: only passes of the whole model give it: a block by itself does not.
        comparable: scores by it mean the same in every layer, so that they can be ranked across layers.
        light: a smaller statistic that scores by this one can do with; None where there is none. A statistic that has
            one is too large to be held for all layers of a model at once where that can be helped.
    """

    whole_model: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    light: ClassVar[type[Statistic] | None] = None

    @classmethod
    def of(cls, layer: WeightSite, device: torch.device | None = None) -> Statistic:
        """An empty one for `layer`, by default on the device of its weight. Layers that read the same tensor share one."""
        return cls(layer.in_features, layer.weight.device if device is None else device)

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        layers: Sequence[WeightSite],
        batches: Iterable[Batch],
        *,
        loss: Loss | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """layer name -> statistic, over `batches`, by the passes that it takes; see `collect`.

        Raises:
            ValueError: a loss, where the statistic is not of one.
        """
        if loss is not None:
            raise ValueError(f"loss: {cls.__name__} has none to differentiate, got one; leave it out")
        return collect(model, layers, batches, statistic=cls, progress=progress)

    def error(self, weight: Tensor, pruned: Tensor) -> float | None:
        """How far the layer's outputs move: ||X (W - W')^T|| / ||X W^T|| (Frobenius norms) over the inputs X that it
        has seen; None where it does not know them well enough.
        """
        return None

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.device = device
        self.tokens = 0

    @abstractmethod
    def update(self, inputs: Tensor) -> None:
        """Adds `inputs` [tokens, in_features], in the model's dtype, and counts them in `tokens`.

        Raises:
            FloatingPointError: the inputs hold NaN or Inf.
        """


class InputSquares(Statistic):
    """Sum of squares of each input channel: `sum_squares` float64 [in_features]."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.sum_squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor) -> None:
        # float32 within a batch and float64 across them: twice as fast as float64 throughout, 1e-6 apart
        squares = inputs.float().square().sum(dim=0).double()
        if not squares.isfinite().all():
            squares = inputs.double().square().sum(dim=0)  # finite inputs above 1e19 overflow float32 squares
            if not squares.isfinite().all():
                raise FloatingPointError
        self.sum_squares += squares
        self.tokens += inputs.shape[0]

    @property
    def products(self) -> Tensor:
        """X^T X as far as it is known: here its diagonal, float64 [in_features]."""
        return self.sum_squares

    def norm(self) -> Tensor:
        """||X_j||_2 over all tokens, float32 [in_features]."""
        return self.sum_squares.sqrt().float()


class Gram(InputSquares):
    """G = X^T X: `matrix` float32 [in_features, in_features], with its diagonal as `sum_squares`.

    Sums are float32 within a batch and across them.
    """

    light = InputSquares

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        super().update(inputs)
        inputs = inputs.float()
        self.matrix.addmm_(inputs.t(), inputs)

    @property
    def products(self) -> Tensor:
        """All of X^T X, float32 [in_features, in_features]."""
        return self.matrix

    def error(self, weight: Tensor, pruned: Tensor) -> float:
        matrix = self.matrix.to(weight.dtype)

        def energy(of: Tensor) -> float:
            return max(float(torch.sum((of @ matrix) * of)), 0.0)

        whole = energy(weight)  # 0 where the layer gives nothing
        return (energy(weight - pruned) / whole) ** 0.5 if whole > 0 else 0.0


def collect(
    model: nn.Module,
    layers: Sequence[WeightSite],
    batches: Iterable[Batch],
    *,
    statistic: type[Statistic] = InputSquares,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs the model over `batches`, in evaluation mode without gradients, and sums up each layer's inputs.

    A batch is a tensor (the model's first argument), a mapping (its keyword arguments) or a tuple (its
    positional ones); tensors move to the model's device. Where a mapping has an `attention_mask` [batch,
    tokens], padding is left out. A layer that runs several times in a pass, or in several places (`tied`),
    sums over all. Where `torch.distributed` runs several processes, each reads its share of the batches, and
    all get the sums over all of them.

    Returns:
        layer name -> statistic. Memory: one statistic for each layer, plus one pass of the model.

    Raises:
        ValueError: a sequence longer than the model's positions, NaN or Inf before a layer, a layer that
            never ran.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: must hold at least one batch, got none")
    check_batches(model, batches)
    batches = processes.share(batches)
    places = {module for layer in layers for module in layer.places}
    run = trunk(model, places, batches)

    def runs() -> Iterator[tuple[Callable[[], Any], Tensor | None]]:
        for batch in track(batches, "calibration", enabled=progress):
            yield (lambda batch=batch: call(run, to_device(batch, device_of(model)))), attention_mask(batch)  # type: ignore[misc]

    with torch.no_grad(), evaluation_mode(model), no_cache(model):
        return collect_in(layers, runs, statistic)


Runs = Callable[[], Iterable[tuple[Callable[[], Any], Tensor | None]]]
"""Gives anew, at each call, the passes to make: a function that makes one, and its attention mask or None."""


def collect_in(layers: Sequence[WeightSite], runs: Runs, statistic: type[Statistic]) -> dict[str, Any]:
    """What `collect` does, for passes that the caller makes.

    Layers that read the same tensor in every pass (query, key and value; gate and up) share one statistic.
    """
    sharing = _Sharing()
    try:
        return _collect_in(layers, runs, statistic, sharing)
    except _NotSharedError:  # alike in the first pass and not in a later one: each for itself, from the start
        return _collect_in(layers, runs, statistic, None)


def _collect_in(
    layers: Sequence[WeightSite], runs: Runs, statistic: type[Statistic], sharing: _Sharing | None
) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    padding = _Padding()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.on_inputs(_counting(layer, statistics, statistic, padding, sharing)))
        for run, mask in runs():
            padding.mask = mask
            run()
            if sharing is not None:
                sharing.end_pass()
    statistics = over_processes(layers, statistics, statistic)
    unseen = [
        layer.name for layer in layers if layer.name not in statistics or not statistics[layer.name].tokens
    ]
    if unseen:
        raise ValueError(
            f"batches: must reach every layer, {len(unseen)} never ran, the first is {unseen[0]}; pass other "
            "batches, or exclude it"
        )
    return statistics


class _NotSharedError(Exception):
    pass


class _Sharing:
    """Which layers read the very same tensor: found in the first pass, checked in the others."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}
        self._first_pass = True
        # only the latest: holding all inputs of a pass would hold all its activations
        self._inputs: deque[tuple[str, Tensor]] = deque(maxlen=4)

    def is_follower(self, name: str, inputs: Tensor) -> bool:
        """Whether `inputs` were counted already, by the layer that leads this one."""
        match = next((leader for leader, seen in reversed(self._inputs) if _is_same(seen, inputs)), None)
        if self._first_pass:
            if match is not None and match != name and name not in self.leader:
                self.leader[name] = match
        elif match != self.leader.get(name):
            raise _NotSharedError
        if name in self.leader:
            if match != self.leader[name]:  # a layer that runs twice in a pass
                raise _NotSharedError
            return True
        self._inputs.append((name, inputs))
        return False

    def end_pass(self) -> None:
        self._first_pass = False
        self._inputs.clear()


def _is_same(a: Tensor, b: Tensor) -> bool:
    # by address: both are alive, so equal addresses are the same memory
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


@dataclass
class _Padding:
    mask: Tensor | None = None

    def drop(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [tokens, in] without the padded tokens."""
        if self.mask is not None and self.mask.ndim == 2 and inputs.shape[:-1] == self.mask.shape:
            return inputs[self.mask.to(inputs.device).bool()]
        return inputs.reshape(-1, inputs.shape[-1])


def _counting(
    layer: WeightSite,
    statistics: dict[str, Any],
    statistic: type[Statistic],
    padding: _Padding,
    sharing: _Sharing | None,
) -> Callable[[Tensor], None]:
    name = layer.name

    def see(inputs: Tensor) -> None:
        if sharing is not None and sharing.is_follower(name, inputs):
            statistics[name] = statistics[sharing.leader[name]]
            return
        if name not in statistics:
            statistics[name] = statistic.of(layer)
        try:
            statistics[name].update(padding.drop(inputs))
        except FloatingPointError:
            raise ValueError(
                f"batches: the inputs of {name} must be finite, got NaN or Inf; check the model's weights, "
                "or load it in float32 or bfloat16"
            ) from None

    return see


def over_processes(
    layers: Sequence[WeightSite], statistics: dict[str, Any], statistic: type[Statistic]
) -> dict[str, Any]:
    """The statistics over all processes' shares, the same in every process; `statistics` is used up.

    A layer that ran in other processes only (an expert that no token here chose) counts as zeros.
    """
    if processes.world_size() == 1:
        return statistics
    leaders: dict[int, str] = {}
    mine = {name: leaders.setdefault(id(found), name) for name, found in statistics.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(processes.world_size())]
    dist.all_gather_object(everyone, mine)
    ran = {name for theirs in everyone for name in theirs}
    # Layers that read one tensor share a statistic, which must then be added up once. Processes that do not agree on
    # who shares (an expert ran in some of them) take each layer for itself.
    agreed = all(theirs == mine for theirs in everyone)
    agreed = processes.total_integer(int(agreed)) == processes.world_size()
    reduced: dict[str, Any] = {}
    for layer in layers:
        name = layer.name
        if name not in ran:
            continue  # the caller reports it
        if agreed and mine[name] in reduced:
            reduced[name] = reduced[mine[name]]
            continue
        found = statistics.get(name)
        if found is None:
            found = statistic.of(layer)
        elif not agreed:
            found = copy.deepcopy(found)
        for _, value in sorted(vars(found).items()):
            if isinstance(value, Tensor):
                dist.all_reduce(value)
        found.tokens = processes.total_integer(found.tokens)
        reduced[name] = found
    return reduced
