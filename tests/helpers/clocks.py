"""Clocks that tests put in the place of real ones: no machine is too slow for them, or too busy."""

from __future__ import annotations


class Ticks:
    """Goes on by `step` seconds each time it is read, and by what is added to `seconds`."""

    def __init__(self, step: float = 1e-3) -> None:
        self.seconds, self.step = 0.0, step

    def __call__(self) -> float:
        self.seconds += self.step
        return self.seconds
