"""The operations against their plain-torch twins (helpers/reference.py), bit for bit, on every instruction set and on the
GPU's kernels, emulated and real. What torch asks of an operation is in test_library.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import reference
from helpers.backends import GPUS, LAYOUTS, Place, running
from helpers.compare import assert_linear, assert_same_bits
from helpers.isa import DTYPES, LEVELS
from helpers.shapes import fits, generator, mask, packable, packed_layer, raw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseprune.kernels import ops
from sparseprune.kernels.packing import packing_code

SIZES = [(0, 0), (0, 9), (5, 0), (1, 1), (3, 7), (2, 8), (7, 15), (3, 16), (5, 17), (4, 31), (3, 32), (9, 33)]
SIZES += [
    (2, 63),
    (5, 64),
    (3, 65),
    (8, 97),
    (33, 129),
    (3, 1025),
    (130, 300),
    (64, 255),
    (17, 256),
    (16, 257),
    (1, 5000),
]
PATTERNS = [(1, 1), (1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (3, 7), (5, 12), (16, 32), (1, 32), (32, 32)]
# Every set of kernels with each layout that it reads, and that holds the dtype.
PACKINGS = [(name, layout) for name in [*LEVELS, *GPUS] for layout in LAYOUTS.get(name, LAYOUTS["cpu"])]
PACKINGS = [(*packing, dtype) for packing in PACKINGS for dtype in DTYPES if fits(packing[1], dtype)]
PACKING_IDS = [f"{name}-{layout}-{str(dtype)[6:]}" for name, layout, dtype in PACKINGS]


@pytest.fixture
def at(packing):
    with running(packing[0]) as place:
        yield place


every_packing = pytest.mark.parametrize("packing", PACKINGS, ids=PACKING_IDS)


def samples(dtype: torch.dtype):
    """Matrices of random bits (NaN, infinities, subnormals, both zeros) of every size, three densities in turn."""
    for i, (rows, cols) in enumerate(SIZES):
        yield raw(rows, cols, dtype, (0.5, 0.1, 1.0)[i % 3], generator(rows, cols))
        if rows * cols > 1000:
            yield raw(rows, cols, dtype, 0.0, generator(rows, cols))


def assert_tuples(actual, expected, what: str) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"{what}, result {i}")


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_apply(level, dtype):
    for x in samples(dtype):
        keep = torch.rand(x.shape, generator=generator(1, *x.shape)) < 0.4
        for m in (keep, torch.zeros_like(keep), torch.ones_like(keep)):
            expected = reference.mask_apply(x, m)
            there, kept = level.put(x), level.put(m)
            assert_same_bits(ops.mask_apply(there, kept), expected, str(x.shape))
            assert_same_bits(ops.mask_apply_packed(there, ops.pack_mask(kept)), expected, str(x.shape))
            changed = there.clone()
            assert ops.mask_apply_(changed, kept) is None
            assert_same_bits(changed, expected, str(x.shape))
            changed = there.clone()
            assert ops.mask_apply_packed_(changed, ops.pack_mask(kept)) is None
            assert_same_bits(changed, expected, str(x.shape))


@pytest.mark.parametrize("shape", [(), (1,), (20000,), (3, 5, 7), (2, 0, 3), (2, 3, 5, 1, 7)])
def test_mask_apply_of_any_dimensions(place, shape):
    x = torch.randn(shape, generator=generator(2))
    keep = torch.rand(shape, generator=generator(3)) < 0.5
    assert_same_bits(ops.mask_apply(place.put(x), place.put(keep)), reference.mask_apply(x, keep))
    changed = place.put(x).clone()
    ops.mask_apply_(changed, place.put(keep))
    assert_same_bits(changed, reference.mask_apply(x, keep))


def test_any_non_zero_mask_byte_keeps(level):
    """A bool tensor viewed from bytes may hold more than 0 and 1."""
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 256)
    keep = bytes_.view(torch.bool)
    for dtype in DTYPES:
        x = torch.ones(3, 256, dtype=dtype)
        assert_same_bits(ops.mask_apply(level.put(x), level.put(keep)), (bytes_ != 0).to(dtype))
    assert_same_bits(ops.pack_mask(level.put(keep)), reference.pack_mask(bytes_ != 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1e-40, 0.1, 0.5, 1.0, 65504.0, math.inf])
def test_threshold_mask(level, dtype, threshold):
    for x in samples(dtype):
        x = torch.cat([x, torch.randn(x.shape, generator=generator(4, *x.shape)).to(dtype)], 1)
        if x.numel():
            x[0, -1], x[-1, 0] = torch.tensor(threshold).to(dtype), torch.tensor(-threshold).to(dtype)
        expected, expected_bits = reference.threshold_mask(x, threshold)
        there = level.put(x).clone()
        bits = ops.threshold_mask_(there, threshold)
        assert_tuples((there, bits), (expected, expected_bits), str(x.shape))


def test_mask_bits_round_trip(place):
    for rows, cols in SIZES:
        keep = torch.rand(rows, cols, generator=generator(rows, cols)) < 0.5
        bits = ops.pack_mask(place.put(keep))
        assert_same_bits(bits, reference.pack_mask(keep))
        assert_same_bits(ops.unpack_mask(bits, cols), keep)
        assert_same_bits(reference.unpack_mask(bits.cpu(), cols), keep)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmap(level, dtype):
    for x in samples(dtype):
        values, bits = ops.dense_to_bitmap(level.put(x))
        assert_tuples((values, bits), reference.dense_to_bitmap(x), str(x.shape))
        restored = reference.mask_apply(x, x != 0)  # -0.0 comes back as +0.0
        assert_same_bits(ops.bitmap_to_dense(values, bits, x.shape[1]), restored, str(x.shape))
        assert_same_bits(
            reference.bitmap_to_dense(values.cpu(), bits.cpu(), x.shape[1]), restored, str(x.shape)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda v: str(v))
def test_nm(level, dtype, n, m):
    for rows, groups in [(0, 3), (3, 0), (1, 1), (5, 3), (33, 9), (2, 40)]:
        for sparsity in (f"{n}:{m}", "zero"):
            seed = generator(rows, groups)
            keep = mask(rows, groups * m, sparsity, seed) & (
                torch.rand(rows, groups * m, generator=seed) < 0.8
            )
            dense = torch.where(
                keep, raw(rows, groups * m, dtype, 1.0, seed), torch.tensor(-0.0, dtype=dtype)
            )
            values, bits = ops.dense_to_nm(level.put(dense), n, m)
            what = f"{rows}x{groups * m} {sparsity}"
            assert_tuples((values, bits), reference.dense_to_nm(dense, n, m), what)
            assert values.numel() == rows * groups * n
            back = ops.bitmap_to_dense(values, bits, groups * m).cpu()
            assert_same_bits(back, reference.bitmap_to_dense(values.cpu(), bits.cpu(), groups * m), what)
            assert torch.equal(back != 0, dense != 0), what
            assert_same_bits(back[dense != 0], dense[dense != 0], what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_csr(level, dtype):
    for x in samples(dtype):
        crow, col, values = ops.dense_to_csr(level.put(x))
        assert_tuples((crow, col, values), reference.dense_to_csr(x), str(x.shape))
        restored = reference.mask_apply(x, x != 0)
        assert_same_bits(ops.csr_to_dense(crow, col, values, x.shape[1]), restored, str(x.shape))
        there = (crow.cpu(), col.cpu(), values.cpu())
        assert_same_bits(reference.csr_to_dense(*there, x.shape[1]), restored, str(x.shape))


def test_csr_is_what_torch_makes():
    x = torch.randn(37, 101, generator=generator(5)) * mask(37, 101, "90%", generator(6))
    rows, cols = x.to_sparse_coo().indices()
    crow, col, _ = ops.dense_to_csr(x)
    assert torch.equal(col.long(), cols)
    assert torch.equal(torch.repeat_interleave(torch.arange(37), crow.diff()), rows)


@every_packing
def test_pack_round_trip(at, packing):
    _, layout, dtype = packing
    for x in samples(dtype):
        x, values, bits = packable(x, layout)
        cols = x.shape[1]
        there = at.put(values), at.put(bits)
        blob = ops.pack(*there, cols, layout)
        assert_tuples(ops.unpack(blob), (values, bits), str(x.shape))
        assert torch.equal(blob.blob, ops.pack(*there, cols, layout).blob), "equal weights make equal blobs"
        assert blob[1:] == (*x.shape, packing_code(layout, dtype)) and (blob.layout, blob.dtype) == (
            layout,
            dtype,
        )
        h = at.native.header(*blob)
        assert (h["rows"], h["cols"], h["packing"], h["nnz"]) == (*blob[1:], values.numel())
        restored = reference.bitmap_to_dense(values, bits, cols)
        assert_same_bits(at.native.dense(*blob), restored, str(x.shape))


@every_packing
def test_pack_keeps_explicit_zeros(at, packing):
    _, layout, dtype = packing
    values, bits = ops.dense_to_nm(at.put(torch.zeros(20, 36, dtype=dtype)), 2, 4)
    assert values.numel() == 20 * 18
    assert_tuples(ops.unpack(ops.pack(values, bits, 36, layout)), (values.cpu(), bits.cpu()), str(dtype))


def test_pack_wide_csr():
    x = torch.zeros(3, 65537)
    x[0, 0], x[1, 65536], x[2, 40000] = 1, 2, 3
    values, bits = ops.dense_to_bitmap(x)
    assert_tuples(ops.unpack(ops.pack(values, bits, 65537, "csr")), (values, bits), "")


@pytest.mark.slow
def test_more_rows_than_a_dimension_of_the_grid_has(place):
    x = torch.randn(70001, 3, generator=generator(20))
    x[x.abs() < 0.5] = 0
    there = place.put(x)
    values, bits = ops.dense_to_bitmap(there)
    assert_tuples((values, bits), reference.dense_to_bitmap(x), "bitmap")
    csr = ops.dense_to_csr(there)
    assert_tuples(csr, reference.dense_to_csr(x), "CSR")
    assert_same_bits(ops.csr_to_dense(*csr, 3), x)
    assert_same_bits(ops.mask_apply_packed(there, bits), x)
    assert_tuples(
        ops.unpack(ops.pack(values, bits, 3, place.layouts[-1])), (values.cpu(), bits.cpu()), "packed"
    )


def strided(x: Tensor):
    """x in other memory layouts."""
    wide = torch.full((2 * x.shape[0], x.shape[1] + 3), 7, dtype=x.dtype)
    wide[::2, 2:-1] = x
    return [x.t().contiguous().t(), wide[::2, 2:-1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_strides(place, dtype):
    x = raw(21, 40, dtype, 0.5, generator(7))
    keep = torch.rand(21, 40, generator=generator(8)) < 0.5
    bits = reference.pack_mask(keep)
    nm = reference.mask_apply(x, mask(21, 40, "2:4", generator(9)))
    values, _ = reference.dense_to_bitmap(x)
    value_bits = reference.pack_mask(x != 0)
    crow, col, _ = reference.dense_to_csr(x)
    there = [[place.put(y) for y in strided(original)] for original in (x, keep, nm)]
    for other, other_keep, other_nm in zip(*there, strict=True):
        assert_same_bits(ops.mask_apply(other, other_keep), reference.mask_apply(x, keep))
        assert_same_bits(ops.pack_mask(other_keep), bits)
        assert_tuples(ops.dense_to_bitmap(other), reference.dense_to_bitmap(x), "")
        assert_tuples(ops.dense_to_csr(other), reference.dense_to_csr(x), "")
        assert_tuples(ops.dense_to_nm(other_nm, 2, 4), reference.dense_to_nm(nm, 2, 4), "")
    spread, columns = (place.put(torch.stack([y, y], 1))[:, 0] for y in (values, col))
    layout = place.layouts[-1]
    blob = ops.pack(place.put(values), place.put(value_bits), 40, layout)
    there = [[place.put(y) for y in strided(original)] for original in (bits, value_bits)]
    for other_bits, other_value_bits in zip(*there, strict=True):
        assert_same_bits(ops.mask_apply_packed(place.put(x), other_bits), reference.mask_apply(x, keep))
        assert_same_bits(ops.unpack_mask(other_bits, 40), keep)
        assert_same_bits(ops.bitmap_to_dense(spread, other_value_bits, 40), reference.mask_apply(x, x != 0))
        assert torch.equal(ops.pack(spread, other_value_bits, 40, layout).blob, blob.blob)
        assert_same_bits(
            ops.csr_to_dense(place.put(crow), columns, spread, 40), reference.mask_apply(x, x != 0)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_at_any_address(place, dtype):
    """Contiguous tensors that begin between two multiples of 16 bytes, as rows of a larger one do."""
    seed, cols = generator(21), 77
    x, keep = raw(9, cols, dtype, 0.5, seed), torch.rand(9, cols, generator=seed) < 0.5
    bits, nm = (
        reference.pack_mask(keep),
        reference.mask_apply(x, mask(9, cols, "2:4", seed))[:, :76].contiguous(),
    )
    values, value_bits = reference.dense_to_bitmap(x)
    crow, col, _ = reference.dense_to_csr(x)
    masked, restored = reference.mask_apply(x, keep), reference.mask_apply(x, x != 0)

    def at(t: Tensor, elements: int) -> Tensor:
        base = torch.cat([t.new_ones(elements), t.flatten(), t.new_ones(3)])
        return place.put(base)[elements : elements + t.numel()].view(t.shape)

    for i in range(1, 16):
        j = 5 * i % 16
        there, here_bits = at(x, i), at(bits, j)
        assert_same_bits(ops.mask_apply(there, at(keep, j)), masked, f"{i}, {j}")
        assert_same_bits(ops.mask_apply_packed(there, here_bits), masked, f"{i}, {j}")
        for change, by in ((ops.mask_apply_, at(keep, j)), (ops.mask_apply_packed_, here_bits)):
            changed = at(x, i)
            change(changed, by)
            assert_same_bits(changed, masked, f"{i}, {j}, in place")
        changed = at(x, i)
        expected = reference.threshold_mask(x, 0.5)
        assert_tuples((ops.threshold_mask_(changed, 0.5), changed), expected[::-1], f"{i}")
        assert_same_bits(ops.pack_mask(at(keep, i)), bits, f"{i}")
        assert_same_bits(ops.unpack_mask(at(bits, i), cols), keep, f"{i}")
        assert_tuples(ops.dense_to_bitmap(there), (values, value_bits), f"{i}")
        assert_tuples(ops.dense_to_nm(at(nm, i), 2, 4), reference.dense_to_nm(nm, 2, 4), f"{i}")
        assert_tuples(ops.dense_to_csr(there), reference.dense_to_csr(x), f"{i}")
        back = ops.csr_to_dense(at(crow, i), at(col, j), at(values, i), cols)
        assert_same_bits(back, restored, f"{i}, {j}")
        assert_same_bits(ops.bitmap_to_dense(at(values, i), at(value_bits, j), cols), restored, f"{i}, {j}")
        blob = ops.pack(at(values, i), at(value_bits, j), cols, place.layouts[-1])
        assert_tuples(ops.unpack(blob), (values, value_bits), f"{i}, {j}")


@settings(max_examples=220, deadline=None)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 90),
    density=st.floats(0, 1),
    packing=st.one_of(
        st.sampled_from(PACKINGS), st.sampled_from([packing for packing in PACKINGS if packing[0] in GPUS])
    ),
    seed=st.integers(0, 2**31),
)
def test_every_format_holds_any_matrix(rows, cols, density, packing, seed):
    name, layout, dtype = packing
    x = raw(rows, cols, dtype, density, torch.Generator().manual_seed(seed))
    with running(name, seed) as place:
        there = place.put(x)
        values, bits = ops.dense_to_bitmap(there)
        assert_tuples((values, bits), reference.dense_to_bitmap(x), "bitmap")
        assert_tuples(ops.dense_to_csr(there), reference.dense_to_csr(x), "csr")
        assert_same_bits(ops.bitmap_to_dense(values, bits, cols), reference.mask_apply(x, x != 0))
        x, values, bits = packable(x, layout)
        blob = ops.pack(place.put(values), place.put(bits), x.shape[1], layout)
        assert_tuples(ops.unpack(blob), (values, bits), layout)


# --- linear -----------------------------------------------------------------------------------------------------------


def layer_at(at: Place, packing) -> tuple[Tensor, Tensor, Tensor]:
    _, layout, dtype = packing
    return packed_layer(dtype, layout=layout, put=at.put)


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, w.double(), bias)


@every_packing
def test_linear(at, packing):
    w, bias, blob = layer_at(at, packing)
    for shape in [(36,), (1, 36), (7, 36), (2, 3, 36), (0, 36)]:
        x = torch.randn(shape, generator=generator(10)).to(w.dtype)
        for b in (None, bias):
            out = ops.linear(at.put(x), blob, b)
            assert out.shape == reference.linear(x, w, b if b is None else b.cpu()).shape
            assert_linear(out.reshape(-1, 20), x.reshape(-1, 36), w, b, str(shape))


@every_packing
def test_linear_reads_a_strided_bias(at, packing):
    _, bias, blob = layer_at(at, packing)
    x = at.put(torch.randn(3, 36, generator=generator(11)).to(bias.dtype))
    for strided_bias in (torch.stack([bias, bias], 1)[:, 0], bias[:1].expand(20)):
        expected = ops.linear(x, blob, strided_bias.clone(memory_format=torch.contiguous_format))
        assert_same_bits(ops.linear(x, blob, strided_bias), expected.cpu())


@every_packing
@pytest.mark.parametrize("shape", [(36,), (1, 36), (5, 36), (2, 3, 36), (0, 36)])
def test_gradients_are_those_of_dense(at, packing, shape):
    w, bias, blob = layer_at(at, packing)
    x = torch.randn(shape, generator=generator(12)).to(w.dtype)
    grad = torch.randn(*shape[:-1], 20, generator=generator(13)).to(w.dtype)
    sparse_x, sparse_b = at.put(x).clone().requires_grad_(), bias.clone().requires_grad_()
    dense_x, dense_b = x.double().requires_grad_(), bias.cpu().double().requires_grad_()
    ops.linear(sparse_x, blob, sparse_b).backward(at.put(grad))
    dense_linear(dense_x, w, dense_b).backward(grad.double())
    close = {} if w.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(sparse_x.grad.cpu(), dense_x.grad.to(w.dtype), **close)
    torch.testing.assert_close(sparse_b.grad.cpu(), dense_b.grad.to(w.dtype), **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_flow_to_what_asks_for_them(place, dtype):
    w, bias, blob = layer_at(place, (place.name, place.layouts[-1], dtype))
    x = place.put(torch.randn(4, 36, generator=generator(14)).to(dtype)).requires_grad_()
    b = bias.clone().requires_grad_()
    (only_x,) = torch.autograd.grad(ops.linear(x, blob, None).sum(), x)  # sum: an expanded gradient
    torch.testing.assert_close(only_x.cpu(), w.sum(0).expand(4, 36), rtol=0.02, atol=0.02)
    (only_b,) = torch.autograd.grad(ops.linear(x.detach(), blob, b).sum(), b)
    torch.testing.assert_close(only_b.cpu(), torch.full((20,), 4, dtype=dtype))
    assert not ops.linear(x.detach(), blob, bias).requires_grad
    assert not blob.blob.requires_grad


def test_gradient_through_a_transposed_input(place):
    w, _, blob = layer_at(place, (place.name, place.layouts[-1], torch.float32))
    x = place.put(torch.randn(36, 5, generator=generator(15))).requires_grad_()
    ops.linear(x.t(), blob, None).square().sum().backward()
    dense = x.detach().cpu().double().requires_grad_()
    (dense.t() @ w.double().t()).square().sum().backward()
    torch.testing.assert_close(x.grad.cpu(), dense.grad.float())
