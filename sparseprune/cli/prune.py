"""`sparseprune prune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparseprune.cli import console, files
from sparseprune.cli import stream as streaming
from sparseprune.cli.options import Calibration, DType, DTypeOption, Json, Model, Out, Typed
from sparseprune.cli.windows import calibration_data, fitting
from sparseprune.options import Layers, Windowing
from sparseprune.pruning.options import Recipe
from sparseprune.report import Report
from sparseprune.weights.options import Conversion

__all__ = ["prune"]


def prune(
    model: Model,
    out: Out,
    recipe: Recipe,
    windowing: Windowing,
    layers: Layers,
    conversion: Conversion,
    typed: Typed,
    calibration: Calibration = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="With --allocation search: bytes of the packed layers together.")
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(
            help="With --allocation search: milliseconds of all layers at the first --batch, measured here."
        ),
    ] = None,
    recover_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --schedule: steps of distillation after each, on the rest of --calibration."
        ),
    ] = None,
    quantize: Annotated[
        Literal["int4", "int8"] | None,
        typer.Option(
            help="Values of 4 or 8 bits: codes of the N:M or the bitmap that a layer was pruned to, or dense ones where these take "
            "fewer bytes; gptq where there is --calibration and 4 bits."
        ),
    ] = None,
    dtype: DTypeOption = DType.auto,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read and write a Hugging Face folder block by block, never all of it; goes on where it was killed. "
            "[default: if the weights take more than half of the memory]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help='With --stream: what the program may take, "1.5GB"; the rest goes to the disk.'),
    ] = None,
    spill: Annotated[
        Path | None, typer.Option(help="With --stream: folder for hidden states [default: in OUT].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune MODEL, swap its layers for sparse ones, and write the result to the folder OUT."""
    import torch

    from sparseprune.convert import sparsify
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.processes import join
    from sparseprune.pruning import prune as prune_model
    from sparseprune.quantization import quantize as quantize_model

    recipe = _with_budget(recipe, max_bytes, max_ms, conversion.batches[0])
    scheduled = recipe.schedule != "one-shot"
    to_codes = quantize == "int4"  # by gptq; 8 bits lose nothing that it would win back
    windowed = calibration is not None and (recipe.reads_calibration or to_codes)
    if not scheduled:
        recipe.check_calibration(calibration is not None and (recipe.reads_calibration or not to_codes))
    elif calibration is None:
        raise ValueError(
            f"--calibration: --schedule {recipe.schedule} goes by a loss on text, got none; pass --calibration FILE"
        )
    _check_typed(typed, recipe, calibration is not None, windowed, recover_steps)
    if quantize is not None:
        plain = ("format", "policy", "seconds", *(() if max_ms else ("batch",)))
        typed.refuse(*plain, rule=f"is for plain values, --quantize is {quantize}; leave one of the two out")
    text = files.text("--calibration", calibration)
    if streaming.wanted(model, stream, memory, spill):
        typed.refuse(
            "quantize", rule="a streamed pruning writes plain values; leave it out, or pass --no-stream"
        )
        if conversion.policy == "auto":
            typed.refuse(
                "policy",
                rule="a streamed pruning measures nothing, got auto; leave it out, or pass --no-stream",
            )
        streaming.prune_streamed(
            model, out, recipe, windowing, layers,
            text=text, conversion=conversion, dtype=dtype, memory=memory, spill=spill, as_json=as_json,
        )  # fmt: skip
        return
    files.check_out(model, out)
    first = join(torch.device("cpu")).first  # under torchrun: calibration is shared out, one process writes
    loaded, tokenizer = files.load_dense(model, dtype)
    limit = max_length(loaded)
    steps: dict[str, Any] = {}
    if scheduled and text is not None:
        from sparseprune.cli.schedule import callbacks

        windowing = replace(windowing, length=fitting(windowing.length, limit))
        steps = callbacks(recover_steps or 0, text, loaded, tokenizer, windowing.length, recipe.seed)
    data = None
    if text is not None and windowed:
        data = calibration_data(text, tokenizer, windowing, recipe.seed, limit)
    pruned = prune_model(
        loaded,
        **vars(recipe),
        **vars(layers),
        calibration=data if recipe.reads_calibration else None,
        progress=first,
        **steps,
    )
    if not first:
        return
    result: dict[str, Any] = {"pruned": pruned.to_dict(), "saved": str(out)}
    converted: Report
    if quantize is None:
        converted = sparsify(loaded, **vars(conversion), **vars(layers), progress=True)
    else:
        converted = quantize_model(
            loaded, quantize, calibration=data if to_codes else None, progress=True, **vars(layers)
        )
    result["converted"] = converted.to_dict()
    footer = "\n".join(pruned.table().footer)
    report = [] if pruned.schedule is None else [str(pruned.schedule)]
    lines = [str(converted), *report, f"pruned by {pruned.method}: {footer}"]
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out(result, lambda: "\n".join([*lines, f"saved in {out}"]), as_json)


def _check_typed(
    typed: Typed, recipe: Recipe, calibrated: bool, windowed: bool, recover_steps: int | None
) -> None:
    """That no option was typed that nothing reads; `windowed`: calibration windows are cut."""
    if recipe.schedule == "one-shot":
        typed.refuse(
            "recover_steps",
            rule="must come with --schedule; add one, or leave this out and run `sparseprune recover` afterwards",
        )
    if not calibrated:
        typed.refuse("count", "length", rule="must come with --calibration; add it, or leave this out")
    if not windowed:
        typed.refuse("count", rule=f"method {recipe.method} reads no calibration windows; leave it out")
    if not (windowed or recover_steps or str(recipe.method).startswith("random")):
        typed.refuse("seed", rule=f"method {recipe.method} draws nothing at random here; leave it out")


def _with_budget(recipe: Recipe, max_bytes: int | None, max_ms: float | None, batch: int) -> Recipe:
    """The recipe, whose search has a budget of bytes or milliseconds where one is given."""
    if max_bytes is None and max_ms is None:
        return recipe
    if recipe.allocation != "search":
        raise ValueError(
            "--max-bytes, --max-ms: must come with --allocation search; add it, or leave this out"
        )
    if max_bytes is not None and max_ms is not None:
        raise ValueError("--max-bytes, --max-ms: one budget at a time, got both; leave one out")
    from sparseprune.pruning.allocation import Search

    seconds = None if max_ms is None else max_ms / 1000
    return replace(
        recipe, allocation=Search(bytes=max_bytes, seconds=seconds, batch=batch if seconds else None)
    )
