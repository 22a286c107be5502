"""`sparseprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import Batches, DType, DTypeOption, Exclude, Include, Json, Model, Policy

__all__ = ["prune"]


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made if missing.")],
    pattern: Annotated[str, typer.Option(help='"2:4", "4:8", any "N:M", or "unstructured".')] = "2:4",
    method: Annotated[
        str, typer.Option(help='How weights are chosen: "magnitude", "wanda", "wanda+swaps", ...')
    ] = "magnitude",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the weights to remove, for unstructured.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on, UTF-8.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    format: Annotated[str, typer.Option(help='"auto", "2:4" (any "N:M"), "bitmap" or "csr".')] = "auto",
    policy: Annotated[
        Policy,
        typer.Option(help="auto: swap the layers that get faster here; always: swap all, measure nothing."),
    ] = Policy.auto,
    batch: Batches = [1],  # noqa: B006, typer reads the default and never changes it
    include: Include = None,
    exclude: Exclude = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Prune the output head too.")] = False,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Prune MODEL, swap its layers for sparse ones, and write the result to the folder OUT."""
    from sparseprune.checkpoint import save
    from sparseprune.convert import sparsify
    from sparseprune.pruning.prune import prune as prune_model

    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if calibration is not None:
        from sparseprune.calibration import windows

        data = windows(files.read_text("--calibration", calibration), tokenizer, length, samples, seed)
    layers: dict[str, Any] = {"include": include or None, "exclude": exclude or None, "lm_head": lm_head}
    pruned = prune_model(loaded, pattern, method, sparsity, data, progress=True, **layers)
    converted = sparsify(loaded, format, policy.value, batch, progress=True, **layers)
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    result = {"pruned": pruned.to_dict(), "converted": converted.to_dict(), "saved": str(out)}
    footer = "\n".join(pruned.table().footer)
    console.out(result, lambda: f"{converted}\npruned by {pruned.method}: {footer}\nsaved in {out}", as_json)
