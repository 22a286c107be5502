"""Recovery: distillation, kill and resume, budgets, bad input."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.recovery import divergence, peaked, pruned_pair, stream, weights
from torch import nn
from torch.nn import functional as F

import sparseprune as sp
from sparseprune.calibration import CalibrationData
from sparseprune.recovery import Checkpointing, Distillation, TokenStream, Training, recover, to_dense
from sparseprune.recovery.schedule import learning_rate_factor

EXACT = Training(autocast=None)
TRAINING = Training(3e-3, windows=4, autocast=None)
RECIPES = {
    "logits": {},
    "with hidden states": {"distillation": Distillation(cross_entropy=0.2, hidden=0.5, temperature=1.5)},
    "autocast": {"training": replace(TRAINING, autocast="bfloat16")},
    "accumulated": {"training": replace(TRAINING, accumulate=2)},
    "adagrad": {"training": replace(TRAINING, optimizer="adagrad", learning_rate=0.02)},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_distillation_halves_the_divergence_to_the_teacher(recipe):
    model, teacher = pruned_pair()
    before, taught = divergence(model, teacher), weights(teacher)
    report = recover(model, stream(), teacher=teacher, steps=80, **{"training": TRAINING} | RECIPES[recipe])
    assert divergence(model, teacher) < 0.5 * before
    assert report.zeros_after == report.zeros_before == 7680
    assert report.steps == 80 and report.losses[-1].total < report.losses[0].total
    for name, tensor in weights(teacher).items():
        assert torch.equal(tensor, taught[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
def test_compiled_blocks_learn_the_same():
    results = []
    for compiled in (False, True):
        model, teacher = pruned_pair()
        options = {
            "training": Training(1e-3, autocast=None, compile=compiled),
            "distillation": Distillation(hidden=0.3),
        }
        results.append(recover(model, stream(), teacher=teacher, steps=4, **options))
        assert all("forward" not in vars(module) for it in (model, teacher) for module in it.modules())
    for eager, fused in zip(*(report.losses for report in results), strict=True):
        assert fused.total == pytest.approx(eager.total, rel=1e-3)


def test_distillation_beats_fine_tuning_on_text_that_says_nothing():
    # the tokens are random: only the teacher knows anything that can be learned
    results = {}
    for name in ("distilled", "fine-tuned"):
        model, teacher = pruned_pair()
        given = teacher if name == "distilled" else None
        recover(model, stream(), teacher=given, steps=60, training=TRAINING)
        results[name] = divergence(model, teacher)
    assert results["distilled"] < 0.5 * results["fine-tuned"]


def test_fine_tuning_learns_the_text():
    model, _ = pruned_pair()
    text = torch.arange(96).repeat(40)
    report = recover(model, TokenStream(text, length=24), steps=80, training=TRAINING)
    assert report.losses[-1].terms["cross_entropy"] < 0.6 * report.losses[0].terms["cross_entropy"]


def test_embeddings_and_head_are_trained_only_on_request():
    for train, changes in (("linears", False), ("all", True)):
        model, teacher = pruned_pair()
        before = weights(model)
        recover(
            model, stream(), teacher=teacher, steps=2, training=Training(1e-2, train=train, autocast=None)
        )
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(model.state_dict()[name], before[name]) is not changes
        assert not torch.equal(model.state_dict()["model.norm.weight"], before["model.norm.weight"])


def test_a_bfloat16_model_learns_from_steps_below_its_spacing():
    model, teacher = pruned_pair()
    model = model.to(torch.bfloat16)
    before, flags = weights(model), [it.requires_grad for it in model.parameters()]
    recover(model, stream(), teacher=teacher, steps=30, training=EXACT)
    assert {it.dtype for it in model.parameters()} == {torch.bfloat16}
    assert [it.requires_grad for it in model.parameters()] == flags and not model.training
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert torch.equal(model.state_dict()[name] == 0, before[name] == 0)


def test_any_torch_model_with_a_loss_of_its_own():
    teacher = tiny.lstm_classifier()
    model = copy.deepcopy(teacher)
    sp.prune(model, "unstructured", sparsity=0.5)
    batches = CalibrationData([tiny.ids(8, 12, seed=it) for it in range(6)])

    def loss(output, ids):
        return F.cross_entropy(output, ids[:, 0] % 4)

    training = Training(1e-2, train="all", autocast=None)
    report = recover(model, batches, steps=60, distillation=Distillation(loss=loss), training=training)
    assert report.losses[-1].terms["cross_entropy"] < 0.5 * report.losses[0].terms["cross_entropy"]
    assert report.zeros_after == report.zeros_before

    distilled = copy.deepcopy(teacher)
    sp.prune(distilled, "unstructured", sparsity=0.5)
    report = recover(distilled, batches, teacher=teacher, steps=60, training=Training(1e-2, autocast=None))
    assert report.losses[-1].terms["logits"] < 0.3 * report.losses[0].terms["logits"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, optimizer, dropout):
    make = tiny.gpt2 if dropout else tiny.llama
    options = {
        "steps": 9,
        "training": Training(3e-3, optimizer=optimizer, dropout=dropout, autocast=None),
        "distillation": Distillation(cross_entropy=0.5, hidden=0.3),
        "evaluate_every": 2,
    }
    whole, teacher = pruned_pair(make)
    reference = recover(
        whole, stream(), teacher=teacher, evaluate=lambda it: divergence(it, teacher), **options
    )

    def dies(model: nn.Module) -> float:
        dies.calls += 1
        if dies.calls == 4:
            raise Killed
        return divergence(model, teacher)

    dies.calls = 0
    model, _ = pruned_pair(make)
    disk = {"checkpoint": Checkpointing(tmp_path / "run", every=3)}
    with pytest.raises(Killed):
        recover(model, stream(), teacher=teacher, evaluate=dies, **options, **disk)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recovery.safetensors"]

    torch.rand(7)  # the global generator has no say
    again, _ = pruned_pair(make)
    report = recover(
        again, stream(), teacher=teacher, evaluate=lambda it: divergence(it, teacher), **options, **disk
    )
    assert report.resumed_at == 3
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert [it.total for it in report.losses] == [it.total for it in reference.losses]
    assert [(it.step, it.value) for it in report.evaluations] == [
        (it.step, it.value) for it in reference.evaluations
    ]

    finished, _ = pruned_pair(make)
    report = recover(
        finished, stream(), teacher=teacher, evaluate=lambda it: divergence(it, teacher), **options, **disk
    )
    assert report.resumed_at == 9 and torch.equal(
        next(iter(weights(finished).values())), next(iter(weights(whole).values()))
    )


def test_each_step_reads_the_next_samples(tmp_path):
    class Recording(TokenStream):
        def draw(self, index: int, seed: int = 0) -> torch.Tensor:
            drawn.append((index, seed))
            return super().draw(index, seed)

    drawn: list[tuple[int, int]] = []
    model, teacher = pruned_pair()
    options = {"training": Training(windows=3, autocast=None), "seed": 5, "checkpoint": tmp_path}
    recover(model, Recording(tiny.ids(1, 500)[0], length=16), teacher=teacher, steps=4, **options)
    assert drawn == [(index, 5) for index in range(12)]


def test_what_a_kill_left_half_written_is_ignored_and_replaced(tmp_path):
    partial = tmp_path / ".recovery.safetensors.partial"
    partial.write_bytes(b"half")
    model, teacher = pruned_pair()
    report = recover(model, stream(), teacher=teacher, steps=1, training=EXACT, checkpoint=tmp_path)
    assert report.resumed_at is None and not partial.exists()


def test_minutes_count_what_an_earlier_run_used(tmp_path, ticks):
    ticks.step = 0.1
    model, teacher = pruned_pair()
    options = {"minutes": 0.02, "training": EXACT, "checkpoint": tmp_path}
    report = recover(model, stream(), teacher=teacher, **options)
    assert 1.2 <= report.seconds < 4 and 1 < report.steps < 12
    again, _ = pruned_pair()
    resumed = recover(again, stream(), teacher=teacher, **options)
    assert resumed.steps == report.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": Training(1e-2, autocast=None)}, "learning_rate=0.003, got 0.01"),
        ({"seed": 1}, "seed=0, got 1"),
        (
            {"training": Training(3e-3, optimizer="sgd", autocast=None)},
            "optimizer='AdamW', got 'SGD'",
        ),
        ({"distillation": Distillation(loss=lambda output, batch: output.logits.mean())}, "got "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    model, teacher = pruned_pair()
    options = {"steps": 2, "training": Training(3e-3, autocast=None), "checkpoint": tmp_path}
    recover(model, stream(), teacher=teacher, **options)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        recover(model, stream(), teacher=teacher, **options | change)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    again = Checkpointing(tmp_path, resume=False)
    report = recover(model, stream(), teacher=teacher, **options | change | {"checkpoint": again})
    assert report.resumed_at is None


def test_a_checkpoint_with_other_zeros_or_damage_is_refused(tmp_path):
    model, teacher = pruned_pair()
    options = {"steps": 2, "training": EXACT, "checkpoint": tmp_path}
    recover(model, stream(), teacher=teacher, **options)
    other = peaked()
    sp.prune(other, "unstructured", sparsity=0.5)
    with pytest.raises(ValueError, match="zeros="):
        recover(other, stream(), teacher=teacher, **options)
    file = tmp_path / "recovery.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        recover(model, stream(), teacher=teacher, **options)


def test_an_epoch_of_a_stream_reads_every_window_once():
    data = TokenStream(torch.arange(1000), length=30)
    windows = [data.draw(index, seed=5) for index in range(64)]
    count = (1000 - 30) // 30
    starts = [int(it[0, 0]) for it in windows[:count]]
    assert len({start // 30 for start in starts}) == count and starts != sorted(starts)
    assert {(start - starts[0]) % 30 for start in starts} == {0}
    assert all(torch.equal(it[0], torch.arange(int(it[0, 0]), int(it[0, 0]) + 30)) for it in windows)
    assert [int(it[0, 0]) for it in windows[count : 2 * count]] != starts
    assert torch.equal(data.draw(3, seed=5), windows[3]) and not torch.equal(data.draw(3, seed=6), windows[3])


def test_learning_rate_rises_then_falls_along_a_cosine():
    factors = [learning_rate_factor(it / 100, 0.1, 0.05) for it in range(101)]
    assert factors[5] == pytest.approx(0.5) and factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.05 + 0.95 / 2) and factors[100] == pytest.approx(0.05)
    assert 0 < factors[0] < 0.1


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_finite_weights():
    model, teacher = pruned_pair()
    teacher.lm_head.weight.data[3] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match="lower the learning rate"):
        recover(model, stream(), teacher=teacher, steps=3, training=EXACT)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])


def test_sparse_layers_must_be_dense_to_be_trained():
    model, teacher = pruned_pair()
    expected = weights(model)
    sp.sparsify(model, policy="always")
    with pytest.raises(ValueError, match="to_dense"):
        recover(model, stream(), teacher=teacher, steps=1)
    to_dense(model)
    assert weights(model).keys() == expected.keys()
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, expected[name])
    recover(model, stream(), teacher=teacher, steps=2, training=EXACT)


BAD = [
    ({}, "steps, minutes: one of the two"),
    ({"steps": 1, "minutes": 1.0}, "steps, minutes: one of the two"),
    ({"steps": 0}, "steps: must be at least 1, got 0"),
    ({"minutes": -1.0}, "minutes: must be above 0"),
    ({"steps": 1, "evaluate_every": 1}, "evaluate_every: needs evaluate"),
    ({"steps": 1, "evaluate": lambda it: 1.0, "evaluate_every": 0}, "evaluate_every: must be at least 1"),
    ({"steps": 1, "evaluate": "perplexity"}, "evaluate: must be a function of the model"),
    ({"steps": 1, "seed": -1}, "seed: must be at least 0"),
    ({"steps": 1, "checkpoint": 3}, "checkpoint: must be a path, got 3"),
    ({"steps": 1, "checkpoint": __file__}, "checkpoint: must be a folder, got the file"),
    ({"steps": 1, "training": {"learning_rate": 1e-3}}, "training: must be a Training"),
    ({"steps": 1, "distillation": 0.5}, "distillation: must be a Distillation"),
    ({"steps": 1, "include": "nothing.*"}, "include: 'nothing.\\*' matches no linear layer"),
    ({"steps": 1, "exclude": "nothing.*"}, "exclude: 'nothing.\\*' matches no linear layer"),
    ({"steps": 1, "lm_head": "yes"}, "lm_head: must be True or False"),
    (
        {"steps": 1, "teacher": None, "distillation": Distillation(logits=1)},
        "teacher: must be given for the losses logits=1, hidden=0",
    ),
    (
        {"steps": 1, "teacher": None, "distillation": Distillation(cross_entropy=1, logits=0, hidden=1)},
        "teacher: must be given for the losses logits=0, hidden=1",
    ),
    (
        {"steps": 1, "distillation": Distillation(cross_entropy=1, logits=0)},
        "teacher: is read by no loss",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(arguments, message):
    model, teacher = pruned_pair()
    before = weights(model)
    with pytest.raises((ValueError, TypeError, NotADirectoryError), match=message):
        recover(model, stream(), **{"teacher": teacher} | arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: must be above 0"),
        ({"learning_rate": 1e-3, "optimizer": torch.optim.SGD}, "learning_rate: an optimizer of your own"),
        ({"optimizer": "adams"}, "optimizer: must be one of adamw"),
        ({"train": "some"}, "train: must be one of linears, all"),
        ({"train": "all", "lora": 4}, "train: adapters are trained on the linears alone"),
        ({"warmup": 1.5}, r"warmup: must be in \[0, 1\)"),
        ({"final": 1.5}, r"final: must be in \[0, 1\]"),
        ({"clip": 0.0}, "clip: must be above 0"),
        ({"windows": 0}, "windows: must be at least 1"),
        ({"windows": 2.5}, "windows: must be a whole number"),
        ({"accumulate": 3}, "accumulate: must divide the 2 windows"),
        ({"autocast": "float16"}, "autocast: must be"),
        ({"lora": 0}, "lora: must be at least 1"),
        ({"compile": "yes"}, "compile: must be True or False"),
        ({"dropout": 0.1}, "dropout: must be True or False"),
    ],
)
def test_what_training_cannot_be_is_said_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": -1.0}, "cross_entropy: must be at least 0"),
        ({"hidden": math.inf}, "hidden: must be at least 0"),
        ({"temperature": 0}, "temperature: must be above 0"),
        ({"temperature": 2.0, "logits": 0}, "temperature: softens the divergence, whose weight is 0"),
        ({"loss": 3}, "loss: must be a function"),
        ({"loss": F.cross_entropy, "cross_entropy": 0}, "loss: stands in for the cross-entropy"),
    ],
)
def test_what_a_distillation_cannot_be_is_said_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


def test_a_loss_of_the_callers_counts_beside_a_teacher():
    model, teacher = pruned_pair()
    taught = copy.deepcopy(model)
    recover(taught, stream(), teacher=teacher, steps=2, training=EXACT)
    loss = Distillation(loss=lambda output, batch: output.logits.square().mean())
    recover(model, stream(), teacher=teacher, steps=2, distillation=loss, training=EXACT)
    assert any(not torch.equal(tensor, weights(taught)[name]) for name, tensor in weights(model).items())


def test_bad_teachers_and_data_are_named():
    model, teacher = pruned_pair()
    with pytest.raises(ValueError, match="teacher: must be another model"):
        recover(model, stream(), teacher=model, steps=1)
    with pytest.raises(ValueError, match="vocabulary of 96, it has 90"):
        recover(model, stream(), teacher=tiny.llama(vocab_size=90), steps=1)
    with pytest.raises(ValueError, match="hidden: needs as many blocks"):
        recover(model, stream(), teacher=tiny.llama(layers=3), steps=1, distillation=Distillation(hidden=1.0))
    with pytest.raises(TypeError, match="TokenStream"):
        recover(model, "some text", teacher=teacher, steps=1)
    with pytest.raises(ValueError, match="positions end at 64"):
        recover(model, stream(100), teacher=teacher, steps=1)
    with pytest.raises(ValueError, match="at least one window of 50 tokens, got 10"):
        TokenStream(torch.arange(10), length=50)
    with pytest.raises(ValueError, match="no repeated blocks to compile"):
        batches = CalibrationData([tiny.ids()])
        recover(
            tiny.lstm_classifier(),
            batches,
            teacher=tiny.lstm_classifier(),
            steps=1,
            training=Training(compile=True),
        )
    with pytest.raises(ValueError, match="must have labels"):
        recover(tiny.bert(head=True), CalibrationData([tiny.ids()]), steps=1)
    with pytest.raises(ValueError, match="must not all be 0"):
        Distillation(cross_entropy=0, logits=0)
    with pytest.raises(ValueError, match="must not all be 0"):
        recover(model, stream(), teacher=teacher, steps=1, distillation=Distillation(logits=0))


def test_report_reads_as_a_table_and_as_json():
    model, teacher = pruned_pair()
    report = recover(
        model, stream(), teacher=teacher, steps=40, training=EXACT, evaluate=lambda _: 1.5, evaluate_every=20
    )
    text = str(report)
    assert "40 steps" in text and "7,680 before, 7,680 after, of 15,360" in text and "cross-entropy" in text
    assert len(report.table().rows) <= 17
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["losses"]) == 40 and [it["step"] for it in data["evaluations"]] == [0, 20, 40]
