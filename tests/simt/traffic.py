"""How well each kernel uses the memory system, as the emulator counts it; no GPU needed.

Bank conflicts: turns of shared memory a request, 1 at best. Sectors: the share of the 32-byte sectors of global memory that the
lanes asked for; more than 1 where lanes share what they read.

python tests/simt/traffic.py          # a Markdown table
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import backends  # noqa: E402
from helpers.codes import GPU_KINDS, random_codes  # noqa: E402

from sparseprune.kernels import ops  # noqa: E402
from sparseprune.kernels.packing import Packed  # noqa: E402

ROWS, COLS = 256, 2048
BATCHES = (1, 16, 40, 300)


@dataclass(frozen=True)
class Use:
    """Of one line of one kernel."""

    kernel: str
    line: str
    space: str  # "shared" or "global"
    requests: int
    mean: float  # shared: turns a request; global: bytes asked for by bytes of the sectors touched
    worst: int  # turns, sectors


def run_all() -> None:
    """Every operation once for each type, at an aligned shape."""
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(ROWS, COLS, generator=generator).to(dtype)
        mask = torch.rand(ROWS, COLS, generator=generator) < 0.5
        bits = ops.pack_mask(mask)
        ops.unpack_mask(bits, COLS)
        ops.mask_apply(dense, mask)
        ops.mask_apply_packed(dense, bits)
        pruned = dense.clone()
        ops.threshold_mask_(pruned, 0.7)
        ops.csr_to_dense(*ops.dense_to_csr(pruned), COLS)
        weights = {"bitmap8": ops.dense_to_bitmap(pruned)}
        ops.bitmap_to_dense(*weights["bitmap8"], COLS)
        if dtype != torch.float32:
            order = dense.view(ROWS, -1, 4).abs().argsort(-1).argsort(-1)
            two_of_four = (dense.view(ROWS, -1, 4) * (order >= 2)).view(ROWS, COLS)
            weights["sparse24"] = ops.dense_to_nm(two_of_four, 2, 4)
        for layout, (values, kept) in weights.items():
            packed = ops.pack(values, kept, COLS, layout)
            ops.unpack(packed)
            run_linears(packed, generator)
    for kind in GPU_KINDS:
        for group in (32, 64):
            run_linears(random_codes(kind, ROWS, COLS, group).pack(torch.bfloat16), torch.Generator())


def run_linears(packed: Packed, generator: torch.Generator) -> None:
    for batch in BATCHES:
        ops.linear(torch.randn(batch, COLS, generator=generator).to(packed.dtype), packed)


def uses(report: list[dict[str, Any]]) -> Iterator[Use]:
    for kernel in report:
        for line, t in kernel["shared"].items():
            yield Use(kernel["kernel"], line, "shared", t["requests"], t["turns"] / t["requests"], t["worst"])
        for line, t in kernel["global"].items():
            share = t["bytes"] / (32 * t["sectors"])
            yield Use(kernel["kernel"], line, "global", t["requests"], share, t["worst"])


def measure() -> list[Use]:
    with backends.emulated() as emulator:
        emulator.clear_report()
        emulator.set_counted_blocks(8)
        try:
            run_all()
        finally:
            emulator.set_counted_blocks(1)
        return list(uses(emulator.report()))


def main() -> None:
    print("| kernel | line | memory | requests | turns, or share of sectors | worst |")
    print("|---|---|---|---|---|---|")
    for use in measure():
        print(f"| {use.kernel} | {use.line} | {use.space} | {use.requests} | {use.mean:.2f} | {use.worst} |")


if __name__ == "__main__":
    main()
