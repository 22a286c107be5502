"""`sparseprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, DTypeOption, Json, Model

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file to read, UTF-8.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="The dense model: adds KL to it and top-1 agreement, on the same tokens."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="With --reference: the output error of each block and layer.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text that the model was calibrated on: warns where --text has some of it. Folders of ours know theirs."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Zero-shot task of lm-eval, such as hellaswag (repeatable).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First so many questions of each task only.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
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
    """Perplexity of MODEL on a text with the protocol that makes it comparable; how far it is from the dense model."""
    if text is None and not tasks:
        raise ValueError("--text: must be given, or --tasks; pass a text file to read")
    if text is None and (reference is not None or calibration is not None):
        raise ValueError("--reference, --calibration: must come with --text; pass a text file to read")
    if not tasks and (limit is not None or task_folder is not None):
        raise ValueError("--limit, --task-folder: must come with --tasks; name a task, or leave them out")
    if layers and reference is None:
        raise ValueError("--layers: must come with --reference; pass the dense model")
    files.check_text("--text", text)
    files.check_text("--calibration", calibration)
    content = None if text is None else files.read_text("--text", text)
    calibrated = None if calibration is None else files.read_text("--calibration", calibration)
    loaded, tokenizer = files.load_any(model, dtype)
    if tokenizer is None:
        raise ValueError(
            f"MODEL: must have a tokenizer to read a text, {model} has none; copy its files there"
        )
    data: dict[str, Any] = {"model": str(model)}
    shown = []
    if content is not None and text is not None:
        if calibrated is not None:
            _note(loaded, tokenizer, calibrated)
        dense = None if reference is None else files.load_dense(reference, dtype, "--reference")[0]
        arguments = {
            "tokenizer": tokenizer, "text": content, "window": window, "max_windows": max_windows,
            "stride": stride, "text_name": text.name,
        }  # fmt: skip
        found, tables = _on_text(loaded, dense, arguments, str(model), str(reference), layers)
        data |= found
        shown += tables
    if tasks:
        from sparseprune.measure.tasks import zero_shot

        scores = zero_shot(loaded, tokenizer, tasks, limit=limit, folder=task_folder)
        data["tasks"] = scores.to_dict()
        shown.append(str(scores))
    console.out(data, lambda: "\n\n".join(shown), as_json)


def _note(model: Any, tokenizer: Any, text: str) -> None:
    from sparseprune.calibration import token_ids
    from sparseprune.statistics.overlap import remember

    remember(model, [token_ids(text, tokenizer).unsqueeze(0)])


def _on_text(
    model: Any, dense: Any, arguments: dict[str, Any], name: str, dense_name: str, layers: bool
) -> tuple[dict[str, Any], list[str]]:
    """(JSON, tables) of what a text tells; `arguments` as `perplexity` takes them."""
    from sparseprune.measure.evaluate import perplexity
    from sparseprune.report import Column, Table

    if dense is None:
        result = perplexity(model, **arguments, progress=True)
        rows: list[Any] = [(name, result.value, result.tokens)]
        columns: list[Any] = ["model", Column("perplexity", ".3f"), "tokens"]
        footer = [result.protocol, *([result.warning] if result.warning else [])]
        return result.to_dict(), [Table("Perplexity", columns, rows, footer).render()]
    from sparseprune.measure.fidelity import fidelity, layer_errors

    compared = fidelity(model, dense, **arguments, progress=True)
    ours, theirs = compared.model, compared.reference
    rows = [
        (name, ours.value, ours.value / theirs.value, compared.kl, compared.agreement, ours.tokens),
        (dense_name, theirs.value, 1.0, 0.0, 1.0, theirs.tokens),
    ]
    columns = [
        "model", Column("perplexity", ".3f"), Column("ratio", ".3f"), Column("KL", ".4f"),
        Column("top-1 agreement", ".1%"), "tokens",
    ]  # fmt: skip
    footer = [compared.protocol, *([ours.warning] if ours.warning else [])]
    data = {**ours.to_dict(), "fidelity": compared.to_dict()}
    tables = [Table("Against the dense model", columns, rows, footer).render()]
    if layers:
        from sparseprune.measure.evaluate import Windows

        pieces = Windows.of(model, **arguments)
        errors = layer_errors(model, dense, [piece for _, piece, _ in pieces], progress=True)
        data["layers"] = errors.to_dict()
        tables.append(errors.table().render())
    return data, tables
