"""`sparseprune bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import Batches, DType, DTypeOption, Json, Model

__all__ = ["bench"]


def bench(
    model: Model,
    batch: Batches = [1, 8, 64, 512],  # noqa: B006, as above
    format: Annotated[
        str, typer.Option(help='Format to time dense layers in: "auto", "N:M", "bitmap", "csr".')
    ] = "auto",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on the layers, about.")] = 20.0,
    tokens: Annotated[bool, typer.Option(help="Also measure tokens per second of the whole model.")] = True,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Time each kind of layer of MODEL, dense against sparse, and the model's tokens per second."""
    from sparseprune.measure.benchmark import time_model

    loaded, _ = files.load_any(model, dtype)
    report = time_model(loaded, format, batch=batch, seconds=seconds, tokens=tokens, progress=True)
    console.out({"model": str(model), **report.to_dict()}, lambda: str(report), as_json)
