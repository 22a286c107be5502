"""Strategies that nothing is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def strategy(*_: Any, **__: Any) -> None:
        return None

    return strategy
