"""What the tests of benchmarks/gpu_check share. Importing it makes the package `gpu_check` importable."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
from helpers.clocks import Ticks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_check import measure, plan
from gpu_check.timing import HostClock

SMI = "NVIDIA H100 80GB HBM3, 570.86, 9.0, 81559 MiB, 700.00 W, 31, 0 %, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 0x0"
"""What nvidia-smi says of a card."""


def dry(seconds: float = 10.0, **change) -> tuple[int, list[dict]]:
    """The code and the messages of the benchmark's child in a dry run; `change`: attributes of the Bench."""
    emitted: list[dict] = []
    bench = measure.Bench("cpu", emitted.append)
    bench.clock = HostClock(Ticks())
    for name, value in change.items():
        setattr(bench, name, value)
    code = measure.run(bench, plan.dry_cells(), change.get("first", 0), seconds)
    return code, emitted


@functools.cache
def dry_messages() -> list[dict]:
    """The messages, as they arrive in the parent."""
    torch.manual_seed(0)
    code, emitted = dry()
    assert code == 0
    return json.loads(json.dumps(emitted))
