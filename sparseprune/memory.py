"""How much memory this process took, how much there is, and how people write such numbers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["all_finite", "available_memory", "parse_size", "peak_memory", "resident_memory"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def peak_memory() -> int:
    """The most bytes this process has had in memory at any time (its high-water mark)."""
    found = _status("VmHWM")
    if found is None:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def resident_memory() -> int:
    """Bytes this process has in memory now; where the system does not say, the most it ever had."""
    found = _status("VmRSS")
    return peak_memory() if found is None else found


def available_memory() -> int | None:
    """Bytes that programs can still get without swapping, None where the system does not say."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def parse_size(text: str) -> int:
    """Bytes of "1.5GB" (decimal), "1.5GiB" (binary), or a plain number.

    Raises:
        ValueError: not such a number, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    units = _UNITS | _BINARY_UNITS
    size = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if size < 1:
        raise ValueError(f'memory: must be a size such as "1.5GB" or "800MiB", got {text!r}')
    return size


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; `isfinite().all()` would take as much memory again as the tensor does."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN if there is one anywhere
    return bool(low.isfinite() & high.isfinite())


def _status(field: str) -> int | None:
    return _field(Path("/proc/self/status"), field)


def _field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
