"""`sparseprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprune.cli import console, files
from sparseprune.cli import stream as streaming
from sparseprune.cli.options import Batches, DType, DTypeOption, Exclude, Include, Json, Model, Policy

__all__ = ["prune"]


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made if missing.")],
    pattern: Annotated[
        str,
        typer.Option(help='"2:4", any "N:M", blocks such as "16x1", "unstructured".'),
    ] = "2:4",
    method: Annotated[
        str,
        typer.Option(
            help='"magnitude", "wanda", "ria", "sparsegpt", "admm", ..., with "+swaps" or "+least-squares" behind it or '
            'not; "auto": the best recipe for the time. All but magnitude and random need --calibration.'
        ),
    ] = "magnitude",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the weights to remove; N:M implies it.")
    ] = None,
    allocation: Annotated[
        list[str] | None,
        typer.Option(
            help='How much each layer loses: "uniform", "global", "std", "owl", "sensitivity" or "search"; or LAYERS=VALUE, '
            'a shell pattern and a sparsity or pattern, such as "*.down_proj=0.4" or "*.q_proj=dense" (repeatable).'
        ),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="With --allocation search: bytes of the packed layers together.")
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(
            help="With --allocation search: milliseconds of all layers at the first --batch, measured here."
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help='What unstructured ranks together: "row" or "layer" [default: the method\'s].'),
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            help="Take a block's inputs from the blocks pruned before it [default: if the method changes weights]."
        ),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Train each block towards the dense one's outputs.")
    ] = False,
    schedule: Annotated[
        str | None,
        typer.Option(
            help='"gradual" or "greedy": many small steps, judged by the first tenth of --calibration [default: one step].'
        ),
    ] = None,
    recover_steps: Annotated[
        int,
        typer.Option(
            min=0, help="With --schedule: steps of distillation after each, on the rest of --calibration."
        ),
    ] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="How long the pruning may take, where it can do with less.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on, UTF-8.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 512,
    seed: Annotated[
        int, typer.Option(help="Of all that is drawn: calibration windows, a search's steps.")
    ] = 0,
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
    from sparseprune.processes import join
    from sparseprune.pruning.prune import prune as prune_model

    given = _allocation(allocation, max_bytes, max_ms, batch[0])
    _check(
        pattern,
        method,
        sparsity,
        minutes=minutes,
        schedule=schedule,
        allocation=given,
        text=calibration,
        needs_text=reconstruct or schedule is not None,
    )
    if recover_steps and schedule is None:
        raise ValueError(
            "--recover-steps: must come with --schedule; or run `sparseprune recover` afterwards"
        )
    layers: dict[str, Any] = {"include": include or None, "exclude": exclude or None}
    if streaming.wanted(model, stream, memory, spill):
        streaming.prune_streamed(
            model, out, pattern, method, None if calibration is None else (calibration, length, samples, seed),
            dtype, memory, as_json, {"--lm-head": lm_head, "--reconstruct": reconstruct, "--minutes": minutes is not None,
             "--schedule": schedule is not None},
            sparsity=sparsity, allocation=given or "uniform", scope=scope, sequential=sequential, format=format,
            spill=spill, **layers,
        )  # fmt: skip
        return
    files.check_out(model, out)
    first = join(torch.device("cpu")).first  # under torchrun: calibration is shared out, one process writes
    asked: dict[str, Any] = {
        "allocation": given,
        "scope": scope,
        "sequential": sequential,
        "reconstruction": reconstruct or None,
        "minutes": minutes,
    }
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if calibration is not None:
        from sparseprune.models.modules import max_length

        data = streaming.calibration_data(calibration, tokenizer, length, samples, seed, max_length(loaded))
    if schedule is not None:
        from sparseprune.cli.schedule import callbacks

        asked |= callbacks(schedule, recover_steps, calibration, loaded, tokenizer, length, seed)
    layers["lm_head"] = lm_head
    asked = {name: value for name, value in asked.items() if value is not None}
    pruned = prune_model(
        loaded,
        pattern,
        method,
        sparsity=sparsity,
        calibration=data,
        seed=seed,
        progress=first,
        **layers,
        **asked,
    )
    if not first:
        return
    result: dict[str, Any] = {"pruned": pruned.to_dict(), "saved": str(out)}
    converted = sparsify(loaded, format, policy=policy.value, batch=batch, progress=True, **layers)
    result["converted"] = converted.to_dict()
    footer = "\n".join(pruned.table().footer)
    steps = [] if pruned.schedule is None else [str(pruned.schedule)]
    lines = [str(converted), *steps, f"pruned by {pruned.method}: {footer}"]
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out(result, lambda: "\n".join([*lines, f"saved in {out}"]), as_json)


def _check(
    pattern: str,
    method: str,
    sparsity: float | None,
    *,
    minutes: float | None,
    schedule: str | None,
    allocation: Any,
    text: Path | None,
    needs_text: bool,
) -> None:
    """What can be wrong before a model is loaded."""
    from sparseprune.pruning.allocation import ALLOCATIONS
    from sparseprune.pruning.methods import find_method
    from sparseprune.pruning.patterns import Pattern
    from sparseprune.pruning.scheduled import find_schedule

    Pattern.parse(pattern).resolve_sparsity(sparsity)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    if schedule is not None:
        find_schedule(schedule)
    if isinstance(allocation, str) and allocation != "uniform" and allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation: must be one of uniform, {', '.join(sorted(ALLOCATIONS))}, or LAYERS=VALUE, got {allocation!r}"
        )
    reads = method == "auto" or find_method(method).statistic is not None
    if (reads or needs_text) and text is None:
        who = "--reconstruct or --schedule" if needs_text else f"method {method}"
        raise ValueError(f"calibration: {who} needs a text, got none; pass --calibration FILE")
    files.check_text("--calibration", text)


def _allocation(
    given: list[str] | None, max_bytes: int | None, max_ms: float | None, batch: int
) -> Any | None:
    """A name, a `Search` with a budget, or a mapping from LAYERS=VALUE entries."""
    if max_bytes is not None or max_ms is not None:
        if given != ["search"]:
            raise ValueError("--max-bytes, --max-ms: must come with --allocation search")
        from sparseprune.pruning.allocation import Search

        return Search(bytes=max_bytes, seconds=None if max_ms is None else max_ms / 1000, batch=batch)
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    mapping: dict[str, float | str] = {}
    for entry in given:
        layers, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"--allocation: must be one name, or LAYERS=VALUE entries only, got {entry!r}")
        try:
            mapping[layers] = float(value)
        except ValueError:
            mapping[layers] = value
    return mapping
