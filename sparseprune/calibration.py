"""Statistics of the inputs of a model's linear layers, taken by hooks while it reads a sample of text."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import distributed
from sparseprune.models import LinearLayer, device_of, evaluation_mode, max_length
from sparseprune.report import track

__all__ = ["Batch", "CalibrationData", "Gram", "InputSquares", "Statistic", "collect", "token_ids", "windows"]

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...]
"""What one call of the model takes: its first argument, its keyword arguments, or its positional ones."""


@dataclass(frozen=True)
class CalibrationData:
    """Batches to run a model on, and in words where they come from. Any model, any number of passes."""

    batches: Sequence[Batch]
    source: str = "given batches"

    def __post_init__(self) -> None:
        if len(self.batches) == 0:
            raise ValueError("batches: must hold at least one batch, got none")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def token_ids(text: str | Tensor | Sequence[int], tokenizer: Any = None) -> Tensor:
    """`text` as int64 token ids [tokens], without special tokens; ids pass through.

    Raises:
        ValueError: an empty text, ids that are not integers in one row, a string without a tokenizer.
    """
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(
                "text: must not be empty, got only white space; pass a text of some thousand words"
            )
        if tokenizer is None:
            raise ValueError(
                "tokenizer: must be given to read text, got None; pass it, or token ids instead of text"
            )
        # verbose=False: a text longer than the model's window is meant, it is cut into windows afterwards
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
    ids = torch.as_tensor(text)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if ids.numel() == 0:
            raise ValueError("text: must not be empty, got no token ids")
        raise ValueError(f"text: token ids must be integers [tokens], got {ids.dtype} {list(ids.shape)}")
    return ids.to(torch.int64)


def windows(
    text: str | Tensor | Sequence[int],
    tokenizer: Any = None,
    length: int = 1024,
    count: int = 32,
    seed: int = 0,
) -> CalibrationData:
    """`count` windows of `length` tokens of one text, for `collect` and `prune`: batches int64 [1, length].

    The text is cut into windows that do not overlap; `seed` draws `count` of them, in the text's order. No
    special tokens are added.

    Raises:
        ValueError: `length` or `count` below 1, an empty text, or one of fewer than length * count tokens.
    """
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    ids = token_ids(text, tokenizer)
    available = len(ids) // length
    if available < count:
        raise ValueError(
            f"text: {count} windows of {length} tokens need {count * length} tokens, got {len(ids)}; pass a "
            f"longer text, or {f'count <= {available}' if available else 'a smaller length'}"
        )
    chosen = sorted(random.Random(seed).sample(range(available), count))
    batches = tuple(ids[index * length : (index + 1) * length].unsqueeze(0) for index in chosen)
    return CalibrationData(batches, f"{count} windows of {length} tokens, seed {seed}")


class Statistic(ABC):
    """A running summary of one layer's inputs. `in_features` and `device` say what to make room for.

    Every tensor that it keeps is a sum over tokens, so that processes can add theirs up (sparseprune.distributed).
    """

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

    def norm(self) -> Tensor:
        """||X_j||_2 over all tokens, float32 [in_features]."""
        return self.sum_squares.sqrt().float()


class Gram(InputSquares):
    """G = X^T X: `matrix` float32 [in_features, in_features], with its diagonal as `sum_squares`.

    Sums are float32 within a batch and across them.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        super().update(inputs)
        inputs = inputs.float()
        self.matrix.addmm_(inputs.t(), inputs)


def collect(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Iterable[Batch],
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
    check_lengths(model, batches)
    batches = distributed.share(batches)
    places = {module for layer in layers for module in (layer.module, *(module for _, module in layer.tied))}
    run = trunk(model, places, batches)

    def runs() -> Iterator[tuple[Callable[[], Any], Tensor | None]]:
        for batch in track(batches, "calibration", enabled=progress):
            yield (lambda batch=batch: call(run, to_device(batch, device_of(model)))), attention_mask(batch)  # type: ignore[misc]

    with torch.no_grad(), evaluation_mode(model), no_cache(model):
        return collect_in(layers, runs, statistic)


Runs = Callable[[], Iterable[tuple[Callable[[], Any], Tensor | None]]]
"""Gives anew, at each call, the passes to make: a function that makes one, and its attention mask or None."""


def collect_in(layers: Sequence[LinearLayer], runs: Runs, statistic: type[Statistic]) -> dict[str, Any]:
    """What `collect` does, for passes that the caller makes.

    Layers that read the same tensor in every pass (query, key and value; gate and up) share one statistic.
    """
    sharing = _Sharing()
    try:
        return _collect_in(layers, runs, statistic, sharing)
    except _NotSharedError:  # alike in the first pass and not in a later one: each for itself, from the start
        return _collect_in(layers, runs, statistic, None)


def _collect_in(
    layers: Sequence[LinearLayer], runs: Runs, statistic: type[Statistic], sharing: _Sharing | None
) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    padding = _Padding()
    with ExitStack() as stack:
        for layer in layers:
            hook = _hook(layer, statistics, statistic, padding, sharing)
            # a set: one module object may stand in two places, and must not count its inputs twice
            for module in {layer.module, *(module for _, module in layer.tied)}:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for run, mask in runs():
            padding.mask = mask
            run()
            if sharing is not None:
                sharing.end_pass()
    statistics = distributed.all_reduce(layers, statistics, statistic)
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


def _hook(
    layer: LinearLayer,
    statistics: dict[str, Any],
    statistic: type[Statistic],
    padding: _Padding,
    sharing: _Sharing | None,
) -> Any:
    name = layer.name

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if sharing is not None and sharing.is_follower(name, inputs):
            statistics[name] = statistics[sharing.leader[name]]
            return
        if name not in statistics:
            statistics[name] = statistic(layer.in_features, layer.weight.device)
        try:
            statistics[name].update(padding.drop(inputs))
        except FloatingPointError:
            raise ValueError(
                f"batches: the inputs of {name} must be finite, got NaN or Inf; check the model's weights, "
                "or load it in float32 or bfloat16"
            ) from None

    return hook


def attention_mask(batch: Batch) -> Tensor | None:
    """The batch's attention mask, if it is a mapping that has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def check_lengths(model: nn.Module, batches: Sequence[Batch]) -> None:
    limit = max_length(model)
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if limit is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            continue
        if ids.shape[1] > limit:
            raise ValueError(
                f"batches: the model's positions end at {limit}, batch {index} has {ids.shape[1]} tokens; "
                f"pass windows of length <= {limit}"
            )


def trunk(model: nn.Module, places: Iterable[nn.Module], batches: Sequence[Batch]) -> nn.Module:
    # A transformers model's head costs a fifth of SmolLM2's pass and feeds no layer: skip it if it holds none
    # of ours, and no batch has labels, which only the whole model takes.
    trunk = getattr(model, "base_model", None) if hasattr(model, "base_model_prefix") else None
    labels = any(isinstance(batch, Mapping) and "labels" in batch for batch in batches)
    if labels or not isinstance(trunk, nn.Module):
        return model
    return trunk if set(trunk.modules()).issuperset(places) else model


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    return value


def call(model: nn.Module, batch: Batch) -> Any:
    """What the model gives for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    # a transformers model would keep the keys and values of the whole pass, for nothing
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
