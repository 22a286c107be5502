"""Recovery of models of int8 and int4 codes: what is trained is what is stored, and the rest stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.recovery import divergence, peaked, stream
from torch import nn

import sparseprune as sp
from sparseprune.recovery import Training, recover
from sparseprune.weights.embedding import SparseEmbedding

TRAINING = Training(1e-3, windows=4, autocast=None)


def pair(encoding: str = "int4", two_four: bool = True, **options) -> tuple[nn.Module, nn.Module]:
    teacher = peaked()
    model = copy.deepcopy(teacher)
    if two_four:
        sp.prune(model, "2:4", include="*up_proj")
    sp.quantize(model, encoding, group_size=32, **options)
    return model, teacher


def layers(model: nn.Module) -> dict[str, sp.SparseLinear]:
    return {name: it for name, it in model.named_modules() if isinstance(it, sp.SparseLinear)}


@pytest.mark.parametrize(("encoding", "left"), [("int4", 0.7), ("int4_minimum", 0.9)])
def test_training_through_codes_brings_the_model_nearer_to_its_teacher(encoding, left):
    model, teacher = pair(encoding)
    held, before = layers(model), divergence(model, teacher)
    forms = {name: (str(it.spec), it.sparse_weight().mask) for name, it in held.items()}
    report = recover(model, stream(), teacher=teacher, steps=60, training=TRAINING)
    assert divergence(model, teacher) < left * before
    after = layers(model)
    assert all(after[name] is it for name, it in held.items()) and len(after) == len(held)
    for name, it in after.items():
        spec, mask = forms[name]
        weight = it.sparse_weight()
        weight.validate()
        assert str(it.spec) == spec and (mask is None or torch.equal(weight.mask, mask))
    assert report.weights == 2 * report.zeros_after == 2 * report.zeros_before == 2 * 48 * 32
    assert report.settings["codes"] == {f"dense {encoding}": 12, "2:4 int4": 2}


def test_what_was_trained_is_what_the_file_holds(tmp_path):
    model, teacher = pair()
    recover(model, stream(), teacher=teacher, steps=3, training=TRAINING)
    sp.save(model, tmp_path)
    ids = tiny.ids()
    with torch.no_grad():
        assert torch.equal(sp.load(tmp_path)(ids).logits, model(ids).logits)


def test_layers_that_are_left_out_and_embeddings_keep_their_codes():
    model, teacher = pair(embeddings="int8")
    before = {name: it.sparse_weight().parts() for name, it in layers(model).items()}
    embedding = next(it for it in model.modules() if isinstance(it, SparseEmbedding))
    rows = embedding.sparse_weight().parts()
    recover(model, stream(), teacher=teacher, steps=3, training=TRAINING, exclude="*q_proj")
    changed = {
        name
        for name, it in layers(model).items()
        if any(not torch.equal(part, before[name][key]) for key, part in it.sparse_weight().parts().items())
    }
    assert changed and not any("q_proj" in it or "lm_head" in it for it in changed)
    assert any("k_proj" in it for it in changed)
    assert next(it for it in model.modules() if isinstance(it, SparseEmbedding)) is embedding
    assert all(torch.equal(part, rows[key]) for key, part in embedding.sparse_weight().parts().items())


def test_all_trains_the_codes_of_the_embedding_too():
    model, teacher = pair(embeddings="int4")
    embedding = next(it for it in model.modules() if isinstance(it, SparseEmbedding))
    before = embedding.weight
    training = Training(1e-3, windows=4, autocast=None, train="all")
    queries = [it for name, it in layers(model).items() if "q_proj" in name]
    weights = [it.weight for it in queries]
    recover(model, stream(), teacher=teacher, steps=5, training=training, exclude="*q_proj")
    assert all(torch.equal(it.weight, weight) for it, weight in zip(queries, weights, strict=True))
    assert not torch.equal(embedding.weight, before)


def test_an_error_leaves_the_codes_as_they_were():
    model, teacher = pair()
    before = {name: it.sparse_weight().parts() for name, it in layers(model).items()}

    def fails(_: nn.Module) -> float:
        raise KeyError

    with pytest.raises(KeyError):
        recover(model, stream(), teacher=teacher, steps=3, training=TRAINING, evaluate=fails)
    after = layers(model)
    assert after.keys() == before.keys()
    for name, parts in before.items():
        assert all(torch.equal(after[name].sparse_weight().parts()[key], part) for key, part in parts.items())


def test_a_killed_run_goes_on_to_the_same_codes(tmp_path):
    results = []
    for kill in (False, True):
        model, teacher = pair()
        options = {"teacher": teacher, "training": TRAINING, "steps": 4}
        if kill:
            count = 0

            def evaluate(_: nn.Module) -> float:
                nonlocal count
                count += 1
                if count == 4:
                    raise KeyboardInterrupt
                return 0.0

            checkpoint = sp.recovery.Checkpointing(tmp_path, every=1)
            with pytest.raises(KeyboardInterrupt):
                recover(
                    model, stream(), checkpoint=checkpoint, evaluate=evaluate, evaluate_every=1, **options
                )
            model, _ = pair()
            recover(model, stream(), checkpoint=checkpoint, **options)
        else:
            recover(model, stream(), **options)
        results.append({name: it.weight for name, it in layers(model).items()})
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_adapters_on_codes_are_refused():
    model, teacher = pair()
    with pytest.raises(ValueError, match="lora: adapters cannot be merged into codes"):
        recover(model, stream(), teacher=teacher, steps=1, training=Training(lora=2))


def test_layers_of_plain_values_are_still_refused():
    model = peaked()
    sp.prune(model, "2:4")
    sp.sparsify(model, policy="always")
    with pytest.raises(ValueError, match="must be dense to be trained, or int8 or int4 codes"):
        recover(model, stream(), steps=1)
