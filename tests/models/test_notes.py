"""What a weight was pruned to stays with it, wherever it goes, and does not outlive it."""

import copy
import json
import pickle

import pytest
import torch
from helpers import tiny
from helpers.recovery import pruned_pair, stream
from safetensors.torch import load_file, save_file
from torch import nn

import sparseprune as sp
from sparseprune.io.checkpoint import CheckpointError
from sparseprune.models.notes import carry, digest_of, kept_bits, note, noted, recall
from sparseprune.models.sites import ExpertSite, find_sites
from sparseprune.recovery import Training
from sparseprune.streaming import prune_folder
from sparseprune.weights.choose import recognise
from sparseprune.weights.linear import SparseLinear


def reasons(model):
    return {recognise(site.weight, recall(site)).reason for site in find_sites(model)}


def patterns(model):
    return {None if recall(site) is None else recall(site).pattern for site in find_sites(model)}


@pytest.fixture
def pruned():
    """2:4, with so many more zeros that it could not be told from the weights."""
    model = tiny.llama()
    with torch.no_grad():
        for site in find_sites(model):
            site.weight.view(-1, 4)[::2] = 0
    sp.prune(model, "2:4")
    forgetful = copy.deepcopy(model)
    for module in forgetful.modules():
        module.__dict__.pop("_sparseprune_pruned", None)
    assert not any("2:4" in it for it in reasons(forgetful))
    return model


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda it: pickle.loads(pickle.dumps(it)),
        lambda it: it.to(torch.bfloat16),
        lambda it: it.to(torch.float16).float(),
        lambda it: it.requires_grad_(False).train(),
    ],
    ids=["deepcopy", "pickle", "bfloat16", "there and back", "modes"],
)
def test_it_stays_with_the_module(pruned, way):
    assert reasons(way(pruned)) == {"pruned to 2:4"}


def test_it_is_plain_data_that_pickles_without_this_package(pruned):
    for module in pruned.modules():
        data = module.__dict__.get("_sparseprune_pruned", {})
        assert json.loads(json.dumps(data)) == {slot: list(entry) for slot, entry in data.items()}


def test_a_state_dict_round_trip_keeps_it(pruned):
    state = {key: value.clone() for key, value in pruned.state_dict().items()}
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.normal_()
    assert all(
        it.startswith("was pruned to 2:4, no longer fits (row 0, group 0 keeps ") for it in reasons(pruned)
    )
    pruned.load_state_dict(state)
    assert reasons(pruned) == {"pruned to 2:4"}


@pytest.mark.parametrize("lora", [None, 2])
def test_recovery_keeps_it(lora):
    model, teacher = pruned_pair()
    sp.recover(model, stream(), teacher=teacher, steps=3, training=Training(lora=lora))
    assert reasons(model) == {"pruned to 2:4"}
    sp.prune(model, "unstructured", sparsity=0.7)
    sp.recover(model, stream(), teacher=teacher, steps=3, training=Training(lora=lora))
    assert reasons(model) == {"pruned unstructured"}


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_checkpoint_keeps_it(tmp_path, make):
    model = make()
    sp.prune(model, "2:4", allocation={find_sites(model)[0].name: "4:8"})
    expected = [recall(site) for site in find_sites(model)]
    assert {it.pattern for it in expected} == {"2:4", "4:8"}
    sp.save(model, tmp_path)
    assert [recall(site) for site in find_sites(sp.load(tmp_path))] == expected


def test_a_checkpoint_of_a_plain_model_keeps_it_also_of_sparse_layers(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))

    model = net()
    sp.prune(model, "unstructured", sparsity=0.5, include=["0", "1"])
    model[1] = SparseLinear.from_dense(model[1], "bitmap")
    sp.save(model, tmp_path)
    other = net()
    sp.prune(other, "2:4")  # of weights that the file's take the place of
    loaded = sp.load(tmp_path, model=other)
    assert [None if noted(it) is None else noted(it).pattern for it in loaded] == ["unstructured"] * 2 + [
        None
    ]
    sp.recovery.to_dense(loaded)
    assert reasons(loaded[:2]) == {"pruned unstructured"}


def test_a_streamed_checkpoint_keeps_it(tmp_path):
    folder = tmp_path / "dense"
    tiny.llama().save_pretrained(folder)
    report = prune_folder(folder, tmp_path / "out", "4:8", format="2:4", allocation={"*down_proj": "dense"})
    assert set(report.formats) == {"dense"}  # 4:8 does not fit into what was asked for
    loaded = sp.load(tmp_path / "out")
    assert patterns(loaded) == {"4:8", None}
    assert {it.format for it in sp.sparsify(loaded, policy="always").layers} == {"4:8", None}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"0": 1}', '{"0": {"weight": ["2:4"]}}', '{"0": {"weight": ["two", "00"]}}',
             '{"0": {"weight": ["2:4", 7]}}'],
)  # fmt: skip
def test_a_damaged_note_is_refused(tmp_path, text):
    model = nn.Sequential(nn.Linear(8, 8))
    sp.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "sparseprune", "version": "1", "pruned": text})
    with pytest.raises(CheckpointError, match=r"model.safetensors: pruned: must say \(pattern, digest\)"):
        sp.load(tmp_path, model=model)


def test_a_note_that_was_forged_does_not_pass(tmp_path):
    """The digest is that of the zeros, the pattern is not theirs."""
    model = nn.Sequential(nn.Linear(8, 8))
    digest = digest_of(kept_bits(model[0].weight))
    model[0]._sparseprune_pruned = {"weight": ("2:4", digest)}
    sp.save(model, tmp_path)
    (layer,) = sp.sparsify(sp.load(tmp_path, model=nn.Sequential(nn.Linear(8, 8))), policy="always").layers
    assert layer.format is None


def test_an_error_notes_nothing():
    model = tiny.llama()
    with torch.no_grad():
        find_sites(model)[-1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        sp.prune(model, "2:4")
    assert patterns(model) == {None}


def test_a_schedule_that_goes_back_takes_its_notes_back():
    model = tiny.llama()
    sp.prune(model, "unstructured", sparsity=0.2)
    before = [recall(site) for site in find_sites(model)]
    snapshot = sp.models.snapshot.Snapshot(model)
    sp.prune(model, "unstructured", sparsity=0.6)
    snapshot.restore()
    assert [recall(site) for site in find_sites(model)] == before


def test_every_place_of_a_shared_weight_knows_it():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    sp.prune(model, "2:4")
    assert noted(model["a"]) == noted(model["b"]) is not None


def test_experts_have_notes_of_their_own():
    module = nn.Module()
    module.num_experts = 2
    module.up = nn.Parameter(torch.randn(2, 8, 8))
    module.down = nn.Parameter(torch.randn(2, 8, 8))
    sites = find_sites(nn.ModuleDict({"experts": module}), kinds=[ExpertSite])
    for site, pattern in zip(sites, ("2:4", "4:8", "1:4"), strict=False):
        note(site, pattern)
    assert [recall(it) and recall(it).pattern for it in sites] == ["2:4", "4:8", "1:4", None]


def test_another_weight_in_the_same_module_is_not_taken_for_the_one_that_was_pruned():
    model = nn.Sequential(nn.Linear(64, 64))
    sp.prune(model, "unstructured", sparsity=0.5)
    weight = torch.randn(64, 64)
    weight.view(-1, 4)[:, :2] = 0
    model[0].weight = nn.Parameter(weight)
    assert reasons(model) == {"was pruned unstructured, its zeros are others now; 2:4 found in the weights"}
    fresh = nn.Linear(64, 64)
    carry(nn.Linear(4, 4), fresh)
    assert noted(fresh) is None
