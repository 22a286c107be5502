"""int8 and int4 weights, dense, 2:4 and with zeros anywhere, on every instruction set: against float64 of the same rounded
numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.codes import KINDS, Codes, assert_codes_linear, random_codes
from helpers.compare import assert_same_bits
from helpers.isa import DTYPES, LEVELS, forced, threads
from helpers.kernels import cpu_linear
from helpers.shapes import INPUTS, arranged, generator
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.kernels import native, ops
from sparseprune.kernels.codes import dequantize, join_nibbles, lookup, split_nibbles, unpack_codes
from sparseprune.kernels.packing import packing_code

SHAPES = [(1, 4), (15, 60), (16, 64), (17, 68), (33, 128), (40, 132), (5, 196), (64, 576), (31, 1028)]
kinds = pytest.mark.parametrize("kind", KINDS, ids="-".join)
levels = pytest.mark.parametrize("level", LEVELS)


@levels
@kinds
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear_is_float64s_of_the_same_numbers(level, kind, group):
    for turn, (rows, cols) in enumerate(SHAPES):
        weight = random_codes(kind, rows, cols, group, (torch.float16, torch.bfloat16)[turn % 2])
        for batch in (1, 2, 3, 5, 8, 9, 17):
            dtype = DTYPES[(turn + batch) % 3]
            seed = generator(rows, cols, batch)
            x = torch.randn(batch, cols, generator=seed)
            x = (x * torch.where(torch.rand(batch, cols, generator=seed) < 0.02, 20, 1)).to(dtype)
            bias = torch.randn(rows, generator=seed).to(dtype) if batch % 2 else None
            with forced(level), threads(1):
                out = cpu_linear(x, weight.pack(dtype), bias)
            assert_codes_linear(out, x, weight, bias, f"{rows}x{cols}, batch {batch}, {dtype}")


AWKWARD = [
    (1, 1),
    (1, 300),
    (15, 63),
    (16, 64),
    (17, 65),
    (33, 255),
    (16, 256),
    (20, 257),
    (40, 3),
    (31, 1029),
]


@levels
@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("sparsity", ["zero", "dense", "uneven rows", "50%", "90%", "6:8"])
def test_zeros_lie_anywhere(level, encoding, sparsity):
    for turn, (rows, cols) in enumerate(AWKWARD):
        group, dtype = (32, 64, 128)[turn % 3], DTYPES[turn % 3]
        weight = random_codes(("bitquads", encoding), rows, cols, group, sparsity=sparsity)
        for batch in (1, 4, 10):
            x = torch.randn(batch, cols, generator=generator(rows, cols, batch)).to(dtype)
            with forced(level), threads(1):
                out = cpu_linear(x, weight.pack(dtype))
            assert_codes_linear(out, x, weight, None, f"{rows}x{cols}, batch {batch}, {dtype}")


@levels
def test_zeros_anywhere_and_many_blocks_of_batch_rows(level):
    weight = random_codes(("bitquads", "int4"), 40, 600, 64)
    for batch in (64, 513, 1030):
        x = torch.randn(batch, 600, generator=generator(batch))
        with forced(level), threads(2):
            out = cpu_linear(x, weight.pack(x.dtype))
        assert_codes_linear(out, x, weight, None, f"batch {batch}")


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_and_threads_agree_to_the_last_float32_bit_or_two(kind, dtype):
    weight = random_codes(kind, 300, 772, 64)
    x = torch.randn(20, 772, generator=generator(1)).to(dtype)
    outs = []
    for level in LEVELS:
        with forced(level):
            with threads(1):
                one = cpu_linear(x, weight.pack(dtype))
            with threads(2):
                assert_same_bits(cpu_linear(x, weight.pack(dtype)), one, level)
            outs.append(one.double())
    spread = torch.stack(outs).std(0, unbiased=False).max() / outs[0].abs().max()
    assert float(spread) < torch.finfo(dtype).eps * 2


@kinds
@pytest.mark.parametrize("arrangement", INPUTS)
def test_inputs_of_any_strides(kind, arrangement):
    weight = random_codes(kind, 40, 132, 64)
    x = torch.randn(7, 132, generator=generator(2))
    if arrangement == "repeated row":
        x = x[:1].expand(7, 132)
    put = arranged(x, arrangement)
    assert_same_bits(
        cpu_linear(put, weight.pack(x.dtype)), cpu_linear(put.contiguous(), weight.pack(x.dtype))
    )


@levels
@kinds
def test_what_is_not_finite_makes_its_own_row_nan_and_zeros_give_the_bias(level, kind):
    weight = random_codes(kind, 20, 132, 64)
    x = torch.randn(6, 132, generator=generator(3))
    clean = x.clone()
    x[1, 3], x[2, 70], x[3, 131] = math.nan, math.inf, -math.inf
    x[4] = 0
    x[5] = 1e-40  # a subnormal counts as zero
    bias = torch.randn(20, generator=generator(4))
    with forced(level):
        out, of_clean = (
            cpu_linear(x, weight.pack(x.dtype), bias),
            cpu_linear(clean, weight.pack(x.dtype), bias),
        )
    assert_same_bits(out[0], of_clean[0])
    assert bool(out[1:4].isnan().all())
    assert_same_bits(out[4:], bias.expand(2, 20) + 0.0)


@kinds
def test_empty_shapes(kind):
    for rows, cols, batch in [(0, 64, 3), (5, 0, 3), (5, 64, 0)]:
        weight = random_codes(kind, rows, cols, 64)
        out = cpu_linear(torch.ones(batch, cols), weight.pack(torch.float32))
        assert_same_bits(out, torch.zeros(batch, rows))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 40),
    cols=st.integers(0, 60),
    group=st.sampled_from([32, 64, 128]),
    scales=st.sampled_from([torch.float16, torch.bfloat16]),
    sparsity=st.sampled_from(["zero", "50%", "90%", "uneven rows"]),
)
def test_packing_loses_nothing(kind, rows, cols, group, scales, sparsity):
    cols *= 4 if kind[0] == "octets" else 7
    weight = random_codes(kind, rows, cols, group, scales, sparsity=sparsity)
    packed = weight.pack(torch.bfloat16)
    for got, part in zip(unpack_codes(packed), weight.parts, strict=True):
        assert (got is None) == (part is None)
        if got is not None:
            assert_same_bits(got, part)
    assert torch.equal(packed.blob, weight.pack(torch.bfloat16).blob), "equal weights make equal blobs"


@kinds
def test_gradients_are_those_of_the_dequantized_weight(kind):
    weight = random_codes(kind, 20, 132, 64)
    dense = dequantize(weight.encoding, *weight.parts, weight.cols, weight.group)
    x = torch.randn(3, 132, generator=generator(5)).requires_grad_()
    grad = torch.randn(3, 20, generator=generator(6))
    ops.linear(x, weight.pack(x.dtype)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense)


@kinds
def test_every_flipped_bit_of_a_header_is_found(kind):
    good = random_codes(kind, 20, 132, 64).pack(torch.float32)
    for bit in range(8 * 64):
        blob = good.blob.clone()
        blob[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="packed: "):
            cpu_linear(torch.ones(2, 132), good._replace(blob=blob))
    for size in (63, 64, len(good.blob) // 2, len(good.blob) - 64):
        with pytest.raises(ValueError, match="packed: "):
            unpack_codes(good._replace(blob=good.blob[:size].clone()))


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_mask_that_keeps_other_than_its_header_says_is_found(encoding):
    weight = random_codes(("bitquads", encoding), 20, 132, 64)
    good = weight.pack(torch.float32)
    blob = good.blob.clone()
    blob[128] ^= 1  # of row 0, column 0: masks begin behind the header and the offsets of two tiles
    with pytest.raises(
        ValueError, match=r"packed: must keep the \d+ values .* got a mask of \d+; the weight"
    ):
        unpack_codes(good._replace(blob=blob))


def test_what_is_not_there_is_refused():
    weight = random_codes(("quads", "int4"), 20, 132, 64).pack(torch.float32)
    with pytest.raises(ValueError, match="packed: must hold plain values, got int4; use codes.unpack_codes"):
        ops.unpack(weight)
    with pytest.raises(ValueError, match="strategy: tile_rows does not serve this weight"):
        cpu_linear(torch.ones(1, 132), weight, None, 0)
    with pytest.raises(ValueError, match="packed: holds a weight of 20x132 float32 int4 .*, the call is for"):
        native.header(
            *weight._replace(packing=packing_code("quads", torch.float32, "int4", 32, torch.float16))
        )
    for layout, encoding, group, scales in [
        ("quads", "plain", 0, None),
        ("tile", "int4", 64, torch.float16),
        ("octets", "int4_minimum", 64, torch.float16),
        ("bitquads", "int4_minimum", 64, torch.float16),
        ("bitquads", "plain", 0, None),
        ("quads", "int4", 48, torch.float16),
        ("quads", "int4", 64, torch.float32),
    ]:
        code = packing_code(layout, torch.float32, encoding, group, scales)
        with pytest.raises(ValueError, match="packing: must be a number that packing"):
            native.packed_bytes(20, 132, code, 0)
    with pytest.raises(ValueError, match="cols: must be a multiple of 4 for layout octets, got 130"):
        native.packed_bytes(20, 130, packing_code("octets", torch.float32, "int4", 64, torch.float16), 0)


@given(st.lists(st.integers(0, 15), max_size=9))
def test_nibbles(codes):
    there = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(split_nibbles(join_nibbles(there), len(codes)), there)


DENSE = [kind for kind in KINDS if kind[0] == "quads"]
dense_kinds = pytest.mark.parametrize("kind", DENSE, ids="-".join)


def dense_of(weight: Codes, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(weight.encoding, *weight.parts, weight.cols, weight.group).to(dtype)


@dense_kinds
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_looked_up_rows_are_the_dequantized_ones(kind, group, dtype):
    for turn, (rows, cols) in enumerate([*SHAPES, (1, 1), (17, 33), (40, 127), (33, 129), (3, 577)]):
        for scales in (torch.float16, torch.bfloat16):
            weight = random_codes(kind, rows, cols, group, scales)
            packed, expected = weight.pack(dtype), dense_of(weight, dtype)
            every = torch.randperm(rows, generator=generator(turn))
            assert_same_bits(lookup(packed, every), expected[every], f"{rows}x{cols}, {scales}")
            some = torch.randint(0, rows, (2, 3), dtype=torch.int32, generator=generator(turn))
            assert_same_bits(ops.lookup(some, packed), expected[some], f"{rows}x{cols}, {scales}, int32")


@dense_kinds
def test_looked_up_by_several_threads_and_by_indices_of_any_strides(kind):
    weight = random_codes(kind, 100, 576, 64)
    packed, expected = weight.pack(torch.bfloat16), dense_of(weight, torch.bfloat16)
    indices = torch.randint(0, 100, (40, 30), generator=generator(1))
    for count in (1, 2, 5):
        with threads(count):
            assert_same_bits(ops.lookup(indices, packed), expected[indices])
    for view in (indices.t(), indices[::3, 1::2], indices[0].expand(4, 30), indices[0, 0]):
        assert_same_bits(ops.lookup(view, packed), expected[view])


@dense_kinds
def test_nothing_is_looked_up_where_nothing_is_there(kind):
    for rows, cols, shape in [(5, 64, (0,)), (5, 64, (2, 0)), (5, 0, (3,)), (0, 64, (0,))]:
        packed = random_codes(kind, rows, cols, 64).pack(torch.float32)
        assert ops.lookup(torch.zeros(shape, dtype=torch.int64), packed).shape == (*shape, cols)


@pytest.mark.parametrize("index", [20, -1, 2**31 - 1, -(2**31), 2**40, -(2**62)])
def test_an_index_that_is_not_a_row_is_named(index):
    packed = random_codes(("quads", "int4"), 20, 132, 64).pack(torch.float32)
    rule = (
        rf"indices: must be at least 0 and below 20, .* got {index} at position 3; check that the tokenizer"
    )
    for dtype in (torch.int64, torch.int32) if abs(index) < 2**32 else (torch.int64,):
        with pytest.raises(IndexError, match=rule):
            ops.lookup(torch.tensor([[1, 19, 0], [index, 99, 2]], dtype=dtype), packed)


def test_what_cannot_be_looked_up_is_refused():
    packed = random_codes(("quads", "int4"), 20, 132, 64).pack(torch.float32)
    one = torch.tensor([1])
    with pytest.raises(
        ValueError, match="packed: must hold a dense weight .* got float32 int8 in layout octets"
    ):
        ops.lookup(one, random_codes(("octets", "int8"), 20, 132, 64).pack(torch.float32))
    with pytest.raises(ValueError, match="packed: holds a weight of 20x132 .* the call is for 40x132"):
        ops.lookup(one, packed._replace(rows=40))
    for size in (0, 63, 64, len(packed.blob) - 64):
        with pytest.raises(ValueError, match="packed: "):
            ops.lookup(one, packed._replace(blob=packed.blob[:size].clone()))
    for bit in range(8 * 64):
        blob = packed.blob.clone()
        blob[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="packed: "):
            ops.lookup(one, packed._replace(blob=blob))
    for indices in (one.float(), one.bool(), one.to(torch.uint8)):
        with pytest.raises(TypeError, match="indices: must be a strided tensor of int64 or int32, got"):
            ops.lookup(indices, packed)
    with pytest.raises(ValueError, match="packed: must lie on indices's device meta, got cpu"):
        ops.lookup(one.to("meta"), packed)
