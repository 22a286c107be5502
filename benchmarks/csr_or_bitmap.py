"""Up to which density is CSR worth a try? Times it against the bitmap; `sparseprune/weights/choose.py` has the answer.

python benchmarks/csr_or_bitmap.py                  # the instruction set in force
SPARSEPRUNE_ISA=avx2 python benchmarks/csr_or_bitmap.py
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from layers import DTYPES, Watch, pruned_weight

from sparseprune import isa
from sparseprune.measure.benchmark import time_layer
from sparseprune.report import Column, Table, track


def main(
    shapes: Annotated[str, typer.Option(help="Each out x in.")] = "1536x576,4096x4096",
    dtypes: Annotated[str, typer.Option()] = "bf16,fp32",
    densities: Annotated[str, typer.Option()] = "0.05,0.1,0.2,0.3,0.35,0.4,0.45,0.5",
    batches: Annotated[str, typer.Option()] = "1,8,64",
    seconds: Annotated[float, typer.Option(help="For each weight.")] = 0.9,
) -> None:
    """Bitmap time over CSR time: above 1 CSR is the faster."""
    watch = Watch()
    sizes = [int(it) for it in batches.split(",")]
    cells = [
        (dtype, shape, float(density))
        for dtype in dtypes.split(",")
        for shape in shapes.split(",")
        for density in densities.split(",")
    ]
    rows = []
    for dtype, shape, density in track(cells, isa(), enabled=sys.stderr.isatty()):
        out, inner = map(int, shape.split("x"))
        linear = torch.nn.Linear(inner, out, bias=False, device="meta")
        weight = pruned_weight(out, inner, DTYPES[dtype], "csr", 1 - density)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        timings = time_layer(linear, ["bitmap", "csr"], sizes, seconds=seconds)
        rows.append(
            (
                dtype,
                shape,
                density,
                *(it.sparse_seconds["bitmap"] / it.sparse_seconds["csr"] for it in timings),
            )
        )
    columns: list[Column | str] = ["dtype", "shape", Column("density", ".2f")]
    columns += [Column(f"batch {size}", ".2f") for size in sizes]
    footer = [f"{torch.get_num_threads()} threads"]
    if (others := watch.others()) is not None:
        footer.append(f"others took {others:.1%} of the cores' time")
    print(Table(f"{isa()}: bitmap time over CSR time", columns, rows, footer))


if __name__ == "__main__":
    typer.run(main)
