"""Fixtures of the pytest-benchmark suite: `pytest benchmarks` times operations one by one, for regressions.

    pytest benchmarks --benchmark-group-by=group --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

The comparison with torch, call by call in turn, is run.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from layers import describe, machine_record
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rotate(benchmark: BenchmarkFixture) -> Callable[[Sequence[Callable[[], Any]]], None]:
    """Benchmarks calls that do the same work on different memory, each round the next one."""

    def run(calls: Sequence[Callable[[], Any]]) -> None:
        turn = itertools.cycle(calls)
        with torch.no_grad():
            benchmark(lambda: next(turn)())

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    record = machine_record()
    machine_info["sparseprune"] = {**record, "line": describe(record)}
