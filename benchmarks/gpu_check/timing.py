"""How long a call takes on a GPU: CUDA graphs between events, candidates in turn, medians.

A graph of many calls, each on other memory, shows the kernels alone; what the host adds is measured beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

TURN_SECONDS = 1e-3
"""A turn of one candidate: long beside the gap between an event and the first kernel (some microseconds)."""

MAX_CALLS = 1024  # in a turn: what a launch queue holds
HOST_CALLS = 64
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds a call. `host`: what the host needs to ask for one; `eager`: why no graph was made, "" where one was."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    host: float
    eager: str


@dataclass(frozen=True)
class Turn:
    """`calls` calls, ready to run again and again."""

    run: Call
    calls: int
    host: float
    eager: str = ""


class CudaClock:
    """Times turns on the current device. `cuda` is torch.cuda, or a test's stand-in.

    `now` tells the seconds that turns are given. `eager` names the candidates that are not captured: they wait for the device, or have failed before. A failure adds
    to `failed`; the process should then end soon, because torch may keep half of the state of a broken capture.
    """

    def __init__(
        self, eager: Iterable[str] = (), cuda: Any = torch.cuda, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._cuda = cuda
        self.now = now
        self.eager = frozenset(eager)
        self.failed: set[str] = set()

    def turn(self, name: str, calls: Sequence[Call]) -> Turn:
        """Captures calls, round robin, until they take `TURN_SECONDS`."""
        for call in itertools.islice(
            itertools.cycle(calls), 3
        ):  # libraries choose and load their kernels at first
            call()
        host = self._host_seconds(calls)
        one = self.seconds(Turn(lambda: _run(calls), len(calls), host))
        count = min(MAX_CALLS, len(calls) * max(1, math.ceil(TURN_SECONDS / max(one, 1e-7) / len(calls))))
        sequence = list(itertools.islice(itertools.cycle(calls), count))
        if name in self.eager:
            return Turn(lambda: _run(sequence), count, host, "not captured")
        try:
            graph = self._cuda.CUDAGraph()
            with self._cuda.graph(graph):
                _run(sequence)
            graph.replay()
            self._cuda.synchronize()
        except RuntimeError as error:
            if is_fatal(error):
                raise
            self.failed.add(name)
            return Turn(lambda: _run(sequence), count, host, f"capture failed: {first_line(error)}")
        return Turn(graph.replay, count, host)

    def seconds(self, turn: Turn) -> float:
        begin, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        self._cuda.synchronize()
        begin.record()
        turn.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / turn.calls

    def _host_seconds(self, calls: Sequence[Call]) -> float:
        """The queue takes them all, so that none waits for the device."""
        sequence = list(itertools.islice(itertools.cycle(calls), HOST_CALLS))
        self._cuda.synchronize()
        begin = self.now()
        _run(sequence)
        seconds = (self.now() - begin) / len(sequence)
        self._cuda.synchronize()
        return seconds


class HostClock:
    """The same for a dry run, on a CPU."""

    failed: frozenset[str] = frozenset()

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def turn(self, name: str, calls: Sequence[Call]) -> Turn:
        _run(calls)
        return Turn(lambda: _run(calls), len(calls), 0.0, "on a CPU")

    def seconds(self, turn: Turn) -> float:
        begin = self.now()
        turn.run()
        return (self.now() - begin) / turn.calls


def take_turns(
    candidates: Mapping[str, Sequence[Call]], seconds: float, clock: CudaClock | HostClock
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times candidates in turn for about `seconds`; those that cannot run come back with their error instead.

    A candidate is calls that do the same work on different memory.
    """
    begin = clock.now()
    turns: dict[str, Turn] = {}
    errors: dict[str, str] = {}
    for name, calls in candidates.items():
        try:
            turns[name] = clock.turn(name, calls)
        except (RuntimeError, NotImplementedError) as error:
            if is_fatal(error):
                raise
            errors[name] = first_line(error)
    times: dict[str, list[float]] = {name: [] for name in turns}
    rounds = 0
    while turns and (rounds < MIN_ROUNDS or clock.now() - begin < seconds):
        for name, turn in turns.items():
            times[name].append(clock.seconds(turn))
        rounds += 1
    return {
        name: Timing(
            statistics.median(it),
            min(it),
            max(it),
            rounds,
            turns[name].calls,
            turns[name].host,
            turns[name].eager,
        )
        for name, it in times.items()
    }, errors


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: nothing after an illegal access can be trusted."""
    text = str(error)
    return any(it in text for it in ("illegal memory access", "misaligned address", "launch failure", "device-side assert",
                                     "illegal instruction", "hardware stack"))  # fmt: skip


def first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
