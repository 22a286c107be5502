"""What is measured, in the order of its value: a run that is cut has the cells that matter most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES: dict[str, tuple[int, int]] = {"qkvo": (4096, 4096), "gate/up": (11008, 4096), "down": (4096, 11008)}
"""The linears of LLaMA-7B, [out, in]."""

DRY_SHAPES = {"small": (64, 128)}

FIRST_BATCHES = (1, 16, 64, 256, 1024, 4096)
OTHER_BATCHES = (2, 4, 8, 32, 128, 512, 2048)
DECODE_BATCHES = (1, 4, 16)
CHOICE_BATCHES = (1, 16, 64, 256, 1024)
CODES_BATCHES = (1, 16, 64, 256)
CODES = ("dense int4", "2:4 int4", "dense int8", "2:4 int8")


@dataclass(frozen=True)
class Cell:
    """One measurement: a linear (kind "linear"), or all configurations of its kernel (kind "choice"), by layer, format and
    batch; or an operation on a square matrix."""

    kind: str  # linear, choice, mask, conversion
    dtype: str
    layer: str = ""
    form: str = "2:4"  # a format, with an encoding behind it for codes
    sparsity: float = 0.5
    batch: int = 0

    @property
    def name(self) -> str:
        if not self.layer:
            return f"{self.kind} {self.dtype} {self.sparsity:.0%}"
        return f"{self.kind} {self.layer} {self.form} {self.dtype} batch {self.batch}"


def cells(shapes: Sequence[str]) -> list[Cell]:
    """All of them; those of one weight lie together, because making it costs as much as timing it."""

    def linears(
        batches: Sequence[int], dtype: str = "bf16", form: str = "2:4", kind: str = "linear"
    ) -> list[Cell]:
        return [
            Cell(kind, dtype, layer, form, 0.5, batch) for layer, batch in itertools.product(shapes, batches)
        ]

    masks = [Cell("mask", dtype) for dtype in ("bf16", "fp32", "fp16")]
    conversions = [
        Cell("conversion", dtype, sparsity=sparsity)
        for dtype, sparsity in (("fp32", 0.9), ("bf16", 0.5), ("fp32", 0.5), ("bf16", 0.9))
    ]
    return [
        *linears(FIRST_BATCHES),
        *masks,
        *conversions,
        *(cell for form in CODES for cell in linears(CODES_BATCHES, form=form)),
        *linears(OTHER_BATCHES),
        *linears(DECODE_BATCHES, form="bitmap"),
        *linears((1, 16, 256, 4096), dtype="fp16"),
        *linears((1, 16), dtype="fp32"),
        *linears(CHOICE_BATCHES, kind="choice"),
        *linears(DECODE_BATCHES, form="bitmap", kind="choice"),
        *linears(CODES_BATCHES, form="dense int4", kind="choice"),
        *linears(DECODE_BATCHES, form="2:4 int4", kind="choice"),
        *linears(DECODE_BATCHES, form="dense int4_minimum"),
    ]


def dry_cells() -> list[Cell]:
    """One of each kind, small enough for a CPU."""
    return [
        Cell("linear", "bf16", "small", batch=1),
        Cell("linear", "bf16", "small", batch=33),
        Cell("linear", "bf16", "small", form="bitmap", batch=1),
        Cell("linear", "bf16", "small", form="2:4 int4", batch=33),
        Cell("mask", "bf16"),
        Cell("conversion", "fp32", sparsity=0.9),
    ]
