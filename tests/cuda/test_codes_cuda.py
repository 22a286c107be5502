"""int8 and int4 weights on a GPU, dense and 2:4: packed, multiplied, looked up, and layers over them. Emulated, and on a real
one. Unlike on a CPU, activations are not rounded.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.backends import GPUS, emulated, running
from helpers.codes import FORMATS, GPU_KINDS, Codes, assert_gpu_codes_linear, random_codes
from helpers.compare import assert_same_bits
from helpers.kernels import gpu_linear
from helpers.shapes import INPUTS, arranged, generator, mask, whole
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseprune as sp
from sparseprune.kernels import cuda, native, ops
from sparseprune.kernels.codes import dequantize, lookup, unpack_codes
from sparseprune.kernels.packing import packing_code

HALVES = [torch.bfloat16, torch.float16]
GROUPS = [32, 64, 128]
DENSE = [kind for kind in GPU_KINDS if kind[0] == "quads"]
gpus = pytest.mark.parametrize("gpu", GPUS)
kinds = pytest.mark.parametrize("kind", GPU_KINDS, ids="-".join)
halves = pytest.mark.parametrize("dtype", HALVES)


@pytest.fixture(params=GPUS)
def put(request):
    with running(request.param) as place:
        yield place.put


def packing_of(kind: tuple[str, str], dtype: torch.dtype, group: int = 64) -> int:
    layout = cuda.layout_of_codes(*FORMATS[kind[0]])
    return packing_code(layout, dtype, kind[1], group, torch.float16)


def columns(kind: tuple[str, str], cols: int) -> int:
    """The next number of columns that the kind holds."""
    return -(-cols // 4) * 4 if kind[0] == "octets" else cols


def assert_exact(put, weight: Codes, dtype, batch: int, forced, what: str, kind: str = "contiguous") -> None:
    seed = generator(batch, weight.cols)
    x = whole(batch, weight.cols, limit=8, seed=seed).to(dtype)
    bias = whole(weight.dense.shape[0], limit=64, seed=seed).to(dtype) if batch % 2 else None
    given = put(arranged(x, kind))
    if kind == "repeated row":
        x = x[:1].expand(batch, weight.cols)
    out = gpu_linear(given, weight.pack(dtype, put), None if bias is None else put(bias), forced)
    expected = x.double() @ weight.dense.t() + (0.0 if bias is None else bias.double())
    assert_same_bits(out, expected.to(dtype), what)


# --- linear -----------------------------------------------------------------------------------------------------------


@kinds
@halves
def test_every_configuration_around_its_tile(put, kind, dtype):
    """Whole numbers, exact in float32: one code dropped, doubled or misplaced shows."""
    for config, name in enumerate(cuda.configs(packing_of(kind, dtype))):
        n, m = (int(part[1:]) for part in name.split("_")[:2])
        for turn, (rows, batch, cols) in enumerate(
            [(m, n, 64), (m - 1, n - 1, 61), (m + 1, n + 1, 68), (2 * m + 3, 1, 128), (1, 9, 196)]
        ):
            weight = random_codes(
                kind, rows, columns(kind, cols), GROUPS[turn % 3], HALVES[turn % 2], whole=True
            )
            assert_exact(put, weight, dtype, batch, (config, 1), f"{name}: {rows}x{cols}, batch {batch}")


@kinds
def test_every_configuration_with_every_number_of_splits(put, kind):
    # More blocks of columns than a ring has stages, so that it turns; and numbers that splits do not divide.
    for config, name in enumerate(cuda.configs(packing_of(kind, torch.bfloat16))):
        for turn, blocks in enumerate((1, 2, 5, 11)):
            weight = random_codes(kind, 33, blocks * 64 - 4, GROUPS[(turn + config) % 3], whole=True)
            for splits in sorted({1, 2, 3, 4, blocks - 1, blocks} - {0}):
                if splits <= blocks:
                    what = f"{name}: {blocks} blocks of columns, {splits} splits"
                    assert_exact(put, weight, torch.bfloat16, 9, (config, splits), what)


@kinds
@pytest.mark.parametrize("group", GROUPS)
def test_groups_and_inputs_of_any_strides(put, kind, group):
    weight = random_codes(kind, 40, 324, group, torch.bfloat16, whole=True)
    for config, name in enumerate(cuda.configs(packing_of(kind, torch.float16))):
        for arrangement in INPUTS:
            assert_exact(put, weight, torch.float16, 7, (config, 2), f"{name}: {arrangement}", arrangement)


@kinds
@halves
@pytest.mark.parametrize("scales", HALVES)
def test_linear_is_float64s_of_the_same_numbers(put, kind, dtype, scales):
    for turn, (rows, cols) in enumerate(
        [(1, 4), (17, 68), (33, 128), (40, 132), (64, 576), (31, 1028), (5, 2100)]
    ):
        weight = random_codes(kind, rows, cols, GROUPS[turn % 3], scales)
        packed = weight.pack(dtype, put)
        for batch in (1, 2, 9, 33) if cols < 1000 else (1, 5):
            seed = generator(rows, cols, batch)
            x = torch.randn(batch, cols, generator=seed)
            x = (x * torch.where(torch.rand(batch, cols, generator=seed) < 0.02, 20, 1)).to(dtype)
            bias = torch.randn(rows, generator=seed).to(dtype) if batch % 2 else None
            out = gpu_linear(put(x), packed, None if bias is None else put(bias))
            assert_gpu_codes_linear(out, x, weight, bias, f"{rows}x{cols}, batch {batch}")


@kinds
def test_what_is_not_finite_stays_in_its_row_and_zeros_give_the_bias(put, kind):
    weight = random_codes(kind, 20, 132, 64)
    x = torch.randn(6, 132, generator=generator(3)).bfloat16()
    packed = weight.pack(x.dtype, put)
    clean = gpu_linear(put(x), packed)
    x[1], x[3] = math.nan, math.inf
    x[4] = 0
    bias = torch.randn(20, generator=generator(4)).bfloat16()
    out = gpu_linear(put(x), packed, put(bias)).cpu()
    assert bool(out[1].isnan().all()) and not bool(out[3].isfinite().any())
    assert_same_bits(out[4], bias + 0.0)
    assert_same_bits(gpu_linear(put(x), packed)[[0, 2, 5]], clean[[0, 2, 5]].cpu())


@kinds
def test_empty_shapes(put, kind):
    for rows, cols, batch in [(0, 64, 3), (5, 0, 3), (5, 64, 0)]:
        packed = random_codes(kind, rows, cols, 64).pack(torch.float16, put)
        out = gpu_linear(put(torch.ones(batch, cols, dtype=torch.float16)), packed)
        assert_same_bits(out, torch.zeros(batch, rows, dtype=torch.float16))


@kinds
def test_gradients_are_those_of_the_dequantized_weight(put, kind):
    weight = random_codes(kind, 20, 132, 64)
    dense = dequantize(weight.encoding, *weight.parts, weight.cols, weight.group)
    x = put(torch.randn(3, 132, generator=generator(5)).bfloat16()).requires_grad_()
    grad = put(torch.randn(3, 20, generator=generator(6)).bfloat16())
    ops.linear(x, weight.pack(x.dtype, put)).backward(grad)
    torch.testing.assert_close(x.grad.cpu(), grad.cpu() @ dense.bfloat16())


@pytest.mark.parametrize("multiprocessors", [1, 8, 108, 132])
def test_plans_on_an_emulated_card_widen_with_the_batch_and_split_what_has_few_rows(multiprocessors):
    with emulated() as kernels:
        before = kernels.sm_count(0)
        kernels.set_sm_count(multiprocessors)
        try:
            for kind in GPU_KINDS:
                packing = packing_of(kind, torch.bfloat16)
                plans = [kernels.plan(0, packing, 4096, 4096, batch) for batch in (1, 8, 32, 128, 4096)]
                chosen = [kernels.configs(packing)[config] for config, _, _ in plans]
                assert chosen[:2] == ["n8_m32_k8"] * 2 and "n8_m32_k8" not in chosen[2:]
                assert len(set(chosen)) >= 3, chosen
                config, splits, workspace = kernels.plan(0, packing, 256, 65536, 1)
                assert (splits > 1) == (multiprocessors > 8) and config == 0
                assert workspace == (4 * splits * 256 if splits > 1 else 0)
        finally:
            kernels.set_sm_count(before)


# --- packed -----------------------------------------------------------------------------------------------------------


@gpus
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(GPU_KINDS),
    rows=st.integers(0, 70),
    cols=st.integers(0, 60),
    group=st.sampled_from(GROUPS),
    scales=st.sampled_from(HALVES),
    seed=st.integers(0, 2**32),
)
def test_packing_loses_nothing(gpu, kind, rows, cols, group, scales, seed):
    cols *= 4 if kind[0] == "octets" else 3
    weight = random_codes(kind, rows, cols, group, scales)
    with running(gpu, seed) as place:
        packed = weight.pack(torch.bfloat16, place.put)
        for got, part in zip(unpack_codes(packed), weight.parts, strict=True):
            assert (got is None) == (part is None)
            if got is not None:
                assert_same_bits(got, part)
        assert torch.equal(packed.blob, weight.pack(torch.bfloat16, place.put).blob), (
            "equal weights, equal blobs"
        )


@kinds
def test_bits_of_a_weight(put, kind):
    for group, of_scales in (
        (32, 0.5),
        (64, 0.25),
        (128, 0.25),
    ):  # those of 128 are there for each 64 columns
        codes = {"int8": 8, "int4": 4, "int4_minimum": 4}[kind[1]]
        bits = codes / 2 + 1 if kind[0] == "octets" else codes
        bits += of_scales * (2 if kind[1] == "int4_minimum" else 1)
        blob = random_codes(kind, 64, 256, group).pack(torch.bfloat16, put).blob
        assert 8 * (blob.numel() - 64) == bits * 64 * 256


@kinds
def test_every_flipped_bit_of_a_header_is_found(put, kind):
    good = random_codes(kind, 20, 132, 64).pack(torch.float16, put)
    for bit in range(8 * 64):
        blob = good.blob.cpu().clone()
        blob[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="packed: "):
            unpack_codes(good._replace(blob=put(blob)))


@kinds
def test_truncated_and_shifted_blobs_are_refused(put, kind):
    good = random_codes(kind, 20, 132, 64).pack(torch.float16, put)
    blob, x = good.blob.cpu(), put(torch.ones(2, 132, dtype=torch.float16))
    sizes = (0, 63, 64, len(blob) // 2, len(blob) - 64, len(blob) - 1)
    for bad in [*(blob[:size].clone() for size in sizes), torch.cat([blob, blob[:64]])]:
        for read in (lambda b: ops.linear(x, b), unpack_codes):
            with pytest.raises(ValueError, match="packed: "):
                read(good._replace(blob=put(bad)))
    with pytest.raises(ValueError, match="packed: must begin at a multiple of 16 bytes"):
        ops.linear(x, good._replace(blob=put(torch.cat([blob[:1], blob]))[1:]))
    with pytest.raises(ValueError, match="packed: holds no weight of 20x132 float16 "):
        ops.linear(x, good._replace(packing=packing_of(kind, torch.float16, 32)))


def test_a_mask_that_keeps_other_than_its_header_says_is_found(put):
    good = random_codes(("octets", "int4"), 20, 132, 64).pack(torch.float16, put)
    blob = good.blob.cpu().clone()
    blob[64 + 512] = (
        0  # the first places of the first unit: two values of a group are said to lie in column 0
    )
    with pytest.raises(
        ValueError, match=r"packed: must keep the 1320 values .* got a mask of 131[89]; the weight"
    ):
        unpack_codes(good._replace(blob=put(blob)))


@pytest.mark.parametrize(
    ("layout", "dtype", "encoding"),
    [
        ("fragments", torch.float32, "int4"),
        ("fragments24", torch.float32, "int8"),
        ("fragments24", torch.float16, "int4_minimum"),
        ("sparse24", torch.float16, "int8"),
        ("bitmap8", torch.bfloat16, "int4"),
    ],
)
def test_packings_that_no_emulated_kernel_serves_have_no_number(layout, dtype, encoding):
    with emulated() as kernels:
        code = packing_code(layout, dtype, encoding, 64, torch.float16)
        with pytest.raises(ValueError, match="packing: must be a number that packing"):
            kernels.configs(code)
        for layout in ("fragments", "fragments24"):
            with pytest.raises(ValueError, match="packing: must be a number that packing"):
                kernels.configs(packing_code(layout, torch.bfloat16))


def test_2_4_codes_come_in_whole_fours_when_emulated():
    packing = packing_of(("octets", "int4"), torch.bfloat16)
    with (
        emulated() as kernels,
        pytest.raises(ValueError, match="cols: must be a multiple of 4 for layout fragments24"),
    ):
        kernels.sections(20, 130, packing, 0)


@gpus
def test_codes_of_the_other_processor_are_refused(gpu):
    x = torch.ones(2, 132, dtype=torch.float16)
    for kind in GPU_KINDS:
        weight = random_codes(kind, 20, 132, 64)
        of_cpu = weight.pack(torch.float16)
        with running(gpu) as place:
            of_gpu = weight.pack(torch.float16, place.put)
            moved = of_cpu._replace(blob=place.put(of_cpu.blob))
            for call in (lambda b: ops.linear(place.put(x), b), unpack_codes):
                with pytest.raises(ValueError, match="move the layer with .to.device., not its buffer alone"):
                    call(moved)
        moved = of_gpu._replace(blob=of_gpu.blob.cpu())
        for call in (lambda b: ops.linear(x, b), unpack_codes):
            with pytest.raises(ValueError, match="packed: holds a weight packed for CUDA; move the layer"):
                call(moved)


# --- lookup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSE, ids="-".join)
@pytest.mark.parametrize("group", GROUPS)
@halves
def test_looked_up_rows_are_the_dequantized_ones(put, kind, group, dtype):
    for turn, (rows, cols) in enumerate([(1, 1), (17, 33), (40, 127), (33, 129), (70, 192), (3, 577)]):
        weight = random_codes(kind, rows, cols, group, HALVES[turn % 2])
        packed = weight.pack(dtype, put)
        dense = dequantize(weight.encoding, *weight.parts, cols, group).to(dtype)
        every = torch.randperm(rows, generator=generator(turn))
        assert_same_bits(lookup(packed, put(every)), dense[every], f"{rows}x{cols}")
        some = torch.randint(0, rows, (2, 3), dtype=torch.int32, generator=generator(turn))
        assert_same_bits(ops.lookup(put(some), packed), dense[some], f"{rows}x{cols}, int32")


def test_what_is_not_a_row_is_nan_and_nothing_is_nothing(put):
    weight = random_codes(("quads", "int4"), 20, 132, 64)
    packed = weight.pack(torch.bfloat16, put)
    out = ops.lookup(put(torch.tensor([3, 20, -1, 2**40, -(2**62), 19])), packed).cpu()
    assert bool(out[1:5].isnan().all()) and bool(out[[0, 5]].isfinite().all())
    for rows, cols, shape in [(5, 64, (0,)), (5, 64, (2, 0)), (5, 0, (3,)), (0, 64, (0,))]:
        empty = random_codes(("quads", "int8"), rows, cols, 64).pack(torch.float16, put)
        assert ops.lookup(put(torch.zeros(shape, dtype=torch.int64)), empty).shape == (*shape, cols)
    two_four = random_codes(("octets", "int4"), 20, 132, 64).pack(torch.bfloat16, put)
    with pytest.raises(
        ValueError, match="packed: must hold a dense weight .* got bfloat16 int4 in layout fragments24"
    ):
        ops.lookup(put(torch.tensor([1])), two_four)


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_of(form: str, encoding: str, dtype: torch.dtype) -> sp.SparseLinear:
    torch.manual_seed(0)
    dense = torch.nn.Linear(132, 24).to(dtype)
    with torch.no_grad():
        if form != "dense":
            dense.weight.view(24, 33, 4)[:, :, 1:3] = 0
    return sp.SparseLinear.from_dense(dense, form, encoding)


@gpus
@pytest.mark.parametrize(
    ("form", "encoding"),
    [("dense", "int8"), ("dense", "int4"), ("dense", "int4_minimum"), ("2:4", "int8"), ("2:4", "int4")],
)
@halves
def test_layers_of_a_cpu_and_of_a_gpu_hold_the_same_weight(gpu, form, encoding, dtype):
    layer = layer_of(form, encoding, dtype)
    weight, x = layer.sparse_weight(), torch.randn(5, 132, generator=generator(1)).to(dtype)
    expected = layer(x)
    with running(gpu) as place, torch.no_grad():
        moved = sp.SparseLinear.from_weight(weight.to(device=place.device), layer.bias.to(place.device))
        assert moved.packed_weight.layout == ("fragments24" if form == "2:4" else "fragments")
        out = moved(place.put(x)).cpu()
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.03)  # the CPU rounds activations to int8
        assert torch.equal(copy.deepcopy(moved)(place.put(x)).cpu(), out)
        torch.compiler.reset()  # a module's numbers are part of the code, which is compiled anew only so often
        compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(place.put(x)).cpu(), out)
        dense = moved.to_dense()
        torch.testing.assert_close(dense(place.put(x)).cpu(), out, rtol=0.02, atol=0.03)
        again = moved.sparse_weight().to(device="cpu")
    for name, part in again.parts().items():
        assert torch.equal(part, weight.parts()[name])
    assert torch.equal(again.pack().blob, layer.packed)


@gpus
def test_float32_is_refused_by_name_and_the_layer_stays_whole(gpu):
    layer = layer_of("dense", "int4", torch.float32)
    weight, x = layer.sparse_weight(), torch.randn(2, 132, generator=generator(2))
    says = "dtype: int8 and int4 weights compute in bfloat16 or float16 on .*, got float32; cast with .to.torch.bfloat16."
    remedy = ".*, or keep it on the CPU" if gpu == "cuda" else ""
    with running(gpu) as place, pytest.raises(ValueError, match=says + remedy):
        sp.SparseLinear.from_weight(weight.to(device=place.device))
    if gpu == "cuda":
        expected = layer(x)
        with pytest.raises(ValueError, match=says):
            layer.to("cuda")
        assert torch.equal(layer(x), expected)
        layer.to("cuda", torch.bfloat16)
        assert layer(x.cuda().bfloat16()).dtype == torch.bfloat16
    else:
        with running(gpu):
            there = layer_of("dense", "int4", torch.bfloat16)
            out = there(x.bfloat16())
            with pytest.raises(ValueError, match=says):
                there.float()
            assert torch.equal(there(x.bfloat16()), out)
            there.half()
            assert there(x.half()).dtype == torch.float16


@gpus
@pytest.mark.parametrize("form", ["bitmap", "3:4"])
def test_codes_with_zeros_elsewhere_are_refused_by_name_and_the_layer_stays_whole(gpu, form, monkeypatch):
    layer = layer_of(form, "int4", torch.bfloat16)
    weight, x = layer.sparse_weight(), torch.randn(2, 132, generator=generator(2)).bfloat16()
    expected = layer(x)
    says = (
        f"format: must be dense or 2:4 for int8 and int4 weights on .*, got {form}; keep the layer on the CPU, or make it "
        "dense with to_dense"
    )
    with running(gpu) as place:
        there = weight.to(device=place.device)
        linear = torch.nn.Linear(132, 24, device=place.device, dtype=torch.bfloat16)
        with torch.no_grad():
            linear.weight.copy_(there.dense())
        for door in (
            there.pack,
            there.require_kernels,
            lambda: sp.SparseLinear.from_weight(there),
            lambda: sp.SparseLinear.from_dense(linear, form, "int4"),
            lambda: sp.SparseLinear(
                132, 24, format=form, encoding="int4", dtype=x.dtype, device=place.device
            ),
        ):
            with pytest.raises(ValueError, match=says):
                door()
    if gpu == "cuda":
        with pytest.raises(ValueError, match=says):
            layer.to("cuda")
    else:  # no tensor moves to the emulated one: a cast goes the same way as a move
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=says):
            patch.setattr(native, "layout_of_codes", cuda.layout_of_codes)
            layer.half()
    assert torch.equal(layer(x), expected)


@gpus
def test_an_embedding_and_its_tied_head_move_as_one(gpu):
    with running(gpu) as place:
        torch.manual_seed(0)
        dense = torch.nn.Embedding(40, 70).bfloat16().to(place.device)
        embedding = sp.SparseEmbedding.from_dense(dense, "int4")
        head = sp.SparseLinear.tied_to(embedding)
        assert head.packed is embedding.packed and embedding.packed_weight.layout == "fragments"
        ids = place.put(torch.tensor([[3, 0, 39], [3, 7, 1]]))
        rows = embedding(ids)
        assert torch.equal(rows, embedding.weight[ids])
        torch.testing.assert_close(head(rows), rows @ embedding.weight.t(), rtol=0.02, atol=0.02)


@gpus
@pytest.mark.parametrize(("encoding", "error"), [("int8", 0.01), ("int4", 0.2)])
def test_a_model_is_quantized_where_it_lies(gpu, encoding, error):
    with running(gpu) as place, torch.no_grad():
        torch.manual_seed(0)
        model = (
            torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Linear(96, 32)).bfloat16().to(place.device)
        )
        x = place.put(torch.randn(4, 128, generator=generator(3)).bfloat16())
        expected = model(x).float()
        sp.quantize(model, encoding)
        assert [it.packed_weight.layout for it in model] == ["fragments", "fragments"]
        assert float((model(x).float() - expected).norm() / expected.norm()) < error


@gpus
@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_what_was_pruned_becomes_codes_that_a_gpu_has_kernels_for(gpu, encoding):
    """On a CPU, the first would become a bitmap, the second 3:8."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(3))).bfloat16()
    for layer, pattern in zip(model, ("60%", "3:8", "2:4"), strict=True):
        with torch.no_grad():
            layer.weight.mul_(mask(128, 128, pattern, generator(4)))
    zeros = [layer.weight == 0 for layer in model]
    on_cpu = sp.quantize(copy.deepcopy(model), encoding)
    assert [it.format for it in on_cpu.layers] == ["bitmap", "3:8", "2:4"]
    with running(gpu) as place, torch.no_grad():
        model.to(place.device)
        report = sp.quantize(model, encoding)
        assert [it.format for it in report.layers] == ["dense", "dense", "2:4"]
        assert [it.packed_weight.layout for it in model] == ["fragments", "fragments", "fragments24"]
        for layer, zero in zip(model, zeros, strict=True):
            assert not bool(layer.weight.cpu()[zero].any())
