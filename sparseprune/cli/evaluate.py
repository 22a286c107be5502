"""`sparseprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, DTypeOption, Json, Model

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file to read, UTF-8.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens read at a time.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows [default: no overlap].")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Read the first so many windows only.")
    ] = None,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text, with the protocol that makes it comparable."""
    from sparseprune.evaluate import perplexity
    from sparseprune.report import Column, Table

    content = files.read_text("--text", text)
    loaded, tokenizer = files.load_any(model, dtype)
    if tokenizer is None:
        raise ValueError(
            f"MODEL: must have a tokenizer to read a text, {model} has none; copy its files there"
        )
    result = perplexity(loaded, tokenizer, content, window, max_windows, stride, text.name, progress=True)
    rows = [(str(model), result.value, result.tokens)]
    table = Table("Perplexity", ["model", Column("perplexity", ".3f"), "tokens"], rows, [result.protocol])
    console.out({"model": str(model), **result.to_dict()}, table.render, as_json)
