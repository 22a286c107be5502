"""In the place of hypothesis where it is not installed: its tests are skipped, and say so; those beside them run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def given(*_: Any, **__: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def test() -> None:
            raise AssertionError("a skipped test ran")

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


def settings(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function
