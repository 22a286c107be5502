"""What every benchmark here shares: named shapes, pruned weights, the clock, and the record of the machine."""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprune import isa, isas_available
from sparseprune.pruning.patterns import mask_from_scores
from sparseprune.weights.format import Format

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "LLaMA-7B": {"qkvo": (4096, 4096), "gate/up": (11008, 4096), "down": (4096, 11008)},
    "SmolLM2-135M": {"q/o": (576, 576), "k/v": (192, 576), "gate/up": (1536, 576), "down": (576, 1536)},
}
"""The linears of two models, [out, in]."""

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ROTATED_BYTES = 600_000_000
"""Dense copies of a weight take this much at least: a server's shared L3 holds hundreds of megabytes."""

MIN_COPIES = 8
_MIN_ROUNDS = 7
_TURN_CALLS = 4
_TURN_SECONDS = 0.004


def pruned_weight(
    rows: int, cols: int, dtype: torch.dtype, form: str | Format, sparsity: float, seed: int = 0
) -> Tensor:
    """Normal weights [rows, cols]: by magnitude where `form` is N:M, zeros anywhere with probability `sparsity` else."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=random)
    if Format.parse(form).kind == "nm":
        weight *= mask_from_scores(weight.abs(), str(form))
    else:
        weight[torch.rand(rows, cols, generator=random) < sparsity] = 0
    return weight.to(dtype)


def copies_of(dense_bytes: int, rotated_bytes: int = ROTATED_BYTES) -> int:
    """How many copies of a weight push each other out of every cache."""
    return max(MIN_COPIES, math.ceil(rotated_bytes / dense_bytes))


@dataclass(frozen=True)
class Samples:
    """Seconds a call: the median, the extremes, and how many calls they stand for."""

    median: float
    low: float
    high: float
    count: int


def take_turns(candidates: Mapping[str, Sequence[Callable[[], Any]]], seconds: float) -> dict[str, Samples]:
    """Times candidates in turn, so that a busy moment of the machine hits all of them.

    A candidate is calls that do the same work on different memory, taken round robin. A turn is 4 calls, less once
    it takes 4 ms: in a model a layer follows its like, and the first call after another library's is slower.
    At least 7 rounds, else for about `seconds`. (`sparseprune.measure.benchmark.alternating_medians` is the clock for a
    decision; a record needs the extremes and the turns.)
    """
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    cycles = {name: itertools.cycle(calls) for name, calls in candidates.items()}
    for cycle in cycles.values():  # libraries choose and compile their kernels on first calls
        next(cycle)()
        next(cycle)()
    collects = gc.isenabled()
    gc.disable()
    try:
        stop, rounds = clock() + seconds, 0
        while rounds < _MIN_ROUNDS or clock() < stop:
            for name, cycle in cycles.items():
                turn = clock()
                for _ in range(_TURN_CALLS):
                    call = next(cycle)
                    begin = clock()
                    call()
                    end = clock()
                    times[name].append(end - begin)
                    if end - turn > _TURN_SECONDS:
                        break
            rounds += 1
    finally:
        if collects:
            gc.enable()
    return {name: Samples(statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()}


def machine_record(megabytes: int = 800) -> dict[str, Any]:
    """What ran the benchmark: CPU, instruction set, caches, threads, torch, and two bandwidths in GB/s.

    Reading is a matrix-vector product of `megabytes`, the fastest reader torch has; copying counts the bytes read
    and the bytes written.
    """
    matrix = torch.ones(megabytes * 25, 10_000)
    vector, target = torch.ones(10_000), torch.empty_like(matrix)
    samples = take_turns(
        {"read": [lambda: torch.mv(matrix, vector)], "copy": [lambda: target.copy_(matrix)]}, 0.8
    )
    return {
        "cpu": _cpu_name(),
        "isa": isa(),
        "isas_available": isas_available(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_gb_s": matrix.nbytes / samples["read"].median / 1e9,
        "copy_gb_s": 2 * matrix.nbytes / samples["copy"].median / 1e9,
    }


class Watch:
    """Tells what the rest of the machine did meanwhile: a timing made beside other work is not a timing."""

    def __init__(self) -> None:
        self._begin = self._read()

    def others(self) -> float | None:
        """Share of all cores' time that went to other processes and other machines on the host; None off Linux."""
        begin, end = self._begin, self._read()
        if begin is None or end is None or end[0] <= begin[0]:
            return None
        total, busy, own = (late - early for early, late in zip(begin, end, strict=True))
        return max(0.0, busy - own) / total

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(it) / os.sysconf("SC_CLK_TCK") for it in stat.read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        return sum(ticks), sum(ticks) - idle, sum(os.times()[:4])


def describe(machine: Mapping[str, Any]) -> str:
    """The record in one line."""
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    others = machine.get("others_cpu_share")
    return (
        f"{machine['cpu']} ({machine['isa']}; {caches}), {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, reads {machine['read_gb_s']:.1f} GB/s, copies {machine['copy_gb_s']:.1f} GB/s"
        + ("" if others is None else f"; others took {others:.1%} of the cores' time")
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in fields:
            numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
            return f"{fields['model name']} [{', '.join(numbers)}]"
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Data caches as Linux reports them, by level."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            found[f"L{(folder / 'level').read_text().strip()}"] = (folder / "size").read_text().strip()
    return found
