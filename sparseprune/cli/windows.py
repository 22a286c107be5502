"""Windows of a text, no longer than the model can read: where that makes them shorter, it is said."""

from __future__ import annotations

from typing import Any

from sparseprune.cli import console
from sparseprune.options import Windowing

__all__ = ["calibration_data", "fitting"]


def fitting(length: int, limit: int | None) -> int:
    """Tokens in a window: `length`, or `limit`, the model's positions, if there are fewer."""
    if limit is None or length <= limit:
        return length
    console.say(f"windows have {limit} tokens instead of {length}: the model's positions end there")
    return limit


def calibration_data(text: str, tokenizer: Any, windowing: Windowing, seed: int, limit: int | None) -> Any:
    """Windows of the text, no longer than `limit`."""
    from sparseprune.calibration import windows

    length = fitting(windowing.length, limit)
    return windows(text, tokenizer, length=length, count=windowing.count, seed=seed)
