"""Walk a model block by block: what reaches its blocks, and one block run at a time on what the last one gave.

Only one block works at a time, so a block can be pruned before the next one's inputs are known, and its weights need to
be there only while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune import clock, processes
from sparseprune.models.batches import Batch, attention_mask, call, check_batches, no_cache, to_device, trunk
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track
from sparseprune.statistics.inputs import Statistic, collect_in

__all__ = [
    "Call",
    "Walk",
    "WalkError",
    "advance",
    "block_statistics",
    "capture",
    "run_block",
    "seconds_a_pass",
]


class WalkError(ValueError):
    """The model is not a chain of blocks, each fed by the one before."""


@dataclass(frozen=True)
class Call:
    """How the model calls a block, less the hidden states, which come first."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Walk:
    """The state between two blocks.

    Attributes:
        hidden: hidden states [batch, tokens, features] for each calibration batch: the inputs of the block that is
            next. Any sequence that can be written to, such as one that lives on disk.
        calls: for each block and each batch, what else the block gets.
        masks: for each batch its attention mask [batch, tokens], or None.
        autocast: the dtype that matrix products are made in while a block runs; None: the model's own.
    """

    hidden: MutableSequence[Tensor]
    calls: list[list[Call]]
    masks: list[Tensor | None]
    autocast: torch.dtype | None = None

    def keep(self, batches: int) -> None:
        """Forgets all batches but the first so many."""
        del self.hidden[batches:], self.masks[batches:]
        for calls in self.calls:
            del calls[batches:]

    def precision(self) -> AbstractContextManager[None]:
        """What a block runs in."""
        if self.autocast is None or not self.hidden:
            return nullcontext()
        return torch.autocast(self.hidden[0].device.type, dtype=self.autocast)


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    hidden: MutableSequence[Tensor] | None = None,
    progress: bool = False,
) -> Walk:
    """Runs what comes before the blocks, and records what the blocks are called with.

    The blocks do not run, but for the first on the first batch, which shows what a block returns: the others'
    weights may be anywhere. Where `torch.distributed` runs several processes, each reads its share of the batches.

    Args:
        hidden: where to append the hidden states; a list by default.

    Raises:
        WalkError: the model has no blocks, or they are not a chain.
    """
    if not blocks:
        raise WalkError(
            f"model: {type(model).__name__} has no repeated blocks; see sparseprune.models.blocks.find_blocks"
        )
    check_batches(model, batches)
    batches = processes.share(batches)
    walk = Walk([] if hidden is None else hidden, [[] for _ in blocks], [])
    pool = _Pool()
    run = trunk(model, blocks, batches)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        recorder = stack.enter_context(_recording(blocks, walk, pool))
        for batch in track(batches, "reading the calibration text", enabled=progress):
            recorder.begin()
            walk.masks.append(attention_mask(batch))
            call(run, to_device(batch, device_of(model)))
            recorder.end()
    return walk


def run_block(block: nn.Module, hidden: Tensor, how: Call) -> Tensor:
    """The block's hidden states after `hidden`, both [batch, tokens, features]."""
    output = block(hidden, *how.args, **how.kwargs)
    return output if isinstance(output, Tensor) else output[0]


def block_statistics(
    block: nn.Module,
    layers: Sequence[WeightSite],
    walk: Walk,
    index: int,
    statistic: type[Statistic],
) -> dict[str, Any]:
    """Runs block `index` over `walk.hidden`, and sums up the inputs of `layers`, which lie in it.

    Layers that read the same tensor share one statistic.

    Returns:
        layer name -> statistic.

    Raises:
        ValueError: NaN or Inf before a layer, or a layer that never ran.
    """

    def runs() -> Iterator[tuple[Callable[[], Any], Tensor | None]]:
        for hidden, how, mask in zip(walk.hidden, walk.calls[index], walk.masks, strict=True):
            yield (lambda hidden=hidden, how=how: run_block(block, hidden, how)), mask  # type: ignore[misc]

    with torch.no_grad(), evaluation_mode(block), walk.precision():
        return collect_in(layers, runs, statistic)


def advance(block: nn.Module, walk: Walk, index: int) -> None:
    """Replaces `walk.hidden` by what the block makes of it."""
    with torch.no_grad(), evaluation_mode(block), walk.precision():
        for batch, how in enumerate(walk.calls[index]):
            hidden = walk.hidden[batch]
            walk.hidden[batch] = run_block(block, hidden, how).to(hidden.dtype)


def seconds_a_pass(block: nn.Module, walk: Walk, index: int) -> float:
    """How long the block takes over one batch, once it has run."""
    seconds = 0.0
    with torch.no_grad(), evaluation_mode(block), walk.precision():
        for _ in range(2):
            begin = clock.now()
            run_block(block, walk.hidden[0], walk.calls[index][0])
            seconds = clock.now() - begin
    return seconds


class _Pool:
    """One copy of tensors that are equal: masks and positions of all blocks and batches are mostly the same."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[Tensor] = []

    def keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._by_id.get(id(value))
            if known is not None and known[0] is value:
                return known[1]
            kept = next((it for it in self._kept if _same(it, value)), None)
            if kept is None:
                kept = value.detach()
                self._kept.append(kept)
            self._by_id[id(value)] = (value, kept)
            return kept
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self.keep(item) for item in value)
        if type(value) is dict:
            return {key: self.keep(item) for key, item in value.items()}
        return value

    def forget_ids(self) -> None:
        """Ends a pass: the next one's tensors may take the same addresses."""
        self._by_id.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Recorder:
    def __init__(self, blocks: Sequence[nn.Module], walk: Walk, pool: _Pool) -> None:
        self.walk, self.pool = walk, pool
        self.originals = [block.forward for block in blocks]
        self.shape: Callable[[Tensor], Any] | None = None
        self.next = 0
        self.last: Tensor | None = None

    def begin(self) -> None:
        self.next, self.last = 0, None

    def end(self) -> None:
        if self.next != len(self.originals):
            raise WalkError(f"model: block {self.next} never ran in a pass")
        self.pool.forget_ids()

    def stub(self, index: int) -> Callable[..., Any]:
        signature = inspect.signature(self.originals[index])
        first = next(iter(signature.parameters), "hidden_states")

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop(first, None)
            if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
                raise WalkError(
                    f"model: block {index} must take hidden states first, got {type(hidden).__name__}"
                )
            if index != self.next or (index > 0 and hidden is not self.last and not _same(hidden, self.last)):  # type: ignore[arg-type]
                raise WalkError(f"model: block {index} does not read what block {index - 1} returns")
            if index == 0:
                self.walk.hidden.append(hidden.detach())
            if self.shape is None:
                self.shape = _shape_of(self.originals[0](hidden, *args[1:], **kwargs))
            self.walk.calls[index].append(Call(self.pool.keep(tuple(args[1:])), self.pool.keep(kwargs)))
            self.next, self.last = index + 1, hidden
            return self.shape(hidden)

        return forward


def _shape_of(output: Any) -> Callable[[Tensor], Any]:
    """How to return hidden states as a block does: alone, or first of a tuple."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    raise WalkError(f"model: a block must return hidden states, got {type(output).__name__}")


@contextmanager
def _recording(blocks: Sequence[nn.Module], walk: Walk, pool: _Pool) -> Iterator[_Recorder]:
    recorder = _Recorder(blocks, walk, pool)
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder.stub(index)  # type: ignore[method-assign]
        yield recorder
    finally:
        for block in blocks:
            del block.forward
