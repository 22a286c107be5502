"""The one clock by which time is kept and told: tests put another in its place, so that none depends on speed."""

from __future__ import annotations

import time

__all__ = ["now"]


def now() -> float:
    """Seconds since some moment; call it as `clock.now()`."""
    return time.perf_counter()
