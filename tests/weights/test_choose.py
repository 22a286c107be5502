"""Which form serves a weight: one answer, and what pruning noted comes before what a weight looks like."""

import copy
import pickle

import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.weights.choose import candidates, packed_bits, smallest
from sparseprune.weights.format import Format
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import DTYPES


def kept(rows, cols, *columns):
    """Zero but for these of every four columns."""
    weight = torch.zeros(rows, cols)
    for column in columns:
        weight[:, column::4] = torch.randn(rows, cols // 4) + 3
    return weight


def test_a_noted_pattern_is_not_guessed_again():
    sparse = kept(16, 32, 0)  # one of four: what 2:4 looks like after a method that leaves whole groups empty
    assert [str(it) for it in candidates(sparse).formats] == ["1:4"]
    found = candidates(sparse, pruned_to="2:4")
    assert [str(it) for it in found.formats] == ["2:4"] and found.reason == "pruned to 2:4"
    looks_like = kept(16, 32, 1, 2)
    found = candidates(looks_like, pruned_to="unstructured")
    assert all(it.kind != "nm" for it in found.formats) and found.reason == "pruned to unstructured"
    assert candidates(looks_like).reason == "found in the weights"


def test_a_stale_note_is_not_believed():
    weight = kept(16, 32, 0, 1)
    weight[3, 28:] = 1.0
    found = candidates(weight, pruned_to="2:4")
    assert [it.kind for it in found.formats] == ["bitmap"]
    assert "was pruned to 2:4, which it no longer fits" in found.reason and "row 3" in found.reason


def test_the_note_stays_with_the_module():
    model = tiny.llama()
    sp.prune(model, "2:4")
    (first, *_) = find_sites(model)
    assert first.pruned_to == "2:4"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16)):
        assert {site.pruned_to for site in find_sites(twin)} == {"2:4"}
    sp.prune(model, "unstructured", sparsity=0.6, include=first.name)
    assert [site.pruned_to for site in find_sites(model)][:2] == ["unstructured", "2:4"]


def test_an_error_notes_nothing():
    model = tiny.llama()
    with torch.no_grad():
        find_sites(model)[-1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        sp.prune(model, "2:4")
    assert {site.pruned_to for site in find_sites(model)} == {None}


def test_sparsify_goes_by_the_note_of_each_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    sp.prune(model, "2:4", allocation={"1": "4:8", "2": "dense"})
    with torch.no_grad():
        model[0].weight.view(64, 16, 4)[:, ::2] = 0  # whole groups empty, as some methods leave them
    report = sp.sparsify(model, policy="always")
    assert [layer.format for layer in report.layers] == ["2:4", "4:8", None]
    assert [layer.reason for layer in report.layers][:2] == ["pruned to 2:4", "pruned to 4:8"]


@given(
    st.integers(1, 40),
    st.sampled_from([32, 64, 96]),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_the_smallest_is_the_smallest_once_packed(rows, cols, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.where(torch.rand(rows, cols, generator=generator) < density, 1.5, 0.0).to(dtype)
    found = smallest(weight, pruned_to="unstructured")
    for form in found.formats:
        share = int(weight.count_nonzero()) / weight.numel()
        bits = {it: packed_bits(Format.parse(it), share, dtype, cols) for it in ("bitmap", "csr")}
        assert bits[str(form)] == min(bits.values()) or str(form) == "bitmap" and share > 0.35
        sparse = SparseWeight.from_dense(weight, form)
        values = sparse.values.nbytes * 8 / weight.numel()
        assert packed_bits(form, share, dtype, cols) >= values
