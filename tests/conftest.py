from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from helpers import backends
from helpers.clocks import Ticks
from helpers.isa import LEVELS


def pytest_report_header() -> str:
    """The order in which the emulated GPU's threads run is another each time, and can be had again."""
    seed = os.environ.setdefault("SPARSEPRUNE_SIMT_SEED", str(random.getrandbits(32)))
    return f"emulated GPU: SPARSEPRUNE_SIMT_SEED={seed}"


@pytest.fixture(params=[*LEVELS, *backends.GPUS])
def level(request: pytest.FixtureRequest) -> Iterator[backends.Place]:
    """Every set of kernels: of each instruction set, of the emulated GPU, of a real one where there is one."""
    with backends.running(request.param) as place:
        yield place


@pytest.fixture(params=["cpu", *backends.GPUS])
def place(request: pytest.FixtureRequest) -> Iterator[backends.Place]:
    """The CPU as it is set up, the emulated GPU, a real one where there is one."""
    with backends.running(request.param) as place:
        yield place


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """The clock that the library reads in this test."""
    ticks = Ticks()
    monkeypatch.setattr("sparseprune.clock.now", ticks)
    return ticks


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if line := backends.summary():
        terminalreporter.write_line(line)
