"""`quantize()`: which linears get which codes, what GPTQ gains, what is refused, and a GGUF file's own codes."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.shapes import generator
from torch import nn

import sparseprune as sp
from sparseprune.models import notes
from sparseprune.quantization.methods import METHODS
from sparseprune.recovery import to_dense
from sparseprune.statistics.inputs import Gram
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.gguf import StoredCodes
from sparseprune.weights.rounding import codes_of
from sparseprune.weights.sparse_weight import SparseWeight

BATCHES = [tiny.ids(2, 32, seed) for seed in range(6)]


def logits(model: nn.Module, ids: torch.Tensor = BATCHES[0]) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def layers_of(model: nn.Module) -> dict[str, sp.SparseLinear]:
    return {name: it for name, it in model.named_modules() if isinstance(it, sp.SparseLinear)}


@pytest.mark.parametrize("encoding", ["int8", "int4", "int4_minimum"])
def test_every_linear_is_quantized_and_the_report_begins_with_the_share(encoding):
    model = tiny.llama()
    before = logits(model)
    report = sp.quantize(model, encoding)
    assert len(layers_of(model)) == len(report.layers) == 14
    assert {(it.format, it.encoding, it.method) for it in report.layers} == {("dense", encoding, "nearest")}
    error = float((logits(model) - before).norm() / before.norm())
    assert error < (0.02 if encoding == "int8" else 0.3)
    linears = sum(it.in_features * it.out_features for it in layers_of(model).values())
    assert report.quantized_weights == linears and f"quantized {linears:,} of" in str(report)
    assert report.bytes_after < report.bytes_before and report.to_dict()["layers"][0]["method"] == "nearest"


def test_what_was_pruned_to_two_of_four_becomes_two_of_four_codes():
    model = tiny.llama()
    sp.prune(model, "2:4", exclude="*down_proj")
    zeros = {name: it.weight == 0 for name, it in model.named_modules() if isinstance(it, nn.Linear)}
    report = sp.quantize(model, "int4_minimum", group_size=32)
    formats = {it.name.rpartition(".")[2]: (it.format, it.encoding) for it in report.layers}
    assert formats.pop("down_proj") == ("dense", "int4_minimum")
    assert set(formats.values()) == {("2:4", "int4")}, "2:4 has no minimums"
    for name, layer in layers_of(model).items():
        if layer.format.kind == "nm":
            assert not bool(layer.weight[zeros[name]].any())
            assert layer.sparse_weight().bits_per_weight == pytest.approx(
                3.5 if layer.in_features % 32 == 0 else 3.6, abs=0.2
            )


@pytest.mark.parametrize("encoding", ["int4", "int8", "int4_minimum"])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize(
    ("pattern", "form"), [("unstructured", "bitmap"), ("1:4", "1:4"), ("4:8", "4:8")], ids=str
)
def test_what_was_pruned_becomes_sparse_codes(encoding, method, pattern, form):
    model = tiny.llama()
    sp.prune(model, pattern, sparsity=0.6 if pattern == "unstructured" else None)
    zeros = {name: it.weight == 0 for name, it in model.named_modules() if isinstance(it, nn.Linear)}
    data = BATCHES if method == "gptq" else None
    before = {name: int((~it).sum()) for name, it in zeros.items()}
    report = sp.quantize(model, encoding, method, calibration=data)
    assert {(it.format, it.encoding) for it in report.layers} == {(form, encoding.removesuffix("_minimum"))}
    for name, layer in layers_of(model).items():
        assert not bool(layer.weight[zeros[name]].any()), name
        assert layer.nnz == before[name], name
    assert "were zero" not in str(report)


@pytest.mark.parametrize(
    ("encoding", "fewest"), [("int4", 0.25), ("int8", 0.125), ("int4_minimum", 0.1875)], ids=str
)
def test_a_bitmap_is_taken_where_it_takes_fewer_bytes_than_dense_codes(encoding, fewest):
    for step, form in ((-0.02, "dense"), (0.02, "bitmap")):
        model = nn.Sequential(nn.Linear(512, 64))
        with torch.no_grad():
            model[0].weight[torch.rand(64, 512, generator=generator(1)) < fewest + step] = 0
        (row,) = sp.quantize(model, encoding).layers
        dense = sp.quantize(nn.Sequential(nn.Linear(512, 64)), encoding).layers[0].bytes_after
        assert row.format == form and (row.bytes_after < dense) == (form == "bitmap")


@pytest.mark.parametrize("encoding", ["int4", "int8"])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_few_zeros_stay_zeros_in_dense_codes(encoding, method):
    model = tiny.llama()
    sp.prune(model, "unstructured", sparsity=0.08)
    zeros = {name: it.weight == 0 for name, it in model.named_modules() if isinstance(it, nn.Linear)}
    data = BATCHES if method == "gptq" else None
    assert {it.format for it in sp.quantize(model, encoding, method, calibration=data).layers} == {"dense"}
    for name, layer in layers_of(model).items():
        assert not bool(layer.weight[zeros[name]].any()), name


def test_zeros_that_minimums_lose_are_counted():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    sp.prune(model, "unstructured", sparsity=0.1, include="0")
    zeros = int((model[0].weight == 0).sum())
    report = sp.quantize(model, "int4_minimum")
    assert f"{zeros:,} weights were zero, for which int4_minimum has no code" in str(report)
    assert "zero" not in str(sp.quantize(nn.Sequential(nn.Linear(64, 32)), "int4_minimum"))


def one(weight: torch.Tensor) -> nn.Module:
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    linear.out_features, linear.in_features = weight.shape
    return nn.Sequential(linear)


@pytest.mark.parametrize("encoding", ["int8", "int4", "int4_minimum"])
def test_weights_of_any_size_are_quantized_well_or_refused(encoding):
    """Too small or too large for float16 scales: an error, and its remedy works."""
    weight = torch.rand(32, 64, generator=generator(3)) - 0.5
    for size in (1e-30, 1e-10, 1e-8, 1e-6, 1e-3, 1.0, 1e4, 1e8, 1e30):
        for scales in ("float16", "bfloat16"):
            try:
                (row,) = sp.quantize(one(weight * size), encoding, scale_dtype=scales).layers
            except ValueError as error:
                assert scales == "float16" and not 1e-3 <= size <= 1e4, size
                assert "0: weight: must have scales" in str(error) and "use bfloat16 scales" in str(error)
            else:
                assert row.error < (0.03 if encoding == "int8" else 0.1), (size, scales)


def test_minimums_beyond_float16_are_refused():
    weight = torch.rand(32, 64, generator=generator(3)) * 1000 - 80000
    weight[0, 0] = -80000
    with pytest.raises(
        ValueError, match=r"scales and minimums within torch.float16, got weights up to 80000"
    ):
        sp.quantize(one(weight), "int4_minimum")
    with pytest.raises(ValueError, match="scales and minimums within"):
        SparseWeight.from_dense(weight, "dense", "int4_minimum")


@pytest.mark.parametrize("encoding", ["int8", "int4", "int4_minimum"])
@pytest.mark.parametrize("shape", [(0, 64), (8, 0), (0, 0)])
def test_weights_without_entries(encoding, shape):
    model = one(torch.zeros(shape))
    sp.quantize(model, encoding)
    assert model(torch.zeros(3, shape[1])).shape == (3, shape[0])


def test_the_share_counts_layers_that_were_sparse_before():
    model = tiny.llama()
    total = sum(it.numel() for it in model.parameters())
    sp.quantize(model, "int8", include="*mlp*")
    assert sp.quantize(model, "int4").weights_of_model == total


@pytest.mark.parametrize("again", [sp.quantize, sp.sparsify, partial(sp.prune, pattern="2:4")])
def test_a_model_that_is_quantized_already_is_told_how_to_be_dense(again):
    model = nn.Sequential(nn.Linear(64, 32))
    sp.quantize(model)
    with pytest.raises(
        ValueError, match=r"; 1 are sparse or quantized already, sparseprune.recovery.to_dense\(model\)"
    ):
        again(model)
    again(to_dense(model))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("encoding", ["int4", "int4_minimum", "int8"])
def test_gptq_beats_rounding_on_the_outputs(encoding, masked):
    seed = generator(7)
    mix = torch.randn(96, 96, generator=seed) * torch.linspace(0.05, 1, 96)[:, None]
    inputs = torch.randn(600, 96, generator=seed) @ mix
    gram = Gram(96, torch.device("cpu"))
    gram.update(inputs)
    weight = torch.randn(40, 96, generator=seed)
    kept = torch.rand(40, 24, 4, generator=seed).argsort(-1).argsort(-1).view(40, 96) < 2 if masked else None
    if kept is not None:
        weight = weight * kept
    values = Encoding(encoding, 32, torch.float16)
    errors = {}
    for name, method in METHODS.items():
        codes, grid = method.solve(weight, kept, values, gram)
        scale, zero = grid.columns(0, 96)
        rounded = codes * scale + zero
        if kept is not None:
            rounded = rounded * kept
        errors[name] = float((inputs @ (rounded - weight).t()).norm())
        assert bool((codes == codes.round()).all())
    assert errors["gptq"] < (0.96 if masked else 0.8) * errors["nearest"], errors


def test_gptq_of_a_model_with_calibration_data():
    dense = tiny.llama(hidden_size=128, intermediate_size=192)
    expected = logits(dense)
    errors = {}
    for name, data in (("nearest", None), ("gptq", BATCHES)):
        model = copy.deepcopy(dense)
        report = sp.quantize(model, "int4", group_size=32, calibration=data)
        assert {it.method for it in report.layers} == {name}
        errors[name] = float((logits(model) - expected).norm())
    assert errors["gptq"] < errors["nearest"]


def test_saved_and_loaded_the_model_is_the_same(tmp_path):
    model = tiny.llama(tied=True)
    sp.quantize(model, "int4")
    sp.save(model, tmp_path / "out")
    assert torch.equal(logits(sp.load(tmp_path / "out")), logits(model))


SWAPS = pytest.mark.parametrize(
    "swap", [sp.quantize, partial(sp.sparsify, policy="always")], ids=["quantize", "sparsify"]
)


@SWAPS
def test_a_swap_keeps_the_bias_the_hooks_and_what_is_noted(swap):
    model = nn.Sequential(nn.Linear(64, 32))
    sp.prune(model, "2:4")
    bias, noted, seen = model[0].bias, notes.noted(model[0]), []
    before = model[0].register_forward_pre_hook(lambda *call: seen.append("before"))
    model[0].register_forward_hook(lambda *call: seen.append("after"))
    swap(model)
    assert isinstance(model[0], sp.SparseLinear)
    assert model[0].bias is bias and bias.requires_grad and notes.noted(model[0]) == noted is not None
    model(torch.randn(2, 64))
    before.remove()
    model(torch.randn(2, 64))
    to_dense(model)
    model(torch.randn(2, 64))
    assert seen == ["before", "after", "after", "after"] and notes.noted(model[0]) == noted


@SWAPS
def test_a_linear_that_is_the_whole_model_is_not_said_to_be_swapped(swap):
    model = nn.Linear(64, 32)
    sp.prune(model, "2:4")
    report = swap(model)
    assert "the model itself, which nothing holds; put it into an nn.Sequential" in report.layers[0].reason
    assert report.bytes_after == report.bytes_before


def test_an_embedding_that_cannot_be_codes_leaves_the_linears_as_they_were():
    model = tiny.llama(tied=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="model.embed_tokens: weight: must be finite to be quantized"):
        sp.quantize(model, "int8", embeddings="int8")
    assert not layers_of(model)
    with pytest.raises(
        ValueError, match="embeddings: Sequential has no embedding and no output head, got int8; leave"
    ):
        sp.quantize(nn.Sequential(nn.Linear(64, 4)), embeddings="int8")


def test_an_error_leaves_the_model_as_it_was():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj: weight: must be finite to be quantized"
    ):
        sp.quantize(model, "int4")
    assert not layers_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"encoding": "int3"}, ValueError, "encoding: must be one of int4, int4_minimum, int8, got 'int3'"),
        ({"method": "awq"}, ValueError, "method: must be one of auto, nearest, gptq, got 'awq'"),
        ({"method": "gptq"}, ValueError, "calibration: method gptq needs some, got None; pass"),
        ({"method": "nearest", "calibration": BATCHES}, ValueError, "calibration: method nearest looks at weights only"),
        ({"encoding": "int8", "calibration": BATCHES}, ValueError, "calibration: method nearest looks at weights only"),
        ({"group_size": 48}, ValueError, "group_size: must be 32, 64 or 128, got 48"),
        ({"group_size": 64.0}, ValueError, "group_size: must be 32, 64 or 128, got 64.0"),
        ({"method": None}, ValueError, "method: must be one of auto, nearest, gptq, got None"),
        ({"encoding": None}, ValueError, "encoding: must be one of int4, int4_minimum, int8, got None"),
        ({"scale_dtype": "float32"}, ValueError, "scale_dtype: must be one of float16, bfloat16, got 'float32'"),
        ({"include": "*nothing*"}, ValueError, "include: .*nothing"),
        ({"keep": "none.gguf"}, FileNotFoundError, "keep: there is no file none.gguf; pass the GGUF file"),
        ({"keep": __file__}, ValueError, "keep: .* is not a sound GGUF file"),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_anything_changes(arguments, kind, message):
    model = tiny.llama()
    with pytest.raises(kind, match=message):
        sp.quantize(model, **arguments)
    assert not layers_of(model)


# --- a GGUF file's own codes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    weights = {}
    for number, kind in enumerate(("Q4_0", "Q4_1", "Q8_0")):
        values = np.random.default_rng(number).standard_normal((24, 96)).astype(np.float32)
        values[3] = 0
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.{number}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        weights[kind] = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    writer.add_tensor("norm.weight", np.ones(96, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "encoding"), [("Q4_0", "int4"), ("Q4_1", "int4_minimum"), ("Q8_0", "int8")])
def test_codes_are_found_bit_by_bit_in_any_order_of_rows(gguf_file, kind, encoding, dtype):
    path, weights = gguf_file
    stored = StoredCodes.read(path)
    order = torch.randperm(24, generator=generator(9))
    found = stored.find(weights[kind][order].to(dtype))
    assert found is not None and (found.encoding.kind, found.encoding.group_size) == (encoding, 32)
    assert torch.equal(found.to(dtype=torch.float32).dense(), weights[kind][order]), "not by way of bfloat16"
    changed = weights[kind].to(dtype).clone()
    changed[5, 7] += 1
    assert stored.find(changed) is None
    assert stored.find(torch.cat([weights["Q4_0"][:4], weights["Q8_0"][:4]]).to(dtype)) is None


def test_quantize_keeps_what_the_file_has_and_rounds_the_rest(gguf_file):
    path, weights = gguf_file
    model = nn.Sequential(*(nn.Linear(96, 24) for _ in range(4)))
    with torch.no_grad():
        for layer, weight in zip(model, weights.values(), strict=False):
            layer.weight.copy_(weight)
    report = sp.quantize(model, "int4", keep=path)
    assert [(it.method, it.encoding) for it in report.layers] == [
        ("kept", "int4"), ("kept", "int4_minimum"), ("kept", "int8"), ("nearest", "int4"),
    ]  # fmt: skip
    assert "3 of 4 layers have the codes of tiny.gguf, bit by bit" in str(report)
    assert [it.error for it in report.layers[:3]] == [0, 0, 0]


def test_requantizing_a_kept_weight_changes_nothing(gguf_file):
    path, weights = gguf_file
    found = StoredCodes.read(path).find(weights["Q4_0"])
    from sparseprune.weights.rounding import Grid

    codes, rounded = codes_of(weights["Q4_0"], Grid(found.encoding, found.scales))
    assert torch.equal(rounded, weights["Q4_0"])
    again = SparseWeight.from_codes(codes, None, Grid(found.encoding, found.scales), found.spec)
    assert torch.equal(again.dense(), found.dense())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_embeddings_and_head_become_codes_and_are_stored_once(tmp_path, tied, embeddings):
    model = tiny.llama(tied=tied)
    before = logits(model)
    report = sp.quantize(model, "int8", embeddings=embeddings)
    rows = [it for it in report.layers if "embed" in it.name or "lm_head" in it.name]
    assert len(rows) == (1 if tied else 2) and {it.encoding for it in rows} == {embeddings}
    norms = sum(it.numel() for it in model.parameters())
    assert report.quantized_weights == report.weights_of_model - norms, "all but the norms"
    error = float((logits(model) - before).norm() / before.norm())
    assert error < (0.03 if embeddings == "int8" else 0.3)
    sp.save(model, tmp_path / "out")
    assert torch.equal(logits(sp.load(tmp_path / "out")), logits(model))


def test_int8_by_gptq_is_not_what_rounding_gives():
    model = tiny.llama()
    nearest = copy.deepcopy(model)
    report = sp.quantize(model, "int8", "gptq", calibration=BATCHES)
    sp.quantize(nearest, "int8", "nearest")
    assert {it.method for it in report.layers} == {"gptq"}
    rounded = layers_of(nearest)
    assert not any(torch.equal(it.weight, rounded[name].weight) for name, it in layers_of(model).items())
