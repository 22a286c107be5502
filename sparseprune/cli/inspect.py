"""`sparseprune inspect`."""

from __future__ import annotations

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, Json, Model

__all__ = ["inspect"]


def inspect(model: Model, as_json: Json = False) -> None:
    """What MODEL is made of: its linear layers, their sparsity, pattern, format and size."""
    from sparseprune.io.inspection import inspect_model

    loaded, _ = files.load_any(model, DType.auto)
    report = inspect_model(loaded)
    console.out({"model": str(model), **report.to_dict()}, lambda: str(report), as_json)
