"""int8 and int4 weights: random ones, and what a linear over them is in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers.shapes import generator, mask
from torch import Tensor

from sparseprune.kernels import ops
from sparseprune.kernels.codes import dequantize, join_nibbles, layout_for, pack_codes
from sparseprune.kernels.packing import Packed, packing_code

KINDS = [
    ("quads", "int8"),
    ("quads", "int4"),
    ("quads", "int4_minimum"),
    ("octets", "int8"),
    ("octets", "int4"),
    ("bitquads", "int8"),
    ("bitquads", "int4"),
]
"""Layout on a CPU and encoding: dense codes, 2:4 ones, and those with zeros anywhere."""

FORMATS = {"quads": ("dense", 0, 0), "octets": ("nm", 2, 4), "bitquads": ("bitmap", 0, 0)}
"""What has such a layout: kind, n and m of a format."""

GPU_KINDS = [kind for kind in KINDS if kind[0] != "bitquads"]
"""Those that a GPU has kernels for, too."""


@dataclass(frozen=True)
class Codes:
    """A weight in codes; `dense` is what they stand for, exactly, in float64."""

    encoding: str
    layout: str
    codes: Tensor
    mask: Tensor | None
    scales: Tensor
    minimums: Tensor | None
    cols: int
    group: int

    def pack(self, dtype: torch.dtype, put: Callable[[Tensor], Tensor] = lambda x: x) -> Packed:
        """For the kernels in force, or of the device that `put` puts it on."""
        codes, mask, scales, minimums = (None if part is None else put(part) for part in self.parts)
        layout = layout_for(*FORMATS[self.layout], dtype, codes)
        packing = packing_code(layout, dtype, self.encoding, self.group, scales.dtype)
        return pack_codes(codes, mask, scales, minimums, self.cols, packing)

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.mask, self.scales, self.minimums

    @property
    def dense(self) -> Tensor:
        """float64 `[rows, cols]`: products of a code and a scale are exact in it, in float32 not always."""
        ones = None if self.minimums is None else torch.zeros_like(self.minimums)
        numbers = dequantize(
            self.encoding, self.codes, self.mask, torch.ones_like(self.scales), ones, self.cols, self.group
        ).double()
        spread = [
            part.double().repeat_interleave(self.group, 1)[:, : self.cols]
            for part in (self.scales, self.minimums)
            if part is not None
        ]
        return numbers * spread[0] + (spread[1] if len(spread) > 1 else 0)


def random_codes(
    kind: tuple[str, str],
    rows: int,
    cols: int,
    group: int,
    scale_dtype: torch.dtype = torch.float16,
    *,
    whole: bool = False,
    sparsity: str = "50%",
) -> Codes:
    """whole: scales and minimums are whole numbers, so that sums with whole inputs are exact in float32. sparsity: of
    `bitquads`, as for `helpers.shapes.mask`; `octets` are 2:4, `quads` dense."""
    layout, encoding = kind
    seed = generator(rows, cols, group)
    kept = None
    count = rows * cols
    if layout != "quads":
        there = mask(rows, cols, "2:4" if layout == "octets" else sparsity, seed)
        kept, count = ops.pack_mask(there), int(there.sum())
    if encoding == "int8":
        codes = torch.randint(-128, 128, (count,), dtype=torch.int8, generator=seed)
    else:
        codes = join_nibbles(torch.randint(0, 16, (count,), dtype=torch.uint8, generator=seed))
    groups = -(-cols // group)
    if whole:
        scales, minimums = (torch.randint(-limit, limit, (rows, groups), generator=seed) for limit in (4, 16))
    else:
        scales, minimums = (torch.randn(rows, groups, generator=seed) / size for size in (100, 1))
    least = minimums.to(scale_dtype) if "minimum" in encoding else None
    return Codes(encoding, layout, codes, kept, scales.to(scale_dtype), least, cols, group)


def assert_gpu_codes_linear(
    out: Tensor, x: Tensor, weight: Codes, bias: Tensor | None, what: str = ""
) -> None:
    """`out` is the linear over the inputs as they are: a GPU rounds none.

    A float32 sum of n products in any order is within gamma(n) times the sum of magnitudes of the exact one [Higham, section
    3.1]. n: the 32 columns that are summed before they are scaled, two roundings for each 32 that are scaled and added, and
    8 for bias, splits and the minimum that 8 scales were added to.
    """
    expected, dense = x.double() @ weight.dense.t(), weight.dense.abs()
    if weight.minimums is not None:  # codes less 8, and minimums with 8 scales more
        spread = (weight.minimums.double().abs() + 16 * weight.scales.double().abs()).repeat_interleave(
            weight.group, 1
        )
        dense = spread[:, : weight.cols]
    offset = 0.0 if bias is None else bias.double()
    n = 32 + 2 * -(-weight.cols // 32) + 8
    unit = torch.finfo(torch.float32).eps / 2
    sums = n * unit / (1 - n * unit) * (x.double().abs() @ dense.t() + abs(offset))
    info = torch.finfo(x.dtype)
    bound = sums + info.eps / 2 * ((expected + offset).abs() + sums) + info.smallest_normal * info.eps
    bad = ~((out.cpu().double() - expected - offset).abs() <= bound)
    assert not bool(bad.any()), (
        f"{what}: {int(bad.sum())} outside the bound, first at {bad.nonzero()[0].tolist()}"
    )


def rounded_input(x: Tensor, group: int) -> Tensor:
    """float64: x `[batch, cols]` as the kernels round it, to int8 by groups of 64 columns, or of 32 with such weights."""
    size = min(group, 64)
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).view(x.shape[0], -1, size)
    largest = padded.abs().amax(-1, keepdim=True)
    # A division: torch would make 127 / largest a product with the reciprocal, which is rounded twice.
    steps = torch.where(
        largest < 2.0**-119, 0.0, (padded * torch.full_like(largest, 127).div(largest)).round()
    )
    return (steps.double() * (largest * (1 / 127)).double()).flatten(1)[:, : x.shape[1]]


def assert_codes_linear(out: Tensor, x: Tensor, weight: Codes, bias: Tensor | None, what: str = "") -> None:
    """`out` is the linear over rounded inputs. Integer sums are exact; the bound counts float32's roundings of a scale's
    product, of each group's sum, and the rounding of the output."""
    rounded, dense = rounded_input(x, weight.group), weight.dense
    offset = 0.0 if bias is None else bias.double()
    expected = rounded @ dense.t() + offset
    size = rounded.abs() @ dense.abs().t() + abs(offset)
    if weight.minimums is not None:  # codes and minimums cancel
        spread = weight.minimums.double().abs().repeat_interleave(weight.group, 1)[:, : weight.cols]
        size = size + 2 * (rounded.abs() @ spread.t())
    info = torch.finfo(x.dtype)
    bound = 3e-6 * size + info.eps / 2 * expected.abs() + info.smallest_normal * info.eps
    bad = ~((out.double() - expected).abs() <= bound)
    assert not bool(bad.any()), (
        f"{what}: {int(bad.sum())} beyond the bound, first at {bad.nonzero()[0].tolist()}"
    )
