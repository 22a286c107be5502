"""`sparseprune recover`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import DType, Json, Model, Out, Typed
from sparseprune.cli.windows import fitting
from sparseprune.options import Layers
from sparseprune.recovery.options import Budget, Checkpointing, Training
from sparseprune.recovery.terms import Distillation
from sparseprune.weights.options import Conversion

__all__ = ["recover"]


def recover(
    model: Model,
    out: Out,
    budget: Budget,
    distillation: Distillation,
    training: Training,
    layers: Layers,
    conversion: Conversion,
    typed: Typed,
    text: Annotated[Path, typer.Option(help="Text file to learn from, UTF-8.")],
    teacher: Annotated[
        Path | None,
        typer.Option(help="The dense model, to distill from [default: learn from the text alone]."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for the state of the run; a killed run goes on from it.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Other text, to measure perplexity before and after.")
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="With --dev: and every so many steps.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of the windows.")] = 0,
    as_json: Json = False,
) -> None:
    """Train the pruned MODEL around its zeros, towards the dense TEACHER, and write the result to the folder OUT.

    Runs on several processes under torchrun or accelerate; --windows is theirs together.
    """
    from sparseprune.convert import sparsify
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.recovery import TokenStream, to_dense
    from sparseprune.recovery import recover as recover_model

    files.check_out(model, out)
    content, held_out = files.text("--text", text), files.text("--dev", dev)
    if teacher is None:
        typed.refuse("temperature", rule="must come with --teacher; add it, or leave this out")
    distillation.terms(teacher is not None)
    if dev is None:
        typed.refuse(
            "evaluate_every", rule="must come with --dev; pass a text file to read, or leave this out"
        )
    files.check_dense(teacher, "--teacher")
    kept = Checkpointing.of(checkpoint)
    loaded, tokenizer = files.load_any(model, DType.auto)
    if tokenizer is None:
        raise ValueError(
            f"MODEL: must have a tokenizer to read a text, {model} has none; copy its files there"
        )
    dense = None if teacher is None else files.load_dense(teacher, DType.auto, "--teacher")[0]
    limit = max_length(loaded)
    data = TokenStream(content, tokenizer, fitting(length, limit))
    report = recover_model(
        to_dense(loaded),
        data,
        teacher=dense,
        **vars(budget),
        distillation=distillation,
        training=training,
        **vars(layers),
        evaluate=None
        if dev is None or held_out is None
        else _perplexity(held_out, dev.name, tokenizer, limit),
        evaluate_every=evaluate_every,
        checkpoint=kept,
        seed=seed,
        progress=True,
    )
    if int(os.environ.get("RANK", "0")):
        return  # only the first of several processes writes
    converted = sparsify(loaded, **vars(conversion), **vars(layers), progress=True)
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    result = {"recovered": report.to_dict(), "converted": converted.to_dict(), "saved": str(out)}
    console.out(result, lambda: f"{converted}\n{report}\nsaved in {out}", as_json)


def _perplexity(text: str, name: str, tokenizer: Any, limit: int | None) -> Callable[[Any], float]:
    from sparseprune.measure.evaluate import perplexity

    window = 1024 if limit is None else min(1024, limit)
    return lambda model: (
        perplexity(model, tokenizer, text, window=window, max_windows=16, text_name=name).value
    )
