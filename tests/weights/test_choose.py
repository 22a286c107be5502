"""Which form serves a weight: one answer, and what pruning noted comes before what a weight looks like."""

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseprune as sp
from sparseprune.io.inspection import inspect_model
from sparseprune.measure.benchmark import time_model
from sparseprune.models.notes import Note, digest_of, kept_bits, note, recall
from sparseprune.models.sites import find_sites, site_of
from sparseprune.streaming import prune_folder
from sparseprune.weights.choose import (
    best_of,
    fastest,
    options_for,
    packed_bytes,
    recognise,
    smallest,
    smallest_bytes,
)
from sparseprune.weights.format import Format
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import DTYPES

NM, BITMAP, CSR = Format("nm", 2, 4), Format("bitmap"), Format("csr")


def kept(rows, cols, *columns):
    """Zero but for these of every four columns."""
    weight = torch.zeros(rows, cols)
    for column in columns:
        weight[:, column::4] = torch.randn(rows, cols // 4) + 3
    return weight


def scattered(rows, cols, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(rows, cols, generator=generator) < density, 1.5, 0.0)


def noted(weight, pattern):
    return Note(pattern, digest_of(kept_bits(weight)))


# --- without a note -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8", "8:16"])
def test_nm_is_found_in_the_weights(pattern):
    n, m = map(int, pattern.split(":"))
    weight = torch.randn(48, 64)
    groups = weight.view(-1, m)
    groups.scatter_(1, torch.rand(groups.shape).argsort(1)[:, n:], 0.0)
    found = recognise(weight)
    assert (str(found.form), found.reason) == (pattern, f"{pattern} found in the weights")
    assert recognise(weight.double()) == found  # what has no kernels can be looked at all the same


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(48, 64),
        scattered(48, 64, 0.5),
        scattered(48, 64, 0.02),  # fits 2:4, and would keep half of the zeros
        scattered(128, 128, 0.001),  # fits 1:32 by chance, which would keep 30 times the values
        torch.zeros(8, 8),
        torch.zeros(0, 8),
        torch.ones(8, 7),
    ],
    ids=["dense", "half", "few", "hardly any", "zeros", "empty", "odd"],
)
def test_what_only_happens_to_fit_is_not_taken_for_nm(weight):
    assert recognise(weight).form is None


def test_the_reason_says_that_it_was_found_and_not_told():
    assert options_for(kept(16, 32, 1, 2)).reason == "2:4 found in the weights"
    assert options_for(scattered(16, 32, 0.5)).reason == "no pattern found in the weights"
    assert recognise(torch.ones(4, 4)).reason == "no zeros"


# --- with one -----------------------------------------------------------------------------------------------------------


def test_what_was_pruned_to_nm_is_nm_though_many_more_weights_are_zero():
    weight = kept(48, 64, 0, 3)
    groups = weight.view(-1, 4)
    groups[scattered(len(groups), 1, 0.2)[:, 0] > 0] = (
        0  # whole groups: 60 % zeros, nobody would take it for 2:4
    )
    assert recognise(weight).form is None
    found = options_for(weight, note=noted(weight, "2:4"))
    assert found.formats == (NM,) and found.reason == "pruned to 2:4"
    assert found.candidates[0].nnz == 48 * 32  # explicit zeros among them
    looks_like_less = kept(16, 32, 0)
    assert recognise(looks_like_less).form == Format("nm", 1, 4)
    assert recognise(looks_like_less, noted(looks_like_less, "2:4")).form == NM


@pytest.mark.parametrize("pattern", ["unstructured", "16x1", "4:64"])
def test_what_was_pruned_otherwise_is_not_nm_though_it_looks_like_it(pattern):
    weight = kept(16, 64, 1, 2)
    assert recognise(weight).form == NM
    found = options_for(weight, note=noted(weight, pattern))
    assert found.formats == (BITMAP,)
    assert found.reason == ("pruned unstructured" if pattern == "unstructured" else f"pruned to {pattern}")


def test_a_stale_note_is_not_believed():
    weight = kept(16, 32, 0, 1)
    told = noted(weight, "2:4")
    weight[3, 28:31] = 1.0
    weight[5] = 1.0
    found = options_for(weight, note=told)
    assert found.formats == (BITMAP,)
    assert found.reason == "was pruned to 2:4, no longer fits (row 3, group 7 keeps 3)"
    assert smallest(found).reason == found.reason
    fewer = options_for(weight[:, :30].contiguous(), note=told)
    assert fewer.reason == "was pruned to 2:4, no longer fits (30 columns are not a multiple of 4)"
    other = kept(16, 32, 0, 1, 2)
    found = options_for(other, note=told)
    assert found.formats == (Format("nm", 3, 4),)
    assert found.reason == (
        "was pruned to 2:4, no longer fits (row 0, group 0 keeps 3); 3:4 found in the weights"
    )


def test_a_note_about_other_zeros_is_not_believed_though_they_fit():
    told = noted(scattered(16, 32, 0.5), "unstructured")
    found = recognise(kept(16, 32, 0, 1), told)
    assert found.form == NM
    assert found.reason == "was pruned unstructured, its zeros are others now; 2:4 found in the weights"
    few = scattered(48, 64, 0.02)
    found = recognise(few, noted(kept(48, 64, 0, 1), "2:4"))
    assert (found.form, found.reason) == (None, "was pruned to 2:4, its zeros are others now")


def test_a_weight_that_has_become_zero_since_changes_nothing():
    weight = kept(48, 64, 0, 1)
    told = noted(weight, "2:4")
    weight[5, 0] = 0.0
    assert recognise(weight, told).reason == "pruned to 2:4"


def test_a_format_that_was_asked_for_comes_first():
    weight = kept(16, 32, 0, 1)
    assert options_for(weight, BITMAP, noted(weight, "2:4")).formats == (BITMAP,)
    assert options_for(weight, CSR).reason == "asked for"
    assert options_for(torch.ones(16, 32), BITMAP).formats == (BITMAP,)  # though it is no smaller
    refused = options_for(weight, Format("nm", 1, 4), noted(weight, "2:4"))
    assert (refused.formats, refused.reason) == (
        (), "1:4 was asked for and does not fit (row 0, group 0 keeps 2)"
    )  # fmt: skip


def test_no_form_that_is_larger_than_dense():
    found = options_for(scattered(16, 32, 0.99))
    assert found.formats == ()
    assert found.reason.startswith("too few zeros (") and found.reason.endswith(
        "no sparse format would be smaller"
    )
    weight = torch.ones(4, 32, dtype=torch.bfloat16)
    weight[:, 0] = 0  # 31:32, of 16 bits: the bit per weight takes more than the zeros save
    assert recognise(weight).form == Format("nm", 31, 32)
    assert options_for(weight).formats == ()


# --- which of them ------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    density=st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.6, 0.9]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_sizes_follow_without_packing(rows, cols, density, dtype, seed):
    weight = scattered(rows, cols, density, seed).to(dtype)
    told = noted(weight, "unstructured")
    options = options_for(weight, note=told)
    sizes = {
        it.format: SparseWeight.from_dense(weight, it.format).pack().blob.numel() for it in options.candidates
    }
    for it in options.candidates:
        assert packed_bytes(it.format, it.nnz, options.shape, dtype) == sizes[it.format]
    chosen = smallest(options)
    if sizes:
        assert sizes[chosen.format] == min(sizes.values())
    if len(sizes) == 2:
        assert chosen.reason.startswith("pruned unstructured; smallest (")
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    assert smallest_bytes((rows, cols), dtype, sparsity) <= min([weight.nbytes, *sizes.values()])


def test_explicit_zeros_count_in_the_size_of_nm():
    weight = kept(32, 64, 2)
    (candidate,) = options_for(weight, note=noted(weight, "2:4")).candidates
    packed = SparseWeight.from_dense(weight, "2:4").pack().blob.numel()
    assert packed_bytes(candidate.format, candidate.nnz, (32, 64), weight.dtype) == packed


def test_csr_is_tried_where_it_may_be_the_faster():
    for density, formats in ((0.05, (BITMAP, CSR)), (0.42, (BITMAP, CSR)), (0.5, (BITMAP,))):
        assert options_for(scattered(64, 64, density)).formats == formats


def test_the_fastest_of_those_that_never_lose():
    options = options_for(scattered(16, 64, 0.1))
    assert options.formats == (BITMAP, CSR)
    never_loses = fastest(options, {BITMAP: {1: 9.0, 8: 0.99}, CSR: {1: 1.1, 8: 1.2}})
    assert never_loses.format == CSR and never_loses.speedups == {1: 1.1, 8: 1.2}
    assert never_loses.reason == (
        "no pattern found in the weights; faster than dense and than bitmap 9.00/0.99"
    )
    dense = fastest(options, {BITMAP: {1: 0.9, 8: 3.0}, CSR: {1: 0.8, 8: 0.7}})
    assert dense.format is None and dense.speedups == {1: 0.9, 8: 3.0}
    assert dense.reason == "no pattern found in the weights; dense is faster than bitmap at batch 1"
    assert best_of({BITMAP: {1: 2.0, 8: 2.0}, CSR: {1: 5.0, 8: 0.5}}) == BITMAP
    nothing = fastest(options_for(torch.ones(4, 4)), {})
    assert nothing.format is None and nothing.reason.startswith("too few zeros")


# --- who asks -----------------------------------------------------------------------------------------------------------


def test_each_layer_of_an_allocation_has_its_own_pattern():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    sp.prune(model, "2:4", allocation={"1": "4:8", "2": "dense", "3": "1:4"})
    assert [recall(site) and recall(site).pattern for site in find_sites(model)] == [
        "2:4",
        "4:8",
        None,
        "1:4",
    ]
    assert [layer.why for layer in inspect_model(model).layers] == [
        "pruned to 2:4", "pruned to 4:8", "no zeros", "pruned to 1:4"
    ]  # fmt: skip
    report = sp.sparsify(model, policy="always")
    assert [layer.format for layer in report.layers] == ["2:4", "4:8", None, "1:4"]
    assert [layer.reason for layer in report.layers if layer.format] == [
        "pruned to 2:4", "pruned to 4:8", "pruned to 1:4"
    ]  # fmt: skip


def test_a_layer_left_whole_keeps_what_is_known_of_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sp.prune(model, "2:4")
    sp.prune(model, "unstructured", sparsity=0.6, allocation={"0": "dense", "1": 0.6})
    assert [recall(site).pattern for site in find_sites(model)] == ["2:4", "unstructured"]


def test_a_sparse_layer_made_dense_again_is_known_as_what_it_was():
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.copy_(kept(32, 64, 0, 1))
        linear.weight.view(32, 16, 4)[:, ::3] = 0
    without = SparseLinear.from_dense(linear, "2:4").to_dense()  # its format says it
    assert recognise(without.weight, recall(site_of(without))).reason == "pruned to 2:4"
    note(site_of(linear), "unstructured")
    again = SparseLinear.from_dense(linear, "bitmap").to_dense()
    assert recognise(again.weight, recall(site_of(again))).reason == "pruned unstructured"
    assert recall(site_of(SparseLinear.from_dense(nn.Linear(8, 8), "csr").to_dense())) is None


def test_bench_times_the_form_that_is_noted():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(kept(64, 64, 1, 2))
    note(find_sites(model)[0], "unstructured")
    (kind,) = time_model(model, seconds=0.05, tokens=False).kinds
    assert kind.format == "bitmap"


def by_name(report):
    return {layer.name: layer.format for layer in report.layers}


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.sampled_from([32, 64, 256]),
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "unstructured", "16x1"]),
    sparsity=st.sampled_from([0.02, 0.4, 0.7, 0.9, 0.97]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_in_memory_saved_and_streamed_are_one_answer(tmp_path_factory, hidden, pattern, sparsity, dtype):
    folder = tmp_path_factory.mktemp("models")
    model = tiny.llama(hidden_size=hidden, intermediate_size=2 * hidden)
    with torch.no_grad():
        for site in find_sites(model):
            site.weight.view(-1, 8)[::3] = 0  # groups without a weight, before anything is pruned
    save(model, folder / "dense", dtype)
    implied = None if ":" in pattern else sparsity
    sp.prune(model, pattern, sparsity=implied)
    sp.save(model, folder / "pruned")
    loaded = sp.load(folder / "pruned")
    streamed = prune_folder(folder / "dense", folder / "streamed", pattern, sparsity=implied)
    report = sp.sparsify(model, policy="always")
    again = sp.sparsify(loaded, policy="always")
    assert again.layers == report.layers
    written = {
        name: str(module.format)
        for name, module in sp.load(folder / "streamed").named_modules()
        if isinstance(module, SparseLinear)
    }
    assert by_name(report) == {name: written.get(name) for name in by_name(report)}
    reasons = {}
    for layer in report.layers:
        of = reasons.setdefault(layer.format or "dense", {})
        of[layer.reason] = of.get(layer.reason, 0) + 1
    assert streamed.formats == reasons
