"""What this machine is fast at."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["fast_bfloat16"]

_CPUINFO = Path("/proc/cpuinfo")
# x86 with AVX512-BF16 or AMX, Arm with its bfloat16 extension
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def fast_bfloat16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices faster than float32 ones on `device`.

    A CPU is asked what it can do, not which of our kernels are in force: `SPARSEPRUNE_ISA` changes nothing for torch. A
    CPU without instructions for it is slower in bfloat16 than in float32, and so is one that does not say.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not _BFLOAT16_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> list[str]:
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return []
    lines = (line.partition(":") for line in text.splitlines())
    return next((flags.split() for name, _, flags in lines if name.strip() in ("flags", "Features")), [])
