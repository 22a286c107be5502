"""The record of a run: one JSON file, whole at any moment, because a run may be cut at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import to_json

VERSION = 1
LISTS = ("linears", "masks", "conversions", "choices")
"""Measurements by kind: a list of records each."""


def write_by_rename(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(text)
    os.replace(fresh, path)


class Record:
    """What is known so far; every change is on the disk when the method returns."""

    def __init__(self, path: Path, dry_run: bool, budget: float) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "version": VERSION,
            "dry_run": dry_run,
            "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "budget_seconds": budget,
            "environment": {},
            "steps": [],
            "left_out": [],
            "notes": [],
            **{name: [] for name in LISTS},
        }
        self.save()

    def save(self) -> None:
        write_by_rename(self.path, to_json(self.data))

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.save()

    def add(self, key: str, value: Any) -> None:
        self.data[key].append(value)
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        self.add("left_out", {"what": what, "why": why})

    def step(self, name: str) -> dict[str, Any]:
        """A step that has begun; change it and save."""
        entry: dict[str, Any] = {"name": name, "state": "running"}
        self.add("steps", entry)
        return entry


class Budget:
    """Seconds that are left of a total, by a clock."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._begin = clock()

    def spent(self) -> float:
        return self._clock() - self._begin

    def left(self) -> float:
        return max(0.0, self.seconds - self.spent())

    def share(self, fraction: float, at_most: float, reserve: float = 0.0) -> float:
        """A step's seconds: a fraction of what is left beyond `reserve`, and at most the fraction `at_most` of all."""
        return min(at_most * self.seconds, fraction * max(0.0, self.left() - reserve))
