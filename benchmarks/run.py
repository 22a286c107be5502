"""Every number of docs/benchmarks.md from one run: prints the tables, writes JSON and a picture.

python benchmarks/run.py                       # about 8 minutes on 2 cores; leave the machine alone meanwhile
python benchmarks/run.py --quick               # a minute, one shape, for a look
python benchmarks/run.py --out docs/benchmarks.json
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import linears
import operations
import tables
import torch
import typer
from layers import SHAPES, Watch, describe, machine_record
from plot import draw
from results import to_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from targets import BATCHES, CASES


def main(
    quick: Annotated[bool, typer.Option(help="One shape, fewer batch sizes, short samples.")] = False,
    shapes: Annotated[str, typer.Option(help='Comma-separated "model" or "model:layer".')] = ",".join(SHAPES),
    formats: Annotated[
        str, typer.Option(help='Comma-separated starts of case names: "2:4,bitmap 50%,csr".')
    ] = "2:4,bitmap,csr",
    out: Annotated[Path | None, typer.Option(help="JSON file; the picture goes beside it as .png.")] = None,
    seconds: Annotated[float, typer.Option(help="For each shape, dtype and batch size.")] = 1.5,
) -> None:
    """Time sparse linears, masks and conversions against torch dense, torch.sparse and scipy."""
    batches = BATCHES
    if quick:
        seconds, batches = 0.3, (1, 8, 32, 128)
        shapes = "LLaMA-7B:qkvo" if shapes == ",".join(SHAPES) else shapes
    starts = [it.strip() for it in formats.split(",")]
    cases = [case for case in CASES if any(case.name.startswith(start) for start in starts)]
    if not cases:
        raise typer.BadParameter(
            f"formats: no case starts with any of {starts}; cases: {[c.name for c in CASES]}"
        )
    run = measure_all(cases, _layers(shapes), batches, seconds, min(1.0, seconds))
    for model in dict.fromkeys(it["model"] for it in run["linears"]):
        print(tables.details(run, model), "\n")
        print(tables.summary(run, model), "\n")
    for table in (tables.losses, tables.masks, tables.conversions, tables.sizes, tables.calls):
        print(table(run), "\n")
    print(describe(run["machine"]), tables.score(run), sep="\n")
    if out is not None:
        out.write_text(to_json(run))
        draw(run, out.with_suffix(".png"))


def measure_all(cases: list, layers: list[tuple[str, str]], batches: tuple[int, ...], linear_seconds: float,
                other_seconds: float) -> dict[str, Any]:  # fmt: skip
    """The whole record: {"machine", "started", "minutes", "linears", "masks", "conversions", "sizes", "calls"}."""
    torch.manual_seed(0)
    begin, watch = time.time(), Watch()
    groups = list(linears.groups(cases, layers))
    others = {"masks": operations.masks, "conversions": operations.conversions, "calls": operations.calls}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("machine", total=len(groups) * len(batches) + len(others) + 2)
        run: dict[str, Any] = {"machine": machine_record(), "linears": []}
        progress.advance(task)
        for model, layer, dtype, members in groups:
            progress.update(task, description=f"{model} {layer} {dtype}")
            cells = linears.measure(
                members, model, layer, dtype, batches, linear_seconds, run["machine"]["read_gb_s"]
            )
            for records in cells:
                run["linears"] += records
                progress.advance(task)
        for name, measure in others.items():
            progress.update(task, description=name)
            run[name] = measure(other_seconds)
            progress.advance(task)
        run["sizes"] = operations.sizes()
        progress.advance(task)
    run["linears"].sort(key=lambda it: [case.name for case in CASES].index(it["case"]))
    run["machine"]["others_cpu_share"] = watch.others()
    run["started"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime(begin)) + " UTC"
    run["minutes"] = round((time.time() - begin) / 60, 1)
    return run


def _layers(text: str) -> list[tuple[str, str]]:
    chosen = []
    for part in text.split(","):
        model, _, layer = part.strip().partition(":")
        if model not in SHAPES or (layer and layer not in SHAPES[model]):
            known = [f"{m}:{it}" for m, its in SHAPES.items() for it in its]
            raise typer.BadParameter(f"shapes: must be a model or one of {known}, got {part!r}")
        chosen += itertools.product([model], [layer] if layer else SHAPES[model])
    return chosen


if __name__ == "__main__":
    typer.run(main)
