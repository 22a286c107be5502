"""Names that are imported when they are first used: torch takes seconds to import, and `--help` needs none of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package that shows what its modules define.

    Args:
        places: public name -> the module, relative to the package, that defines it; "module:" behind the name of a
            module that is itself what is shown.

    A package states the same names once more under `TYPE_CHECKING`, for type checkers; `tests/test_package.py` holds
    the two together.
    """

    def getattr_(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        path = places[name]
        module = import_module(f"{package}.{path.removesuffix(':')}")
        value = module if path.endswith(":") else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return getattr_, dir_
