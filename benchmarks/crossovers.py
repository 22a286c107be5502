"""Is the plan right? Times every strategy that serves a weight and compares the best with csrc/cpu/ops/plan.cpp's choice.

python benchmarks/crossovers.py                                # the instruction set in force
python benchmarks/crossovers.py --isa all --formats "2:4" --dtypes bf16
python benchmarks/crossovers.py --shape 1536x576 --batches 16,20,24,28,32
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Annotated

import torch
import typer
from layers import DTYPES, Watch, copies_of, pruned_weight, take_turns

from sparseprune import isa, isas_available
from sparseprune.kernels import native
from sparseprune.kernels.packing import Packed
from sparseprune.report import Column, Table, track
from sparseprune.weights.format import Format
from sparseprune.weights.sparse_weight import SparseWeight

STRATEGIES = ("tile_rows", "tile_dense", "tile_batch", "tile_amx", "csr_gather", "csr_batch")
"""In the order of `enum class Strategy`."""

FORMATS = {
    "2:4": 0.5,
    "bitmap 50%": 0.5,
    "bitmap 70%": 0.7,
    "bitmap 90%": 0.9,
    "csr 90%": 0.9,
    "csr 95%": 0.95,
}


def main(
    level: Annotated[
        str, typer.Option("--isa", help='A level, "all" of this machine, or "" for the one in force.')
    ] = "",
    formats: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(FORMATS)}.")] = ",".join(
        FORMATS
    ),
    dtypes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(DTYPES)}.")] = "bf16,fp32",
    shape: Annotated[str, typer.Option(help="out x in.")] = "4096x4096",
    batches: Annotated[str, typer.Option()] = "1,2,4,8,16,24,32,48,64,96,128,256,512",
    seconds: Annotated[float, typer.Option(help="For each weight and batch size.")] = 0.4,
    tolerance: Annotated[
        float, typer.Option(help="A choice this much slower than the best is named.")
    ] = 0.05,
) -> None:
    """Time the strategies of each weight at each batch size against the plan's choice."""
    if level and level != isa():  # the level is chosen once a process
        arguments = ["--formats", formats, "--dtypes", dtypes, "--shape", shape, "--batches", batches,
                     "--seconds", str(seconds), "--tolerance", str(tolerance)]  # fmt: skip
        for name in isas_available() if level == "all" else [level]:
            environment = {**os.environ, "SPARSEPRUNE_ISA": name}
            subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)
        return
    watch = Watch()
    rows, cols = map(int, shape.split("x"))
    cells = [(dtype, form) for dtype in dtypes.split(",") for form in formats.split(",")]
    wrong = []
    for dtype, form in track(cells, f"{isa()}", enabled=sys.stderr.isatty()):
        kind, sparsity = Format.parse(form.split()[0]), FORMATS[form]
        weight = pruned_weight(rows, cols, DTYPES[dtype], kind, sparsity)
        packed = SparseWeight.from_dense(weight, kind).pack()
        copies = copies_of(weight.nbytes) - 1
        each = [packed, *(packed._replace(blob=packed.blob.clone()) for _ in range(copies))]
        del weight
        table, bad = _compare(
            f"{isa()}: {form} {dtype} {shape}", each, [int(it) for it in batches.split(",")], seconds, tolerance,
        )  # fmt: skip
        wrong += bad
        print(table, "\n", flush=True)
    if (others := watch.others()) is not None:
        print(f"others took {others:.1%} of the cores' time")
    print(f"{isa()}: {len(wrong)} choices more than {tolerance:.0%} slower than the best", *wrong, sep="\n  ")


def _compare(
    title: str, packed: list[Packed], batches: list[int], seconds: float,
    tolerance: float,
) -> tuple[Table, list[str]]:  # fmt: skip
    """A row a batch size, and a line for each choice that is not (nearly) the best."""
    _, rows, cols, packing = packed[0]
    dtype = packed[0].dtype
    serving = _serving(packed[0])
    columns: list[Column | str] = ["B", *(Column(f"{name} ms", ".3f") for name in serving)]
    columns += ["best", "plan", Column("plan over best", ".2f")]
    lines, wrong = [], []
    for batch in batches:
        x = torch.randn(batch, cols).to(dtype)
        samples = take_turns(
            {
                name: [
                    functools.partial(native.linear, x, blob, None, *how, STRATEGIES.index(name))
                    for blob, *how in packed
                ]
                for name in serving
            },
            seconds,
        )
        times = {name: it.median for name, it in samples.items()}
        best, plan = min(times, key=times.__getitem__), native.strategy(packed[0].blob, batch)
        ratio = times[plan] / times[best]
        lines.append((batch, *(it * 1e3 for it in times.values()), best, plan, ratio))
        if ratio > 1 + tolerance:
            wrong.append(f"{title} B={batch}: {plan} takes {ratio:.2f} of {best}")
    return Table(title, columns, lines), wrong


def _serving(packed: Packed) -> list[str]:
    """The strategies that take this weight at this level; the others say no."""
    blob, *how = packed
    x = torch.zeros(1, packed.cols, dtype=packed.dtype)
    names = []
    for index, name in enumerate(STRATEGIES):
        try:
            native.linear(x, blob, None, *how, index)
        except ValueError:
            continue
        names.append(name)
    return names


if __name__ == "__main__":
    typer.run(main)
