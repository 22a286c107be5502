"""What is here: the card and its driver, the compiler, the Python packages; and what is missing."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "numpy", "safetensors", "pybind11", "pytest", "hypothesis", "expecttest", "ninja", "cmake",
            "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13")  # fmt: skip
NEEDED = ("torch", "numpy", "safetensors", "pybind11", "pytest")

_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "compute_capability": "compute_cap",
    "memory": "memory.total",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
    "utilization": "utilization.gpu",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "max_sm_clock": "clocks.max.sm",
    "max_memory_clock": "clocks.max.mem",
    "throttle_reasons": "clocks_throttle_reasons.active",
}
CLOCK_FIELDS = ("sm_clock", "memory_clock", "temperature", "utilization")


def call(command: Sequence[str]) -> str | None:
    """The output of a short command, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def parse_query(output: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """One row per card, of `nvidia-smi --query-gpu=... --format=csv,noheader`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def query_cards(
    fields: Sequence[str], run: Callable[[Sequence[str]], str | None] = call
) -> list[dict[str, str]]:
    """What nvidia-smi says of each card; no card where it is not there. A field that it does not know costs that field."""
    asked = list(fields)
    output = run(
        ["nvidia-smi", f"--query-gpu={','.join(_FIELDS[it] for it in asked)}", "--format=csv,noheader"]
    )
    if output is not None:
        return parse_query(output, asked)
    cards: list[dict[str, str]] = []
    for field in asked:
        output = run(["nvidia-smi", f"--query-gpu={_FIELDS[field]}", "--format=csv,noheader"])
        for index, row in enumerate(parse_query(output or "", [field])):
            if index == len(cards):
                cards.append({})
            cards[index].update(row)
    return cards


def clocks(run: Callable[[Sequence[str]], str | None] = call) -> dict[str, str]:
    """The first card's clocks now."""
    cards = query_cards(CLOCK_FIELDS, run)
    return cards[0] if cards else {}


def busy(card: Mapping[str, str]) -> int:
    """Percent of a card's time that goes to others; 0 where it is not told."""
    found = re.match(r"(\d+) %", card.get("utilization", ""))
    return int(found[1]) if found else 0


def architectures(environment: Mapping[str, Any]) -> str:
    """For CMAKE_CUDA_ARCHITECTURES: `native`, or what nvidia-smi says to a CMake that does not know that yet."""
    found = re.match(r"(\d+)\.(\d+)", environment["cmake"] or "")
    if found and (int(found[1]), int(found[2])) >= (3, 24):
        return "native"
    chips = dict.fromkeys(card["compute_capability"].replace(".", "") for card in environment["cards"])
    return ";".join(f"{chip}-real" for chip in chips)


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {name: version for name, version in found.items() if version or name in NEEDED}


def look(run: Callable[[Sequence[str]], str | None] = call) -> dict[str, Any]:
    nvcc = run(["nvcc", "--version"])
    release = re.search(r"release ([\d.]+)", nvcc or "")
    sanitizer = run(["compute-sanitizer", "--version"])
    cmake = run(["cmake", "--version"])
    return {
        "cards": query_cards(tuple(_FIELDS), run),
        "nvcc": release[1] if release else None,
        "compute_sanitizer": sanitizer.splitlines()[-1] if sanitizer else None,
        "cmake": cmake.split()[2] if cmake else None,
        "packages": versions(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
    }


def missing(environment: Mapping[str, Any], dry_run: bool) -> list[str]:
    """What a run cannot do without, and the remedy; a dry run needs no card."""
    lacks = []
    if not environment["cards"] and not dry_run:
        lacks.append("no NVIDIA card, or no nvidia-smi to see it by: install the driver, or try --dry-run")
    if environment["nvcc"] is None and not dry_run:
        lacks.append(
            "no nvcc on PATH: install the CUDA toolkit (12.5 or newer), or add its bin folder to PATH"
        )
    if environment["cmake"] is None:
        lacks.append("no cmake on PATH: pip install cmake")
    packages = [name for name in NEEDED if environment["packages"].get(name) is None]
    if packages:
        lacks.append(f"Python packages are missing: pip install {' '.join(packages)}")
    return lacks
