"""Every linear kernel: strategy x instruction set x dtype, and layout x dtype of the GPU, emulated and real, over awkward
shapes, batches, sparsities and strides. What only a GPU has is in test_linear_cuda.py.

Two oracles. Whole-number data, whose float32 sums are exact in any order: the result must equal the rounded float64
product bit for bit, so that one dropped, doubled or misplaced weight shows. Normal data: the bound that float32 sums
obey (helpers/compare.py).
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from helpers.backends import running
from helpers.compare import assert_linear, assert_same_bits, linear_bound, product
from helpers.isa import CODE_STRATEGIES, DTYPES, LEVELS, STRATEGIES, forced, layout_of, serves, threads
from helpers.kernels import CPU_KERNELS, GPU_KERNELS, KERNELS, Kernel, cpu_linear
from helpers.shapes import BATCHES, INPUTS, LONG, SPARSITIES, arranged, mask, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseprune.kernels import _core, native, ops
from sparseprune.kernels.packing import Packed, packing_code

all_kernels = pytest.mark.parametrize("kernel", KERNELS, ids=str, indirect=True)
cpu_kernels = pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str, indirect=True)


@pytest.fixture
def kernel(request):
    # One thread: most shapes here are too small for two, and a busy machine makes waiting for the second long.
    with running(request.param.place):
        yield request.param


@pytest.fixture
def isa(level: str):
    with forced(level), threads(1):
        yield level


@functools.lru_cache(maxsize=256)
def whole_weight(rows: int, cols: int, sparsity: str) -> Tensor:
    seed = torch.Generator().manual_seed(rows * 10007 + cols)
    return whole(rows, cols, limit=4, seed=seed) * mask(rows, cols, sparsity, seed)


@functools.lru_cache(maxsize=64)
def whole_input(batch: int, cols: int) -> Tensor:
    return whole(batch, cols, limit=8, seed=torch.Generator().manual_seed(batch * 10007 + cols))


def packed(w: Tensor, layout: str) -> Packed:
    """Packed under the level in force, whose column order it has."""
    values, bits = ops.dense_to_bitmap(w)
    return ops.pack(values, bits, w.shape[1], layout)


def check_exact(
    kernel: Kernel, rows: int, cols: int, batch: int, sparsity: str, kind: str, bias: bool, turn: int | None
) -> None:
    dtype = kernel.dtype
    w = kernel.hold(whole_weight(rows, cols, sparsity)).to(dtype)
    x = arranged(whole_input(batch, cols).to(dtype), kind)
    b = whole(rows, limit=64, seed=torch.Generator().manual_seed(rows)).to(dtype) if bias else None
    out = kernel.run(x, w, b, turn)
    what = f"{rows}x{cols} {sparsity}, batch {batch}, {kind} input, bias {bias}, turn {turn}"
    assert_same_bits(out, product(x, w, b).to(dtype), what)


def cases(kernel: Kernel, count: int):
    """`count` cases in which each list is walked at its own pace, so that pairs of values vary from kernel to kernel."""
    edges, batches, offset = kernel.edges, kernel.batches, KERNELS.index(kernel)
    for i in range(offset * count, (offset + 1) * count):
        rows = edges[i * 7 % len(edges)]
        cols = kernel.cols(edges[(i + i // len(edges)) % len(edges)], up=i % 2 == 0)
        yield (
            rows,
            cols,
            kernel.batch(rows, cols, batches[(i * 5 + i // len(batches)) % len(batches)]),
            SPARSITIES[(i + i // 6) % len(SPARSITIES)],
            INPUTS[(i // 2 + i // 12) % len(INPUTS)],
            i % 3 != 0,
            i,
        )


@all_kernels
def test_exact_on_awkward_shapes(kernel):
    for case in cases(kernel, 60 if kernel.is_gpu else 30):
        check_exact(kernel, *case)


@all_kernels
def test_exact_at_every_batch_size(kernel):
    for i, batch in enumerate(kernel.batches):
        check_exact(kernel, 49, 96, batch, SPARSITIES[2 + i % 4], INPUTS[i % len(INPUTS)], True, None)


@all_kernels
@pytest.mark.parametrize("cols", LONG)
def test_exact_past_the_chunks_of_k(kernel, cols):
    for i, (rows, batch, sparsity) in enumerate(
        [(49, 1, "2:4"), (33, 33, "50%"), (80, 40, "90%"), (17, 129, "4:8"), (1, 300, "dense")]
    ):
        check_exact(kernel, rows, cols, batch, sparsity, "contiguous", True, i + cols)


@all_kernels
def test_exact_where_columns_need_four_bytes(kernel):
    cols = kernel.cols(65536 + 77)
    seed = torch.Generator().manual_seed(0)
    w = whole(5, cols, limit=4, seed=seed) * (torch.rand(5, cols, generator=seed) < 0.02)
    w[0, -1], w[1, 0] = 3, 2
    w = kernel.hold(w)
    for batch in (1, 3) if kernel.is_gpu else (1, 3, 33):
        x = whole(batch, cols, limit=8, seed=seed)
        expected = product(x, w, None).to(kernel.dtype)
        assert_same_bits(kernel.run(x.to(kernel.dtype), w.to(kernel.dtype), None), expected, f"batch {batch}")


@pytest.mark.parametrize("cols", [65535, 65536, 65537])
def test_width_of_csr_columns_follows_from_the_columns(cols):
    w = torch.zeros(2, cols)
    w[1, -1] = 2
    csr = packed(w, "csr")
    assert cpu_linear(torch.ones(3, cols), csr).tolist() == [[0, 2]] * 3
    size, of_more = (native.packed_bytes(*csr[1:], nnz) for nnz in (0, 1024))
    assert of_more - size == 1024 * (4 + (2 if cols <= 65536 else 4))


@all_kernels
def test_empty_shapes(kernel):
    dtype = kernel.dtype
    w = kernel.hold(torch.ones(40, 8)).to(dtype)
    bias = torch.arange(1, 41).to(dtype)
    for turn, batch in enumerate((0, 1, 2, 17, 40, 100)):
        x = torch.ones(batch, 8, dtype=dtype)
        assert kernel.run(x, w[:0], None, turn).shape == (batch, 0)
        x, what = x[:, :0], f"no columns, batch {batch}"
        assert_same_bits(kernel.run(x, w[:, :0], bias, turn), bias.expand(batch, 40), what)
        assert_same_bits(kernel.run(x, w[:, :0], None, turn), torch.zeros(batch, 40, dtype=dtype), what)
        assert kernel.run(torch.ones(0, 8, dtype=dtype), w, bias, turn).shape == (0, 40)


@all_kernels
def test_leading_dimensions(kernel):
    dtype, cols = kernel.dtype, kernel.cols(65)
    w = kernel.hold(whole_weight(33, cols, "50%")).to(dtype)
    for shape in [(cols,), (1, cols), (1, 1, cols), (2, 3, cols), (2, 0, cols), (2, 3, 4, 5, cols)]:
        x = whole(*shape, limit=8, seed=torch.Generator().manual_seed(1)).to(dtype)
        out = kernel.run(x, w, None)
        assert out.shape == (*shape[:-1], 33)
        assert_same_bits(out, product(x, w, None).to(dtype), str(shape))
    for shape in [(0,), (3, 0), (2, 3, 0), (2, 0, 0)]:
        out = kernel.run(torch.ones(shape, dtype=dtype), torch.ones(33, 0, dtype=dtype), None)
        assert_same_bits(out, torch.zeros(*shape[:-1], 33, dtype=dtype), str(shape))


@all_kernels
def test_strided_inputs_of_more_dimensions(kernel):
    w = kernel.hold(whole_weight(17, 24, "2:4")).to(kernel.dtype)
    base = whole(6, 5, 24, limit=8, seed=torch.Generator().manual_seed(2)).to(kernel.dtype)
    for turn, x in enumerate([base.transpose(0, 1), base[::2], base[:, 1:4], base.permute(1, 0, 2)[:, ::3]]):
        out = kernel.run(x, w, None, turn)
        assert_same_bits(out, product(x, w, None).to(kernel.dtype), str(x.stride()))


@all_kernels
def test_normal_data_within_the_bound(kernel):
    seed, dtype = torch.Generator().manual_seed(3), kernel.dtype
    for turn, (rows, cols, batch, sparsity) in enumerate(
        [
            (97, 257, 1, "50%"),
            (64, 1100, 5, "2:4"),
            (65, 513, 33, "90%"),
            (48, 2100, 70, "50%"),
            (16, 1025, 13, "dense"),
        ]
    ):
        cols = kernel.cols(cols)
        w = kernel.hold(torch.randn(rows, cols, generator=seed) * mask(rows, cols, sparsity, seed)).to(dtype)
        x = torch.randn(batch, cols, generator=seed).to(dtype)
        bias = torch.randn(rows, generator=seed).to(dtype)
        assert_linear(
            kernel.run(x, w, bias, turn), x, w, bias, f"{rows}x{cols} {sparsity}, batch {batch}, turn {turn}"
        )


@all_kernels
def test_bound_rejects_a_missing_weight(kernel):
    seed = torch.Generator().manual_seed(4)
    w = kernel.hold(torch.randn(20, 40, generator=seed)).to(kernel.dtype)
    x = torch.randn(7, 40, generator=seed).to(kernel.dtype)
    damaged = w.clone()
    damaged[3, w[3].nonzero()[2]] = 0
    assert_linear(kernel.run(x, w, None), x, w, None)
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_linear(kernel.run(x, damaged, None), x, w, None)


@settings(max_examples=1400, deadline=None)
@given(
    kernel=st.one_of(
        st.sampled_from(CPU_KERNELS), st.sampled_from(CPU_KERNELS), st.sampled_from(GPU_KERNELS)
    ),
    rows=st.integers(0, 70),
    cols=st.integers(0, 150),
    batch=st.integers(0, 70),
    kept=st.floats(0, 1),
    kind=st.sampled_from(INPUTS),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_exact_on_any_shape(kernel, rows, cols, batch, kept, kind, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    cols = kernel.cols(cols, up=False)
    keep = torch.rand(rows, cols, generator=generator) < kept
    w = kernel.hold(whole(rows, cols, limit=4, seed=generator) * keep).to(kernel.dtype)
    x = whole(batch, cols, limit=8, seed=generator).to(kernel.dtype)
    x = arranged(x, kind) if batch else x
    b = whole(rows, limit=64, seed=generator).to(kernel.dtype) if bias else None
    with running(kernel.place, seed):
        out = kernel.run(x, w, b, seed if seed % 3 else None)
        assert_same_bits(out, product(x, w, b).to(kernel.dtype))


@pytest.mark.slow
@all_kernels
def test_exact_on_the_full_grid(kernel):
    numbers = itertools.count()
    edges = kernel.edges[:-1]
    for rows, cols in itertools.product((*edges, 1025), (*edges, *LONG)):
        for batch in (1, 13, 40) if rows * cols > 10000 else (1, 3, 12, 25, 48, 129):
            i = next(numbers)
            kind, sparsity = INPUTS[i % len(INPUTS)], SPARSITIES[i % 7 % len(SPARSITIES)]
            batch = kernel.batch(rows, cols, batch)
            check_exact(kernel, rows, kernel.cols(cols), batch, sparsity, kind, i % 2 == 0, i)


# --- special values ---------------------------------------------------------------------------------------------------


def plain_case(kernel, rows=40, cols=70, batch=37):
    cols = kernel.cols(cols)
    w = kernel.hold(whole_weight(rows, cols, "50%"))
    return w.to(kernel.dtype), whole_input(batch, cols).to(kernel.dtype)


@all_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_activation_reaches_the_rows_that_keep_its_column(kernel, value):
    w, x = plain_case(kernel)
    good = product(x, w, None).to(kernel.dtype)
    for turn, (batch, column) in enumerate([(0, 0), (16, 33), (36, 69)]):
        bad = x.clone()
        bad[batch, column] = value
        out = kernel.run(bad, w, None, turn)
        keeps = w[:, column] != 0
        assert keeps.any() and not keeps.all()
        expected = (w[:, column] * value).to(kernel.dtype)  # infinities keep the sign of the product
        torch.testing.assert_close(out[batch, keeps], expected[keeps], rtol=0, atol=0, equal_nan=True)
        # Documented: a pruned weight times it counts as 0 or as NaN.
        other = out[batch, ~keeps]
        assert ((other == good[batch, ~keeps]) | other.isnan()).all()
        rest = torch.arange(len(x)) != batch
        assert_same_bits(out[rest], good[rest], "the other batch rows")


@all_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_weight_reaches_its_row_alone(kernel, value):
    w, x = plain_case(kernel)
    for turn, (row, column) in enumerate([(0, 0), (16, 33), (39, 69)]):
        bad = w.clone()
        group = slice(column // 4 * 4, column // 4 * 4 + 4)
        if kernel.layout == "sparse24" and not w[row, column]:
            bad[row, group] = 0
        bad[row, column] = value
        out = kernel.run(x, bad, None, turn)
        expected = (x[:, column] * value).to(kernel.dtype)
        torch.testing.assert_close(out[:, row], expected, rtol=0, atol=0, equal_nan=True)
        rest = torch.arange(len(w)) != row
        assert_same_bits(out[:, rest], product(x, w, None).to(kernel.dtype)[:, rest], "the other output rows")


@all_kernels
def test_special_bias(kernel):
    w, x = plain_case(kernel)
    bias = torch.zeros(len(w), dtype=kernel.dtype)
    bias[1], bias[17], bias[39] = math.nan, math.inf, -math.inf
    expected = product(x, w, bias).to(kernel.dtype)
    torch.testing.assert_close(kernel.run(x, w, bias), expected, rtol=0, atol=0, equal_nan=True)


@all_kernels
def test_negative_zero_weights_are_zeros(kernel):
    w, x = plain_case(kernel)
    signed = torch.where(w == 0, torch.tensor(-0.0, dtype=kernel.dtype), w)
    blob = kernel.pack(signed)
    kept = w.numel() // 2 if kernel.layout == "sparse24" else int((w != 0).sum())
    assert kernel.at.native.header(*blob)["nnz"] == kept
    assert_same_bits(kernel.run(x, signed, None), product(x, w, None).to(kernel.dtype))
    if kernel.layout != "sparse24":  # which keeps zeros to fill its groups, and their signs
        assert torch.equal(blob.blob, kernel.pack(w).blob)


@all_kernels
def test_subnormals(kernel):
    """Exact, but for the bf16 instructions, which may take them for 0; never garbage."""
    w, x = plain_case(kernel)
    tiny = torch.finfo(kernel.dtype).smallest_normal
    small = (x.double() * tiny / 16).to(kernel.dtype)
    assert ((small.abs() > 0) & (small.abs() < tiny)).any()
    assert_linear(kernel.run(small, w, None), small, w, None, "activations")
    small_w = (w.double() * tiny / 16).to(kernel.dtype)
    assert_linear(kernel.run(x, small_w, None), x, small_w, None, "weights")


@all_kernels
def test_output_is_rounded_to_nearest_even(kernel):
    """Identity weights make out = x + bias: random bits as x and bias meet ties, overflow, subnormals, NaN."""
    size, dtype = 64, kernel.dtype
    seed = torch.Generator().manual_seed(5)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(word)
    bits = torch.randint(info.min, info.max + 1, (size + 1, 200 * size), generator=seed).to(word).view(dtype)
    # A pruned weight times a special value may count as NaN, so that x is finite, and the bias is anything.
    x = torch.where(bits[0].isfinite(), bits[0], 1).reshape(200, size)
    near = torch.randn(size, generator=seed).to(dtype)
    for bias in (bits[1, :size].contiguous(), near):
        for turn, values in enumerate(
            (x, (x.float().sign() * near.float().abs() * 1.0078125 ** torch.arange(200)[:, None]).to(dtype))
        ):
            out = kernel.run(values, torch.eye(size, dtype=dtype), bias, turn)
            flushed = values
            if dtype == torch.bfloat16 and kernel.place in ("avx512_bf16", "amx"):
                subnormal = values.abs() < torch.finfo(dtype).smallest_normal
                if not kernel.strategy.startswith("csr"):
                    flushed = torch.where(subnormal, 0, values)
            expected = (flushed.float() + bias.float()).to(dtype)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# --- which kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_strategies_of_a_level(isa):
    for dtype, strategy in itertools.product(DTYPES, STRATEGIES):
        w, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
        kernel = Kernel(isa, dtype, strategy)
        if serves(isa, dtype, strategy):
            assert_same_bits(kernel.run(x, w, None), x)
        else:
            with pytest.raises(ValueError, match=f"strategy: {strategy} does not serve .* level '{isa}'"):
                kernel.run(x, w, None)


@pytest.mark.parametrize("strategy", range(len(STRATEGIES)))
def test_strategy_of_the_other_layout_is_refused(strategy):
    blob = packed(torch.eye(16), "tile" if layout_of(STRATEGIES[strategy]) == "csr" else "csr")
    with pytest.raises(ValueError, match=f"strategy: {STRATEGIES[strategy]} does not serve"):
        cpu_linear(torch.ones(2, 16), blob, None, strategy)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy: unknown does not serve"):
        cpu_linear(torch.ones(2, 16), packed(torch.eye(16), "tile"), None, len(STRATEGIES + CODE_STRATEGIES))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["tile", "csr"])
def test_plan_names_the_kernel_that_runs(isa, layout):
    seed = torch.Generator().manual_seed(6)
    for dtype, sparsity in itertools.product(DTYPES, ("50%", "90%")):
        w = (torch.randn(50, 300, generator=seed) * mask(50, 300, sparsity, seed)).to(dtype)
        blob = packed(w, layout)
        for batch in BATCHES:
            x = torch.randn(batch, 300, generator=seed).to(dtype)
            strategy = native.strategy(blob.blob, batch)
            assert serves(isa, dtype, strategy) and layout_of(strategy) == layout
            forced_out = cpu_linear(x, blob, None, STRATEGIES.index(strategy))
            assert_same_bits(cpu_linear(x, blob), forced_out, f"{dtype} {sparsity} batch {batch}")


@cpu_kernels
def test_one_and_two_threads_agree_bit_for_bit(kernel):
    seed, dtype = torch.Generator().manual_seed(7), kernel.dtype
    for rows, cols, batch, sparsity in [(513, 300, 1, "dense"), (97, 1100, 5, "50%"), (200, 130, 70, "90%")]:
        w = (torch.randn(rows, cols, generator=seed) * mask(rows, cols, sparsity, seed)).to(dtype)
        x, bias = (
            torch.randn(batch, cols, generator=seed).to(dtype),
            torch.randn(rows, generator=seed).to(dtype),
        )
        assert int((w != 0).sum()) * batch > 64 * 1024  # else one thread does it all
        with threads(1):
            one = kernel.run(x, w, bias)
        with threads(2):
            two = kernel.run(x, w, bias)
        assert_same_bits(two, one, f"{rows}x{cols}, batch {batch}")
        assert (one.double() - product(x, w, bias)).abs().le(linear_bound(x, w, bias)).all()


@pytest.mark.parametrize("source", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blob_of_another_column_order_is_refused(source, dtype):
    w, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
    with forced(source):
        blob = packed(w, "tile")
    for target in LEVELS:
        with forced(target):
            if torch.equal(blob.blob, packed(w, "tile").blob):
                assert_same_bits(cpu_linear(x, blob), x)
                continue
            with pytest.raises(
                ValueError, match=f"packed: was packed for another instruction set than '{target}'"
            ):
                cpu_linear(x, blob)
            values, bits = ops.unpack(blob)  # the way out that the message names
            assert_same_bits(cpu_linear(x, ops.pack(values, bits, 16, "tile")), x)


@pytest.mark.parametrize("layout", ["tile", "csr"])
def test_call_of_another_shape_or_dtype_is_refused(layout):
    right = packed(torch.ones(17, 40), layout)
    x, other = torch.ones(2, 40), "csr" if layout == "tile" else "tile"
    holds = rf"packed: holds a weight of 17x40 float32 in layout {layout}, the call is for "
    for packing, call in [
        (right._replace(rows=18), f"18x40 float32 in layout {layout}"),
        (right._replace(packing=packing_code(other, torch.float32)), f"17x40 float32 in layout {other}"),
    ]:
        with pytest.raises(ValueError, match=holds + call):
            cpu_linear(x, packing)
    with pytest.raises(ValueError, match="input: must have 40 columns .*, got shape .2, 41.; check"):
        cpu_linear(torch.ones(2, 41), right)
    with pytest.raises(ValueError, match=holds + f"17x41 float32 in layout {layout}"):
        cpu_linear(torch.ones(2, 41), right._replace(cols=41))
    with pytest.raises(TypeError, match="input: dtype must be the weight's torch.float32, got torch.float16"):
        cpu_linear(x.half(), right)


def test_levels_come_in_ascending_order():
    assert _core.isas_built()[: len(LEVELS)] == LEVELS and LEVELS[0] == "scalar"
