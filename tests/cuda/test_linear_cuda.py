"""What only a GPU's linear has: configurations, splits and their plan, sizes that stand for shapes. Emulated, and on a real
one. The grid that it shares with the CPU is in test_linear.py.
"""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from helpers import simt
from helpers.backends import GPUS, place_of, running
from helpers.compare import assert_same_bits, product
from helpers.isa import DTYPES
from helpers.kernels import GPU_KERNELS, Kernel, gpu_linear
from helpers.shapes import fits, generator, mask, sparse_layer, whole

from sparseprune.kernels import cuda, ops
from sparseprune.kernels.packing import packing_code

gpu_kernels = pytest.mark.parametrize("kernel", GPU_KERNELS, ids=str, indirect=True)


@pytest.fixture
def kernel(request):
    with running(request.param.place):
        yield request.param


def tile(name: str) -> tuple[int, int]:
    """(rows, batch rows) of a block of threads, from a configuration's name."""
    found = re.match(r"n(\d+)_m(\d+)", name)
    assert found, name
    return int(found[2]), int(found[1])


def case(kernel: Kernel, rows: int, cols: int, batch: int):
    seed = generator(rows, cols, batch)
    w = kernel.hold(whole(rows, cols, limit=4, seed=seed) * mask(rows, cols, "50%", seed)).to(kernel.dtype)
    x = whole(batch, cols, limit=8, seed=seed).to(kernel.dtype)
    return x, w, whole(rows, limit=64, seed=seed).to(kernel.dtype)


def assert_exact(kernel: Kernel, x, w, bias, forced, what: str) -> None:
    put = kernel.at.put
    out = gpu_linear(put(x), kernel.pack(w), None if bias is None else put(bias), forced)
    assert_same_bits(out, product(x, w, bias).to(kernel.dtype), what)


@gpu_kernels
def test_every_configuration_around_its_tile(kernel):
    for config, name in enumerate(kernel.configs()):
        m, n = tile(name)
        for rows, batch, cols in [
            (m, n, 64), (m - 1, n - 1, 60), (m + 1, n + 1, 68), (2 * m + 3, 1, 128), (1, 2 * n + 1, 196),
        ]:  # fmt: skip
            if batch:
                x, w, bias = case(kernel, rows, cols, batch)
                assert_exact(kernel, x, w, bias, (config, 1), f"{name}: {rows}x{cols}, batch {batch}")


@gpu_kernels
def test_every_configuration_with_every_number_of_splits(kernel):
    # More blocks of columns than a ring has stages, so that it turns; and numbers that splits do not divide.
    for config, name in enumerate(kernel.configs()):
        for blocks in (1, 2, 5, 11):
            x, w, bias = case(kernel, 33, blocks * 64 - 4, 9)
            for splits in {1, 2, 3, 4, blocks - 1, blocks} - {0}:
                if splits <= blocks:
                    what = f"{name}: {blocks} blocks of columns, {splits} splits"
                    assert_exact(kernel, x, w, bias if splits % 2 else None, (config, splits), what)


@gpu_kernels
def test_every_configuration_on_any_alignment(kernel):
    """Rows of x that begin at any element of 16 bytes, and a bias that does."""
    x, w, bias = case(kernel, 20, 132, 5)
    for config, name in enumerate(kernel.configs()):
        for offset in range(8):
            for stride in (132, 132 + 4, 132 + 8, 132 + 1 + offset):
                base = torch.full((5 * stride + 8,), torch.nan, dtype=kernel.dtype)
                view = base.as_strided((5, 132), (stride, 1), offset)
                view.copy_(x)
                shifted = torch.cat([bias.new_zeros(offset), bias])[offset:]
                what = f"{name}: offset {offset}, stride {stride}"
                assert_exact(kernel, view, w, shifted, (config, 1 + offset % 3), what)


@contextmanager
def emulated_card(multiprocessors: int):
    with running("emulated"):
        kernels = simt.module()
        kernels.set_sm_count(multiprocessors)
        cuda.plan.cache_clear()
        try:
            yield kernels
        finally:
            kernels.set_sm_count(8)
            cuda.plan.cache_clear()


@pytest.mark.parametrize("multiprocessors", [1, 8, 108, 132, 170])
def test_plan_on_any_emulated_card_and_shape(multiprocessors):
    with emulated_card(multiprocessors) as kernels:
        for dtype in DTYPES:
            for layout in cuda.LAYOUTS:
                if not fits(layout, dtype):
                    continue
                packing = packing_code(layout, dtype)
                names = kernels.configs(packing)
                assert len(names) == len(set(names)) >= 2
                chosen = set()
                for rows, cols in [
                    (1, 1),
                    (31, 100),
                    (4096, 4096),
                    (4096, 11008),
                    (11008, 4096),
                    (32000, 4096),
                    (0, 64),
                    (64, 0),
                ]:
                    for batch in (0, 1, 2, 8, 9, 16, 17, 64, 100, 256, 512, 4096):
                        plan = kernels.plan(0, packing, rows, cols, batch)
                        config, splits, workspace = plan
                        assert 0 <= config < len(names) and 1 <= splits <= max(1, -(-cols // 64)), plan
                        assert workspace == (4 * splits * batch * rows if splits > 1 else 0)
                        chosen.add(config)
                assert len(chosen) >= 2, "the batch decides"


@gpu_kernels
def test_plan_that_is_chosen_is_the_one_that_runs(kernel):
    for batch in (1, 8, 33):
        x, w, bias = case(kernel, 40, 700, batch)
        packed, put = kernel.pack(w), kernel.at.put
        plan = cuda.plan(put(x).get_device(), packed.packing, 40, 700, batch)
        out = gpu_linear(put(x), packed, put(bias))
        assert_same_bits(out, gpu_linear(put(x), packed, put(bias), plan[:2]).cpu(), f"batch {batch}")


@pytest.mark.slow
@gpu_kernels
@pytest.mark.parametrize(("rows", "batch"), [(70001, 1), (3, 8 * 65536 + 5)])
def test_more_tiles_than_a_dimension_of_the_grid_has(kernel, rows, batch):
    x, w, bias = case(kernel, rows, 4, batch)
    assert_exact(kernel, x, w, bias, (0, 1), f"{rows} rows, batch {batch}")


# --- what is refused --------------------------------------------------------------------------------------------------


@gpu_kernels
def test_call_of_another_shape_or_dtype_is_refused(kernel):
    _, w, _ = case(kernel, 17, 40, 1)
    packed, put = kernel.pack(w), kernel.at.put
    for rows, cols in [(400, 40), (17, 650), (490, 17), (0, 40)]:
        x, other = put(torch.ones(2, cols, dtype=kernel.dtype)), packed._replace(rows=rows, cols=cols)
        with pytest.raises(ValueError, match=rf"packed: holds no weight of {rows}x{cols} \w+ in layout"):
            gpu_linear(x, other)
        with pytest.raises(ValueError, match=rf"packed: holds no weight of {rows}x{cols}"):
            torch.ops.sparseprune.linear_grad_input(put(torch.ones(2, rows, dtype=kernel.dtype)), *other)
    with pytest.raises(ValueError, match="input: must have 40 columns"):
        gpu_linear(put(torch.ones(2, 41, dtype=kernel.dtype)), packed)
    with pytest.raises(TypeError, match="input: dtype must be the weight's"):
        ops.linear(put(torch.ones(2, 40, dtype=torch.float64)), packed)


@gpu_kernels
def test_configuration_and_splits_out_of_range_are_refused(kernel):
    x, w, _ = case(kernel, 17, 200, 1)
    packed, x = kernel.pack(w), kernel.at.put(x)
    for forced, message in [
        ((-1, 1), r"config: must be in \[0, \d+\), got -1"),
        ((len(kernel.configs()), 1), "config: must be in"),
        ((0, 0), r"splits: must be in \[1, 4\] for 200 columns, got 0"),
        ((0, 5), r"splits: must be in \[1, 4\] for 200 columns, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            gpu_linear(x, packed, None, forced)


@pytest.mark.parametrize("gpu", GPUS)
def test_blobs_of_the_other_processor_are_refused(gpu):
    w, _, values, bits = sparse_layer(torch.bfloat16)
    x = torch.ones(2, 36, dtype=torch.bfloat16)
    with running("cpu"):
        of_cpu = [ops.pack(values, bits, 36, layout) for layout in ("tile", "csr")]
    with running(gpu):
        put = place_of(gpu).put
        of_gpu = [ops.pack(put(values), put(bits), 36, layout) for layout in ("sparse24", "bitmap8")]
        for blob in of_cpu:
            blob = blob._replace(blob=put(blob.blob))
            with pytest.raises(
                ValueError, match="packed: .* move the layer with .to.device., not its buffer alone"
            ):
                ops.linear(put(x), blob)
            with pytest.raises(ValueError, match="packed: holds a weight packed for the CPU; move the layer"):
                ops.unpack(blob)
    with running("cpu"):
        for blob in of_gpu:
            blob = blob._replace(blob=blob.blob.cpu())
            for call in (lambda b=blob: ops.linear(x, b), lambda b=blob: ops.unpack(b)):
                with pytest.raises(
                    ValueError, match="packed: holds a weight packed for CUDA; move the layer"
                ):
                    call()


@gpu_kernels
def test_every_flipped_bit_of_a_header_is_found(kernel):
    _, w, _ = case(kernel, 20, 36, 1)
    good = kernel.pack(w)
    for bit in range(8 * 64):
        blob = good.blob.cpu().clone()
        blob[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="packed: "):
            ops.unpack(good._replace(blob=kernel.at.put(blob)))


@gpu_kernels
def test_truncated_extended_and_shifted_blobs_are_refused(kernel):
    x, w, _ = case(kernel, 20, 36, 2)
    packed, put = kernel.pack(w), kernel.at.put
    good = packed.blob.cpu()
    grad = torch.ones(2, 20, dtype=kernel.dtype)
    sizes = [0, 1, 8, 63, 64, 65, 128, len(good) // 2, len(good) - 64, len(good) - 1]
    for bad in [*(good[:size].clone() for size in sizes), torch.cat([good, good[:1]])]:
        readers = [
            lambda b: ops.unpack(b),
            lambda b: ops.linear(put(x), b),
            lambda b: torch.ops.sparseprune.linear_grad_input(put(grad), *b),
        ]
        if kernel.layout == "bitmap8" and len(bad) % 64 == 0 and len(bad) >= len(good) // 2:
            readers = readers[:1]  # a weight of fewer values has this size: the header alone knows
        for read in readers:
            with pytest.raises(ValueError, match="packed: "):
                read(packed._replace(blob=put(bad)))
    shifted = packed._replace(blob=put(torch.cat([good[:1], good]))[1:])
    with pytest.raises(ValueError, match="packed: must begin at a multiple of 16 bytes"):
        ops.linear(put(x), shifted)


@pytest.mark.parametrize("gpu", GPUS)
def test_what_a_layout_cannot_hold_is_refused(gpu):
    with running(gpu) as place:
        values, bits = (place.put(t) for t in sparse_layer(torch.bfloat16)[2:])
        for layout in ("tile", "csr", "coo"):
            with pytest.raises(
                ValueError, match=rf"layout: must be one of \['sparse24', 'bitmap8'\] on .*, got '{layout}'"
            ):
                ops.pack(values, bits, 36, layout)
        with pytest.raises(TypeError, match="values: must be bfloat16 or float16 for the layout 'sparse24'"):
            ops.pack(values.float(), bits, 36, "sparse24")
        dense = place.put(torch.zeros(40, 36, dtype=torch.bfloat16))
        dense[:, ::2] = 1
        dense[33, 9] = 1
        more = ops.dense_to_bitmap(dense)
        with pytest.raises(ValueError, match="row 33 keeps 3 in columns 8 to 11; use 'bitmap8'"):
            ops.pack(*more, 36, "sparse24")
        dense[33, 8:10] = 0
        with pytest.raises(ValueError, match="row 33 keeps 1 in columns 8 to 11; use 'bitmap8'"):
            ops.pack(*ops.dense_to_bitmap(dense), 36, "sparse24")
        with pytest.raises(
            ValueError, match="cols: must be a multiple of 4 for the layout 'sparse24', got 34"
        ):
            ops.pack(*ops.dense_to_bitmap(dense[:, :34]), 34, "sparse24")
