"""docs/cuda-static.md: the tables."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import chips
from cubins import Kernel
from cuda_build import ROOT, Build, Launch, compile_seconds, worst

Kernels = dict[tuple[str, str], Kernel]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kernel_table(kernels: Kernels, launches: list[Launch], names: dict[str, str]) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}  # what is equal for several dtypes stands in one line
    launched = sorted({launch.kernel for launch in launches}, key=lambda mangled: names[mangled])
    for mangled in launched:
        threads, shared = worst(launches, mangled)
        name, _, dtype = names[mangled].rpartition(" ")
        if dtype not in ("float32", "bfloat16", "float16"):
            name, dtype = names[mangled], ""
        row = [f"`{name}`", str(threads), f"{shared / 1024:.1f}".removesuffix(".0")]
        for arch in chips.ARCHITECTURES:
            held = chips.occupancy(arch, threads, kernels[arch, mangled].registers, shared)
            row.append(f"{kernels[arch, mangled].registers}, {held.share:.0%}")
        for instruction in ("HMMA.SP", "HMMA", "LDGSTS.128", "LDSM", "LDG.128", "STG.128"):
            counts = sorted(
                {kernels[arch, mangled].instructions[instruction] for arch in chips.ARCHITECTURES}
            )
            row.append(str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}")
        rows.setdefault(tuple(row), []).append(dtype)
    lines = [[f"{row[0]} {', '.join(dtypes)}".strip(), *row[1:]] for row, dtypes in rows.items()]
    head = ["kernel", "threads", "shared KB", *(f"sm_{arch}" for arch in chips.ARCHITECTURES)]
    return table(head + ["HMMA.SP", "HMMA", "LDGSTS .128", "LDSM", "LDG .128", "STG .128"], lines)


def time_text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


Floors = dict[str, tuple[str, str, Callable[[int, int, int], chips.Work]]]
"""By heading: the operation, what its configurations' names begin with, and the work of (rows, cols, batch)."""

PLAIN: Floors = {
    "2:4": ("linear_sparse24", "n", chips.sparse24_linear),
    "bitmap": ("linear_bitmap8", "n", functools.partial(chips.bitmap8_linear, kept=0.5)),
}
CODES: Floors = {
    f"{form}int{bits}": (
        "linear_fragments",
        f"{form}int{bits} n",
        functools.partial(chips.codes_linear, bits=bits, two_four=bool(form)),
    )
    for bits in (4, 8)
    for form in ("", "2:4 ")
}


def linear_table(card: chips.Card, launches: list[Launch], floors: Floors) -> str:
    """Floors of the linears at the shapes that were planned for this card, against dense on the same card."""
    rows = []
    planned = [
        launch
        for launch in launches
        if launch.multiprocessors == card.multiprocessors and launch.dtype == "bfloat16"
    ]
    shapes = dict.fromkeys((launch.rows, launch.cols, launch.batch) for launch in planned)
    for out, cols, batch in shapes:
        dense = chips.floor_seconds(card, chips.dense_linear(out, cols, batch))
        row = [f"{out} x {cols}", str(batch), time_text(dense)]
        for op, begins, work_of in floors.values():
            work = work_of(out, cols, batch)
            calls = [
                x
                for x in planned
                if (x.op, x.rows, x.cols, x.batch) == (op, out, cols, batch) and x.config.startswith(begins)
            ]
            main = max(calls, key=lambda launch: launch.threads * launch.shared)
            floor = chips.floor_seconds(card, work)
            blocks = main.grid[0] * main.grid[1] * main.grid[2]
            row += [
                time_text(floor),
                f"{dense / floor:.2f}",
                chips.bound(card, work),
                f"{main.config.rpartition(' ')[2]}, {main.splits}",
                str(blocks),
            ]
        rows.append(row)
    each = ["floor, us", "x dense", "bound by", "plan, splits", "blocks"]
    head = ["layer", "batch", "dense, us", *(f"{form} {name}" for form in floors for name in each)]
    return table(head, rows)


def conversion_table() -> str:
    """Floors of what moves memory and computes nothing: a 4096 x 4096 bfloat16 matrix, half of it zeros."""
    n = 4096 * 4096
    dense, bits, csr = 2 * n, n // 8, n // 2 * (2 + 4)
    moved = {
        "mask (bool)": 2 * dense + n,
        "mask (bits)": 2 * dense + bits,
        "threshold to mask and weight": 2 * dense + bits,
        "dense to CSR, given offsets": dense + csr,
        "CSR to dense": csr + dense,
        "dense to 2:4": dense + dense // 2 + bits,
        "2:4 to dense": dense // 2 + bits + dense,
        "dense to bitmap, given the index": dense + bits + dense // 2,
        "bitmap to dense": bits + dense // 2 + dense,
    }
    rows = [
        [
            name,
            f"{size / 1e6:.1f}",
            *(time_text(chips.floor_seconds(card, chips.Work(size))) for card in chips.CARDS),
        ]
        for name, size in moved.items()
    ]
    return table(["operation", "MB moved", *(f"{card.name}, us" for card in chips.CARDS)], rows)


def build_table(build: Build) -> str:
    """The wheels that `make wheels` left in dist/.

    Raises:
        FileNotFoundError: where there are none.
    """
    rows = []
    for kind in ("cpu", "cuda"):
        facts = json.loads((ROOT / "dist" / kind / "wheel.json").read_text())
        sizes = [f"{facts[key] / 1e6:.1f}" for key in ("bytes", "library_bytes")]
        rows.append([f"`{facts['wheel']}`", *sizes, ", ".join(facts["architectures"]) or "none"])
    seconds = compile_seconds((build.folder / ".ninja_log").read_text())
    kernels = sum(time for output, time in seconds.items() if "sparseprune_cuda.dir" in output)
    slowest = max(seconds, key=lambda output: seconds[output])
    return (
        table(["wheel", "MB", "library, MB", "GPU code"], rows)
        + f"\n\nCompiling takes one core {kernels:.0f} s for the CUDA part, {sum(seconds.values()) - kernels:.0f} s for the rest; "
        f"the longest file, {Path(slowest).stem}, {seconds[slowest]:.0f} s."
    )


def page(
    build: Build, kernels: Kernels, launches: list[Launch], names: dict[str, str], wrong: list[str]
) -> str:
    instances = len({mangled for _, mangled in kernels})
    cards = "\n\n".join(
        f"### {card.name}\n\n{linear_table(card, launches, PLAIN)}\n\n{linear_table(card, launches, CODES)}"
        for card in chips.CARDS
    )
    verdict = "".join(f"\n  - {line}" for line in wrong) or " none."
    return f"""# CUDA kernels: what is known without a GPU

Made by `python scripts/cuda_evidence.py` from the machine code that nvcc {build.version} built. **Nothing on this page
was measured on a GPU**: registers and instructions are read from the code, occupancy and floors are computed.

- {instances} kernels, each for {", ".join("sm_" + arch for arch in chips.ARCHITECTURES)}.
- Local memory (spills, arrays indexed at run time), kernels without the instructions that they are built on, launches that
  an architecture refuses:{verdict}

## Builds

{build_table(build)}

## Kernels

Under an architecture: registers a thread, and the share of a multiprocessor's warps that its registers, shared memory and
places for blocks hold at once. Threads and shared memory are those of the largest launch that was recorded. The instruction
columns count what stands in the code, not what runs: sparse and dense tensor-core products, asynchronous copies of 16
bytes, `ldmatrix`, loads and stores of 16 bytes.

{kernel_table(kernels, launches, names)}

## Floors

Each operand once over the card's memory bandwidth, or the operations over its peak rate (data sheets, boost clock, tensor
cores with float32 sums), whichever is longer. No kernel is faster than its floor; a small launch adds some microseconds
that are not in it. 2:4 counts at the sparse peak, the bitmap at the dense one: it feeds zeros to dense tensor cores, so it
can win only where memory is the limit. On the H100 the peak is that of `wgmma`; `mma.sp`, which these kernels use, does not
reach it, so large batches there stay above the floor.

The bitmap's columns are for half of the weights pruned, codes are in groups of 64. `plan` names the kernel that `plan_linear`
chooses for the card.

{cards}

## Masks and conversions, 4096 x 4096, bfloat16

{conversion_table()}
"""
