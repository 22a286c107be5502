"""How much memory this process took, how much there is, and how people write such numbers."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "all_finite",
    "available_memory",
    "parse_size",
    "peak_memory",
    "resident_memory",
    "room_under_ulimit",
    "spare_address_space",
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_M_ARENA_MAX = -8  # malloc.h
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
    """Bytes that this process can still get without swapping, in its container if it is in one; None where the system
    does not say.
    """
    known = [_field(Path("/proc/meminfo"), "MemAvailable"), *(_cgroup_room(*names) for names in _CGROUPS)]
    return min((size for size in known if size is not None), default=None)


def room_under_ulimit() -> int | None:
    """Bytes until an allocation fails by `ulimit -v` or `-d`, None without such a limit."""
    import resource

    rooms = []
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        allowed, taken = resource.getrlimit(limit)[0], _status(used)
        if allowed != resource.RLIM_INFINITY and taken is not None:
            rooms.append(allowed - taken)
    return min(rooms, default=None)


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


def spare_address_space() -> None:
    """Under a limit on address space (`ulimit -v`), lets all threads share one malloc arena.

    glibc reserves 64 to 128 MiB for each thread's, whatever little it comes to hold.
    """
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; `isfinite().all()` would take as much memory again as the tensor does."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN if there is one anywhere
    return bool(low.isfinite() & high.isfinite())


def _cgroup_room(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
    return allowed - used + int(stat.get(cache, 0))  # files that are only cached make room


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
