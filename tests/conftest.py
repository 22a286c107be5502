from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import backends
from helpers.isa import LEVELS


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
