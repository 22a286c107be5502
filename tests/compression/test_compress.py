"""`compress()`: budgets, the forms that are chosen, errors, and a model that reloads."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from helpers.backends import emulated
from helpers.clocks import ticking
from helpers.recovery import divergence, peaked
from torch import nn

import sparseprune as sp
from sparseprune.compression import Budget, compress
from sparseprune.compression.choice import Options, choose
from sparseprune.compression.forms import FORMS, Form
from sparseprune.io.checkpoint import file_bytes
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight

DATA = [tiny.ids(1, 32, seed) for seed in range(12)]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: it.clone() for name, it in model.state_dict().items()}


@pytest.mark.parametrize(
    ("text", "of_thousand"),
    [("62MB", 62_000_000), ("1.5MiB", 1_572_864), ("300 kb", 300_000), ("4 bits", 500), (1234, 1234)],
)
def test_budgets_are_sizes_or_bits_a_weight(text, of_thousand):
    assert Budget.parse(text).of(1000) == of_thousand


@pytest.mark.parametrize("text", ["", "62", "-3MB", "0MB", "0 bits", "fast", 0, -5, True, 1.5, None])
def test_other_budgets_are_refused_with_examples(text):
    with pytest.raises(ValueError, match='budget: must be a size such as "62MB"'):
        Budget.parse(text)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (7, 100), (3, 4)])
def test_the_bytes_of_a_form_are_those_of_the_weight(form: Form, shape):
    if form.plain:
        assert form.nbytes("name", shape, torch.bfloat16) == 2 * shape[0] * shape[1]
        return
    weight = torch.randn(shape)
    if form.pattern == "2:4":
        weight.view(shape[0], -1, 4)[..., 1:3] = 0
    if form.pattern == "unstructured":
        weight[:, : round(shape[1] * form.sparsity)] = 0
    made = SparseWeight.from_dense(weight, form.format, form.encoding)
    parts = sum(it.nbytes for it in made.parts().values())
    assert parts <= form.nbytes("name", shape, torch.float32) <= parts + 6 * 114


def test_a_form_is_for_weights_that_it_divides_and_devices_that_have_kernels_for_it():
    def misfits(cols: int) -> set[str]:
        return {str(it) for it in FORMS if not it.fits(torch.empty(8, cols))}

    assert misfits(64) == set() and misfits(66) == {"2:4 int8 g64", "2:4 int4 g64"}
    with emulated():
        assert misfits(64) == {"50 % int4 g64"}


def test_the_least_loss_within_the_budget_is_chosen_and_the_next_best_named():
    small, large = FORMS[4], FORMS[1]
    options = {
        "minds": Options((large, small), (800, 400), (0.001, 1.0)),
        "does not": Options((large, small), (800, 400), (0.001, 0.002)),
    }
    choices = choose(options, 1200)
    assert {name: it.form for name, it in choices.items()} == {"minds": large, "does not": small}
    assert choices["minds"].other == small and choices["does not"].other == large
    assert choices["minds"].other_loss == 1.0 and choices["minds"].price == 800


def test_a_form_that_wins_nothing_for_its_bytes_is_not_chosen():
    """2:4 at the size of int4 with a larger loss, say."""
    dense, sparse = FORMS[4], FORMS[6]
    choices = choose({"it": Options((dense, sparse), (400, 500), (0.1, 0.2))}, 600)
    assert choices["it"].form == dense


@pytest.mark.parametrize("budget", ["14 bits", "10 bits"])
def test_a_model_fits_its_budget_reloads_and_is_near_the_dense_one(budget, tmp_path):
    model = peaked()
    dense = copy.deepcopy(model)
    whole = file_bytes(model)
    with ticking(0.05):
        report = compress(model, budget, calibration=DATA, minutes=0.1)
    sp.save(model, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == report.bytes_after <= report.budget < report.bytes_before == whole
    ids = tiny.ids()
    with torch.no_grad():
        assert torch.equal(sp.load(tmp_path)(ids).logits, model(ids).logits)
    assert divergence(model, dense) < 0.1
    assert all(it.loss <= it.runner_up_loss or it.bits < it.runner_up_bits for it in report.layers)
    assert "allowed" in str(report) and report.to_dict()["layers"][0]["form"]


def test_a_budget_below_the_least_names_the_least_and_changes_nothing():
    model = peaked()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"budget: the least that this model can take is [\d,]+ bytes, got 1,000; allow that"
    ):
        compress(model, 1000, calibration=DATA, minutes=0.1)
    assert all(torch.equal(it, before[name]) for name, it in model.state_dict().items())


def test_a_budget_of_the_whole_file_changes_nothing_but_says_so():
    model = peaked()
    before = snapshot(model)
    report = compress(model, file_bytes(model) + 1000, calibration=DATA, minutes=0.1)
    assert {it.form for it in report.layers} == {"plain"}
    assert all(torch.equal(it, before[name]) for name, it in model.state_dict().items())
    assert not any(isinstance(it, SparseModule) for it in model.modules())


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = peaked()
    before = snapshot(model)
    modules = dict(model.named_modules())

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("sparseprune.compression.driver._train", fails)
    with pytest.raises(RuntimeError, match="no"):
        compress(model, "10 bits", calibration=DATA, minutes=0.1)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(it, before[name]) for name, it in model.state_dict().items())


def kept_and_not(model: nn.Module) -> tuple[dict[str, SparseWeight], dict[str, str]]:
    """Codes of the linears of the first block, as if a file had them, and the forms of all after `compress`."""
    values = Encoding("int4_minimum", 32, torch.float16)
    stored = {}
    for name, it in model.named_modules():
        if isinstance(it, nn.Linear) and "layers.0." in name:
            stored[name] = SparseWeight.from_dense(it.weight, "dense", values)
            it.weight.data = stored[name].dense()
    with ticking(0.05), pytest.MonkeyPatch.context() as patch:
        by_bytes = {it.dense().numpy().tobytes(): it for it in stored.values()}
        found = SimpleNamespace(find=lambda weight: by_bytes.get(weight.detach().numpy().tobytes()))
        patch.setattr("sparseprune.compression.driver.StoredCodes.read", lambda path: found)
        report = compress(model, "18 bits", calibration=DATA, keep=__file__, minutes=0.2)
    return stored, {it.name: it.form for it in report.layers}


def test_kept_codes_are_kept_bit_by_bit_while_the_others_are_trained():
    model = peaked()
    stored, forms = kept_and_not(model)
    kept = {name for name, form in forms.items() if "kept" in form}
    assert kept == stored.keys() and any("kept" not in it for it in forms.values())
    for name in kept:
        parts = model.get_submodule(name).sparse_weight().parts()
        assert all(torch.equal(part, stored[name].parts()[key]) for key, part in parts.items()), name


@pytest.mark.parametrize("kind", ["bert", "lstm_classifier", "gpt2"])
def test_what_a_model_does_not_allow_is_left_out_and_said(kind):
    model = getattr(tiny, kind)()
    with ticking(0.05):
        report = compress(model, int(0.97 * file_bytes(model)), calibration=DATA, minutes=0.2)
    said = " ".join(report.notes)
    assert ("gives no logits" in said) == (kind == "bert") == (report.recovered is None)
    assert ("no block was reconstructed" in said) == (kind == "lstm_classifier")
    assert any(isinstance(it, SparseModule) for it in model.modules())
    assert report.bytes_after <= report.budget


def test_one_batch_cannot_be_held_out():
    with pytest.raises(ValueError, match="needs at least 2 batches"):
        compress(peaked(), "8 bits", calibration=DATA[:1], minutes=0.1)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), "long"])
def test_minutes_are_positive(minutes):
    with pytest.raises(ValueError, match="minutes: must be above 0"):
        compress(peaked(), "8 bits", calibration=DATA, minutes=minutes)


def test_a_model_without_linears_says_what_is_missing():
    with pytest.raises(ValueError, match="has no linear layer to compress"):
        compress(nn.Sequential(nn.Conv2d(1, 1, 1)), "8 bits", calibration=DATA, minutes=0.1)
