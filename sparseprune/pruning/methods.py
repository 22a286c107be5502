"""The methods by name. A new one is a file beside this one, and its line here."""

from __future__ import annotations

from sparseprune.pruning.base import Method
from sparseprune.pruning.magnitude import MAGNITUDE
from sparseprune.pruning.wanda import WANDA

__all__ = ["METHODS", "find_method"]

METHODS: dict[str, Method] = {method.name: method for method in (MAGNITUDE, WANDA)}


def find_method(method: str | Method) -> Method:
    """The method of that name; one given as such, registered or not, passes through."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(sorted(METHODS))}, got {method!r}")
    return METHODS[method]
