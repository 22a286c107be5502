"""What the broken kernels of mutants.py are run on: cases by name, on CPU tensors under `backends.emulated`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from helpers import reference
from helpers.codes import random_codes
from helpers.compare import assert_same_bits, product
from helpers.shapes import arranged, generator, mask, raw, whole

from sparseprune.kernels import cuda, ops
from sparseprune.kernels.codes import dequantize, lookup, unpack_codes
from sparseprune.kernels.packing import packing_code


def codes_linear(
    kind: tuple[str, str], config: int, shapes: Sequence[tuple[int, int, int, int, int, str]]
) -> None:
    for turn, (rows, cols, group, batch, splits, arrangement) in enumerate(shapes):
        random = generator(rows, cols, batch)
        weight = random_codes(kind, rows, cols, group, (torch.float16, torch.bfloat16)[turn % 2], whole=True)
        packed = weight.pack(torch.bfloat16)
        x = arranged(whole(batch, cols, limit=8, seed=random).bfloat16(), arrangement)
        out = cuda.linear(x, packed.blob, None, *packed[1:], (config, splits))
        what = f"{rows}x{cols}, groups of {group}, batch {batch}, splits {splits}, {arrangement} input"
        assert_same_bits(out, (x.double() @ weight.dense.t()).bfloat16(), what)


def codes_n8(kind: tuple[str, str]) -> None:
    codes_linear(kind, 0, [
        (32, 2816, 64, 8, 1, "contiguous"), (40, 1100, 32, 3, 1, "contiguous"), (17, 196, 128, 1, 1, "offset"),
        (33, 700, 32, 9, 2, "wide rows"), (64, 3072, 128, 8, 1, "contiguous"),
    ])  # fmt: skip


def codes_n64() -> None:
    codes_linear(
        ("quads", "int4"), 2, [(128, 640, 64, 64, 1, "contiguous"), (40, 576, 32, 70, 2, "contiguous")]
    )


def codes() -> None:
    for layout, encoding in [("quads", "int4_minimum"), ("octets", "int4"), ("octets", "int8")]:
        for rows, cols, group in [(33, 28, 32), (5, 92, 32), (64, 132, 64), (31, 196, 128)]:
            cols -= layout == "quads"
            weight = random_codes((layout, encoding), rows, cols, group)
            packed = weight.pack(torch.bfloat16)
            what = f"{encoding} {rows}x{cols}, groups of {group}"
            for got, part in zip(unpack_codes(packed), weight.parts, strict=True):
                if got is not None and part is not None:
                    assert_same_bits(got, part, what)
            if layout == "quads":
                dense = dequantize(encoding, *weight.parts, cols, group).bfloat16()
                every = torch.arange(rows)
                assert_same_bits(lookup(packed, every), dense, f"lookup in {what}")
                assert bool(lookup(packed, torch.tensor([rows + 64])).isnan().all())


def linear(
    layout: str,
    config: str,
    shapes: Sequence[tuple[int, int, int, int, str]],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Whole numbers, exact in float32: one weight dropped, doubled or misplaced shows."""
    index = cuda.configs(packing_code(layout, dtype)).index(config)
    for rows, cols, batch, splits, kind in shapes:
        random = generator(rows, cols, batch)
        keep = mask(rows, cols, "2:4" if layout == "sparse24" else "50%", random)
        weight = (whole(rows, cols, limit=4, seed=random) * keep).to(dtype)
        canonical = ops.dense_to_nm(weight, 2, 4) if layout == "sparse24" else ops.dense_to_bitmap(weight)
        packed = ops.pack(*canonical, cols, layout)
        x = arranged(whole(batch, cols, limit=8, seed=random).to(dtype), kind)
        bias = whole(rows, limit=64, seed=random).to(dtype)
        out = cuda.linear(x, packed.blob, bias, *packed[1:], (index, splits))
        what = f"{rows}x{cols}, batch {batch}, splits {splits}, {kind} input"
        assert_same_bits(out, product(x, weight, bias).to(dtype), what)


def n8() -> None:
    linear("sparse24", "n8_m32_k8", [
        (64, 1024, 8, 1, "contiguous"), (40, 1100, 3, 1, "contiguous"), (32, 512, 1, 1, "offset"),
        (42, 200, 9, 1, "wide rows"), (40, 200, 3, 1, "contiguous"), (40, 200, 3, 1, "contiguous"), (34, 1280, 5, 2, "contiguous"),
        (64, 1280, 16, 3, "transposed"),
    ])  # fmt: skip


def n64() -> None:
    linear("sparse24", "n64_m64", [
        (64, 640, 64, 1, "contiguous"), (40, 576, 70, 1, "contiguous"), (90, 100, 33, 1, "offset"),
        (96, 832, 20, 2, "contiguous"),
    ])  # fmt: skip


def bitmap8() -> None:
    linear("bitmap8", "n8_m16_k8", [
        (16, 1280, 8, 1, "contiguous"), (40, 1100, 3, 1, "contiguous"), (17, 77, 1, 1, "offset"),
        (33, 700, 9, 2, "wide rows"),
    ])  # fmt: skip


def f32() -> None:
    shapes = [(16, 1280, 2, 1, "contiguous"), (40, 333, 3, 2, "offset")]
    linear("bitmap8", "n2_m16_k8", shapes, torch.float32)


def matrices() -> list[torch.Tensor]:
    shapes = [(3, 7), (1, 300), (9, 33), (5, 1025), (8, 512), (2, 2700)]
    return [
        raw(rows, cols, dtype, 0.5, generator(rows, cols))
        for rows, cols in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]


def masks() -> None:
    for x in matrices():
        keep = torch.rand(x.shape, generator=generator(1, *x.shape)) < 0.5
        for kept in (keep, torch.zeros_like(keep)):
            bits = ops.pack_mask(kept)
            assert_same_bits(bits, reference.pack_mask(kept), f"pack_mask {tuple(x.shape)}")
            assert_same_bits(ops.unpack_mask(bits, x.shape[1]), kept, f"unpack_mask {tuple(x.shape)}")
            expected = reference.mask_apply(x, kept)
            assert_same_bits(ops.mask_apply(x, kept), expected, f"mask_apply {tuple(x.shape)}")
            assert_same_bits(ops.mask_apply_packed(x, bits), expected, f"mask_apply_packed {tuple(x.shape)}")
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        expected, expected_bits = reference.threshold_mask(x, 0.5)
        assert_same_bits(
            ops.threshold_mask_(shifted, 0.5), expected_bits, f"bits of threshold_mask {tuple(x.shape)}"
        )
        assert_same_bits(shifted, expected, f"threshold_mask {tuple(x.shape)}")
    # No magnitude is below: all are kept, and nothing past the row's end.
    x = torch.ones(3, 13)
    assert_same_bits(ops.threshold_mask_(x, 0.0), reference.threshold_mask(x, 0.0)[1], "threshold 0")


def conversions() -> None:
    for x in matrices():
        what = str(tuple(x.shape))
        for actual, expected in zip(ops.dense_to_csr(x), reference.dense_to_csr(x), strict=True):
            assert_same_bits(actual, expected, f"dense_to_csr {what}")
        for actual, expected in zip(ops.dense_to_bitmap(x), reference.dense_to_bitmap(x), strict=True):
            assert_same_bits(actual, expected, f"dense_to_bitmap {what}")
        restored = reference.mask_apply(x, x != 0)
        crow, col, values = reference.dense_to_csr(x)
        assert_same_bits(ops.csr_to_dense(crow, col, values, x.shape[1]), restored, f"csr_to_dense {what}")
        bits = reference.pack_mask(x != 0)
        assert_same_bits(ops.bitmap_to_dense(values, bits, x.shape[1]), restored, f"bitmap_to_dense {what}")


_KINDS = {
    "int4": ("quads", "int4"),
    "int8": ("quads", "int8"),
    "minimum": ("quads", "int4_minimum"),
    "int4 2:4": ("octets", "int4"),
}
CASES: dict[str, Callable[[], None]] = {
    "n8": n8,
    "n64": n64,
    "bitmap8": bitmap8,
    "f32": f32,
    "masks": masks,
    "conversions": conversions,
    "int4 n64": codes_n64,
    "codes": codes,
    **{of: functools.partial(codes_n8, kind) for of, kind in _KINDS.items()},
}
