"""Pruning in a given time: how many calibration batches the blocks that are left may read, and how many epochs fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sparseprune import clock, processes
from sparseprune.pruning.options import Reconstruction

__all__ = ["Pace"]

_EPOCH = 3.5  # passes: forward and backward over every batch, and the optimizer's steps
_LOSSES = 2.0  # passes: the loss before the epochs and after them
_WALK_ON = 1.0  # pass: what the pruned block makes of its inputs
# Passes until a block shows what it takes: statistics take two, the hidden states walk on, the dense model's too.
_READING, _READING_BOTH = 3.0, 4.0
_KEPT = 0.75  # at least so many of the batches from one block to the next


class Pace:
    """Shares the time until a deadline out over the blocks.

    A block takes what its solver takes, and for every batch what is read of it and 3.5 passes an epoch. Batches are
    dropped, for good, where a block's share would not hold one epoch over all of them; then as many epochs are made as
    fit. Several processes come to the same numbers, from the means of what each measures.

    Args:
        until: the deadline by `sparseprune.clock`; None: there is none, and nothing is dropped.
        blocks: how many there are.
        batches: that this process has.
        seconds_a_pass: of one block over one batch, without gradients.
        options: how blocks are reconstructed, None if they are not.
    """

    def __init__(
        self, until: float | None, blocks: int, batches: int, seconds_a_pass: float, options: Reconstruction | None
    ) -> None:  # fmt: skip
        self.until, self.blocks, self.batches, self.options = until, blocks, batches, options
        self._pass = max(processes.mean(seconds_a_pass), 1e-9)
        self._reading = self._pass * (_READING if options is None else _READING_BOTH)
        self._solving: float | None = None
        self._epochs = 0
        self._taken: dict[str, float] = {}
        self._end = 0.0

    @contextmanager
    def block(self) -> Iterator[int]:
        """Around a block's work; gives how many batches it reads, the first ones."""
        if self.until is None:
            yield self.batches
            return
        begin = clock.now()
        share = processes.mean(self.until - begin) / self.blocks
        self.blocks -= 1
        self._end = begin + share
        training = 0.0 if self.options is None else (_EPOCH + _LOSSES) * self._pass
        fit = int((share - (self._solving or 0.0)) / (self._reading + training))
        # what is dropped is gone: one block that was held up must not cost the others more than a quarter
        least = 1 if self._solving is None else math.ceil(_KEPT * self.batches)
        self.batches = max(least, min(self.batches, fit))
        self._taken.clear()
        yield self.batches
        if "solving" in self._taken:
            self._learn(clock.now() - begin)

    def _learn(self, seconds: float) -> None:
        """From a block that took so long in all."""
        batches = processes.mean(self.batches)
        solving, training = (processes.mean(self._taken.get(it, 0.0)) for it in ("solving", "training"))
        reading = max(processes.mean(seconds) - solving - training, 1e-9) / batches
        # the least of any block: the first one's has the start of threads and caches in it
        known = self._solving is not None
        self._reading = min(self._reading, reading) if known else reading
        self._solving = min(self._solving, solving) if self._solving is not None else solving
        if training:
            self._pass = training / (batches * (_EPOCH * self._epochs + _LOSSES))

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Around what does not depend on the batches ("solving"), and around the epochs ("training")."""
        begin = clock.now()
        yield
        self._taken[what] = clock.now() - begin

    def epochs(self) -> Reconstruction | None:
        """The block's reconstruction, with as many of its epochs as fit; None if not even one does."""
        if self.options is None or self.until is None:
            return self.options
        passes = processes.mean(self._end - clock.now()) / (processes.mean(self.batches) * self._pass)
        # one that lacks a quarter is made: the next blocks have to make up for it
        self._epochs = min(self.options.epochs, int((passes - _LOSSES - _WALK_ON) / _EPOCH + 0.25))
        return None if self._epochs < 1 else replace(self.options, epochs=self._epochs)
