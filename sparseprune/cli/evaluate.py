"""`sparseprune eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, DTypeOption, Json, Model, Typed
from sparseprune.report import Column, Table

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    typed: Typed,
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
    from sparseprune.measure.evaluate import check_windows

    if text is None and not tasks:
        raise ValueError("--text: must be given, or --tasks; pass a text file to read")
    if text is None:
        of_text = ("reference", "layers", "calibration", "window", "stride", "max_windows")
        typed.refuse(*of_text, rule="must come with --text; pass a text file to read, or leave this out")
    if not tasks:
        typed.refuse("limit", "task_folder", rule="must come with --tasks; name a task, or leave this out")
    if reference is None:
        typed.refuse("layers", rule="must come with --reference; pass the dense model, or leave this out")
    check_windows(window, max_windows, stride)
    content, calibrated = files.text("--text", text), files.text("--calibration", calibration)
    files.check_dense(reference, "--reference")
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


@dataclass(frozen=True)
class _Read:
    """A model that has read the text; the last three against the dense one, None where there is none."""

    model: str
    perplexity: float
    tokens: int
    ratio: float | None = None
    kl: float | None = None
    agreement: float | None = None


_COLUMNS = (
    Column("model", value=lambda it: it.model),
    Column("perplexity", ".3f", lambda it: it.perplexity),
    Column("ratio", ".3f", lambda it: it.ratio, optional=True),
    Column("KL", ".4f", lambda it: it.kl, optional=True),
    Column("top-1 agreement", ".1%", lambda it: it.agreement, optional=True),
    Column("tokens", value=lambda it: it.tokens),
)


def _on_text(
    model: Any, dense: Any, arguments: dict[str, Any], name: str, dense_name: str, layers: bool
) -> tuple[dict[str, Any], list[str]]:
    """(JSON, tables) of what a text tells; `arguments` as `perplexity` takes them."""
    from sparseprune.measure.evaluate import perplexity

    if dense is None:
        result = perplexity(model, **arguments, progress=True)
        footer = [result.protocol, *([result.warning] if result.warning else [])]
        rows = [_Read(name, result.value, result.tokens)]
        return result.to_dict(), [Table.of("Perplexity", _COLUMNS, rows, footer).render()]
    from sparseprune.measure.fidelity import fidelity, layer_errors

    compared = fidelity(model, dense, **arguments, progress=True)
    ours, theirs = compared.model, compared.reference
    rows = [
        _Read(name, ours.value, ours.tokens, ours.value / theirs.value, compared.kl, compared.agreement),
        _Read(dense_name, theirs.value, theirs.tokens, 1.0, 0.0, 1.0),
    ]
    footer = [compared.protocol, *([ours.warning] if ours.warning else [])]
    data = {**ours.to_dict(), "fidelity": compared.to_dict()}
    tables = [Table.of("Against the dense model", _COLUMNS, rows, footer).render()]
    if layers:
        from sparseprune.measure.evaluate import Windows

        pieces = Windows.of(model, **arguments)
        errors = layer_errors(model, dense, [piece for _, piece, _ in pieces], progress=True)
        data["layers"] = errors.to_dict()
        tables.append(errors.table().render())
    return data, tables
