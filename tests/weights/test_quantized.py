"""Weights in int8 and int4: rounding, the canonical form and what it refuses, and the layer over them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.shapes import generator, mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseprune as sp
from sparseprune.weights import rounding
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.rounding import codes_of, fit_grid
from sparseprune.weights.sparse_weight import SparseWeight

FORMS = [
    ("dense", "int8"),
    ("dense", "int4"),
    ("dense", "int4_minimum"),
    ("2:4", "int8"),
    ("2:4", "int4"),
    ("3:4", "int8"),
    ("1:4", "int4"),
    ("bitmap", "int8"),
    ("bitmap", "int4"),
]
forms = pytest.mark.parametrize(("form", "encoding"), FORMS)


def weight_of(
    form: str, rows: int = 24, cols: int = 132, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    seed = generator(rows, cols)
    weight = torch.randn(rows, cols, generator=seed)
    return (weight * mask(rows, cols, "50%" if form == "bitmap" else form, seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    rows=st.integers(1, 20),
    fours=st.integers(1, 50),
    group=st.sampled_from([32, 64, 128]),
    scales=st.sampled_from([torch.float16, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trips(form, rows, fours, group, scales, dtype):
    kind, encoding = form
    dense = weight_of(kind, rows, 4 * fours, dtype)
    weight = SparseWeight.from_dense(dense, kind, Encoding(encoding, group, scales))
    weight.validate()
    assert weight.dense().dtype == dtype
    assert weight.nnz == (rows * 4 * fours if kind == "dense" else int(dense.count_nonzero()))
    for again in (SparseWeight.unpack(weight.pack(), weight.spec), SparseWeight.from_parts(weight.parts())):
        assert again.spec == weight.spec and set(again.parts()) == set(weight.spec.part_names)
        for name, part in again.parts().items():
            assert torch.equal(part, weight.parts()[name])
    if kind != "dense":
        assert not bool(weight.dense()[dense == 0].any()), "what was pruned stays zero"


@forms
def test_blocks_of_rows_are_rounded_as_the_whole(form, encoding, monkeypatch):
    dense = weight_of(form, rows=37)
    whole = SparseWeight.from_dense(dense, form, encoding)
    monkeypatch.setattr(rounding, "_AT_ONCE", 5 * 132)
    for name, part in SparseWeight.from_dense(dense, form, encoding).parts().items():
        assert torch.equal(part, whole.parts()[name])


@forms
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_nothing_is_rounded_to_nothing(form, encoding, shape):
    weight = SparseWeight.from_dense(torch.zeros(shape), form, encoding)
    weight.validate()
    assert weight.dense().shape == shape and weight.nnz == 0


@forms
def test_every_weight_is_within_half_a_step(form, encoding):
    dense = weight_of(form, dtype=torch.float32)
    weight = SparseWeight.from_dense(dense, form, encoding)
    step = weight.scales.float().abs().repeat_interleave(64, 1)[:, :132]
    error = (weight.dense() - dense).abs()
    clipped = error > step * 0.502  # half a step, and the rounding of scales and minimums to float16
    assert float(clipped.float().mean()) < 0.05, "few are clipped"
    assert bool((error <= step * 3).all())


def test_the_grid_is_better_than_the_one_that_reaches_the_largest_weight():
    weight = torch.randn(64, 256, generator=generator(3))
    groups = weight.view(64, 4, 64)
    naive = groups.abs().amax(-1, keepdim=True) / 7
    error = ((groups / naive).round() * naive - groups).square().mean()
    for encoding in ("int4", "int4_minimum"):
        grid = fit_grid(weight, Encoding.parse(encoding))
        assert float((codes_of(weight, grid)[1] - weight).square().mean()) < 0.85 * float(error)


@forms
def test_what_is_on_the_grid_stays(form, encoding):
    weight = SparseWeight.from_dense(weight_of(form, dtype=torch.float32), form, encoding)
    grid = fit_grid(weight.dense(), weight.encoding)
    grid.scales, grid.minimums = weight.scales, weight.minimums
    assert torch.equal(
        codes_of(weight.dense(), grid)[1][weight.dense() != 0], weight.dense()[weight.dense() != 0]
    )


@forms
def test_groups_of_zeros_and_constants(form, encoding):
    dense = torch.zeros(3, 128)
    dense[1, 64::4] = 0.25
    dense[2, ::4] = -0.25
    weight = SparseWeight.from_dense(dense, form, encoding)
    torch.testing.assert_close(
        weight.dense(), dense, rtol=0.01, atol=2e-4 if encoding == "int4_minimum" else 0
    )


def test_what_cannot_be_quantized_is_named():
    dense = torch.ones(4, 64)
    with pytest.raises(
        ValueError,
        match="scales and minimums within torch.float16, got weights up to 1e.20; use bfloat16 scales",
    ):
        SparseWeight.from_dense(dense * 1e20, "dense", "int4")
    dense[1, 3] = torch.nan
    with pytest.raises(ValueError, match="weight: must be finite to be quantized, got NaN or Inf"):
        SparseWeight.from_dense(dense, "dense", "int8")
    for form, encoding, message in [
        ("dense", "plain", "format: dense is for int8 and int4 values, got plain ones"),
        ("csr", "int4", "format: must be dense, N:M or bitmap for int4 values, got csr; use bitmap"),
        (
            "2:4",
            "int4_minimum",
            "format: must be dense for values with minimums, which .*, got 2:4; use int4",
        ),
        (
            "bitmap",
            "int4_minimum",
            "format: must be dense for values with minimums, which .*, got bitmap; use int4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            SparseWeight.from_dense(torch.zeros(4, 64), form, encoding)
    with pytest.raises(ValueError, match="encoding: group_size must be 32, 64 or 128 for int4, got 48"):
        Encoding("int4", 48, torch.float16)
    with pytest.raises(
        ValueError, match="encoding: scale_dtype must be float16 or bfloat16 for int8, got torch.float32"
    ):
        Encoding("int8", 64, torch.float32)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", lambda t: t.index_fill(1, torch.tensor([1]), torch.nan), "scales: must be finite, got NaN or Inf in row 0"),
        ("scales", lambda t: t.float(), "scales: dtype must be torch.float16, as spec says, got torch.float32"),
        ("scales", lambda t: t[:, :1], r"scales: shape must be \(5, 2\)"),
        ("minimums", lambda t: t * torch.inf, "minimums: must be finite"),
        ("values", lambda t: t[:-1], r"values: shape must be \(163,\) for a weight of 5 x 65, got|values: shape must be"),
        ("values", lambda t: t | 0xF0, "values: the high nibble past 325 codes must be 0, got 15"),
        ("spec", lambda t: t[:9], "spec: version 2 has 10 integers, got 9"),
        ("spec", lambda t: t.index_fill(0, torch.tensor([8]), 48), "spec: encoding: group_size must be 32, 64 or 128"),
        ("spec", lambda t: t.index_fill(0, torch.tensor([9]), 0), "spec: encoding: scale_dtype must be float16 or bfloat16"),
        ("spec", lambda t: t.index_fill(0, torch.tensor([1]), 2), "spec: format: must be dense for values with minimums, .* got bitmap"),
    ],
)  # fmt: skip
def test_parts_that_lie_are_refused(part, change, message):
    weight = SparseWeight.from_dense(torch.randn(5, 65, generator=generator(4)), "dense", "int4_minimum")
    parts = weight.parts()
    parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_parts(parts)
    del parts["minimums"]
    if part != "spec":
        with pytest.raises(ValueError, match="minimums: missing"):
            SparseWeight.from_parts(parts)


@pytest.mark.parametrize(
    ("encoding", "part", "change", "message"),
    [
        ("int8", "values", lambda t: t[:-1], r"values: shape must be \(\d+,\) for a weight of 5 x 65 whose mask keeps \d+, got"),
        ("int4", "values", lambda t: torch.cat([t, t]), r"values: shape must be \(\d+,\) for a weight of 5 x 65 whose mask keeps"),
        ("int8", "mask", lambda t: t.bitwise_xor(1), r"values: shape must be \(\d+,\) for a weight of 5 x 65 whose mask keeps"),
        ("int4", "mask", lambda t: t | 2, "mask: bits past column 64 must be 0, got a 1 in row 0"),
        ("int4", "scales", lambda t: t * torch.inf, "scales: must be finite, got NaN or Inf in row 0"),
        ("int8", "scales", lambda t: t[1:], r"scales: shape must be \(5, 2\)"),
        ("int4", "spec", lambda t: t.index_fill(0, torch.tensor([7]), 3), "spec: format: must be dense for values with minimums"),
        ("int8", "spec", lambda t: t.index_fill(0, torch.tensor([1]), 3), "spec: format: must be dense, N:M or bitmap for int8"),
        ("int8", "spec", lambda t: t.index_fill(0, torch.tensor([1]), 4), r"values: shape must be \(325,\)"),
    ],
)  # fmt: skip
def test_parts_of_a_bitmap_that_lie_are_refused(encoding, part, change, message):
    dense = torch.randn(5, 65, generator=generator(4))
    dense[:, 1::2] = 0
    parts = SparseWeight.from_dense(dense, "bitmap", encoding).parts()
    assert int(parts["mask"][0, 0]) & 3 == 1
    parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_parts(parts)


def test_codes_of_another_pattern_than_the_spec_says_are_refused():
    parts = SparseWeight.from_dense(weight_of("3:4"), "3:4", "int4").parts()
    parts["spec"][2] = 2  # n
    with pytest.raises(
        ValueError, match="mask: every group of 4 columns must keep 2 for 2:4, got 3 in row 0"
    ):
        SparseWeight.from_parts(parts)


@pytest.mark.parametrize(
    ("form", "encoding", "bits"),
    [("bitmap", "int4", 3.25), ("bitmap", "int8", 5.25), ("6:8", "int4", 4.25), ("1:4", "int4", 2.25)],
)
def test_bits_a_weight_and_the_packed_form_takes_no_more(form, encoding, bits):
    dense = weight_of("2:4" if form == "bitmap" else form, 64, 2048)
    weight = SparseWeight.from_dense(dense, form, encoding)
    assert weight.bits_per_weight == bits
    packed = weight.pack()
    assert 8 * packed.blob.numel() / dense.numel() < bits + 0.02 and packed.layout == "bitquads"


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("kept", [4, 8])
def test_columns_that_repeat_fill_both_streams_of_nibbles(period, kept):
    dense = weight_of("dense", 64, 2048)
    dense[:, torch.arange(2048) % period >= kept] = 0
    weight = SparseWeight.from_dense(dense, "bitmap", "int4")
    assert 8 * weight.pack().blob.numel() / dense.numel() < weight.bits_per_weight + 0.02


def layer_of(
    form: str, encoding: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Linear, sp.SparseLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(132, 24).to(dtype)
    with torch.no_grad():
        dense.weight.copy_(weight_of(form, dtype=dtype) / 10)
    return dense, sp.SparseLinear.from_dense(copy.deepcopy(dense), form, encoding)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_is_close_to_the_dense_one(form, encoding, dtype):
    dense, layer = layer_of(form, encoding, dtype)
    x = torch.randn(5, 132, generator=generator(5)).to(dtype)
    with torch.no_grad():
        expected = dense(x).float()
        error = (layer(x).float() - expected).norm() / expected.norm()
    assert layer(x).dtype == dtype and float(error) < (0.02 if encoding == "int8" else 0.12)
    assert f"format={form}, values={encoding}, groups of 64" in repr(layer)
    twin = layer.to_dense()
    assert torch.equal(twin.weight, layer.sparse_weight().dense())
    assert layer.sparse_weight().nbytes < 24 * 132 * 2 * 0.6  # of bfloat16


@forms
def test_the_layer_moves_between_processes_and_state_dicts(form, encoding):
    _, layer = layer_of(form, encoding)
    x = torch.randn(3, 132, generator=generator(6)).bfloat16()
    expected = layer(x)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    for other in ((form, encoding), ("2:4", "plain")):  # a state dict brings its format and encoding along
        place = sp.SparseLinear(132, 24, format=other[0], encoding=other[1], dtype=torch.bfloat16)
        place.load_state_dict(layer.state_dict())
        assert torch.equal(place(x), expected) and place.encoding == layer.encoding
    scales = layer.sparse_weight().scales
    layer.float()
    assert layer.dtype == torch.float32 and torch.equal(layer.sparse_weight().scales, scales)
    torch.testing.assert_close(layer(x.float()), expected.float(), rtol=0.02, atol=0.02)


def test_what_has_no_data_is_not_packed():
    _, layer = layer_of("dense", "int4")
    with pytest.raises(ValueError, match="codes: a weight on the meta device has no data; load a state dict"):
        layer.sparse_weight().to(device="meta").pack()


@forms
def test_saved_and_loaded(tmp_path, form, encoding):
    _, layer = layer_of(form, encoding)
    model = nn.Sequential(layer)
    sp.save(model, tmp_path / "out")
    again = sp.load(tmp_path / "out", model=nn.Sequential(nn.Linear(132, 24).bfloat16()))
    x = torch.randn(3, 132, generator=generator(7)).bfloat16()
    assert torch.equal(again(x), model(x)) and again[0].spec == layer.spec
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 24 * 132 * 2 * 0.7 + 2048
