"""Clocks that tests put in the place of real ones: no machine is too slow for them, or too busy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparseprune import clock


class Ticks:
    """Goes on by `step` seconds each time it is read, and by what is added to `seconds`."""

    def __init__(self, step: float = 1e-3) -> None:
        self.seconds, self.step = 0.0, step

    def __call__(self) -> float:
        self.seconds += self.step
        return self.seconds


@contextmanager
def ticking(step: float) -> Iterator[None]:
    """Inside, the package's clock is a new `Ticks`: what has so many minutes does the same each time."""
    before = clock.now
    clock.now = Ticks(step)
    try:
        yield
    finally:
        clock.now = before
