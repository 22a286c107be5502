"""`sparseprune compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, DTypeOption, Json, Model, Out
from sparseprune.cli.windows import fitting
from sparseprune.compression.options import Compression
from sparseprune.options import Names

__all__ = ["compress"]


def compress(
    model: Model,
    out: Out,
    compression: Compression,
    layers: Names,
    calibration: Annotated[
        Path, typer.Option(help="Text file to solve and train on, UTF-8; all of it is read.")
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Make the dense MODEL fit into a budget of bytes, each weight in the form that costs it least, and write it to OUT.

    Zeros, bits and groups are chosen by measuring; then the model is trained through its codes towards what it was.
    """
    from sparseprune.calibration import token_ids, windows
    from sparseprune.compression.driver import compress as compress_model
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length

    text = files.text("--calibration", calibration)
    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    length = fitting(length, max_length(loaded))
    ids = token_ids(text, tokenizer)
    data = windows(ids, length=length, count=max(2, len(ids) // length), seed=seed)
    report = compress_model(
        loaded, **vars(compression), **vars(layers), calibration=data, seed=seed, progress=not as_json
    )
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    result = {"compressed": report.to_dict(), "saved": str(out)}
    console.out(result, lambda: f"{report}\nsaved in {out}", as_json)
