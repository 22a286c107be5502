"""Recovery: zeros that stay, losses against autograd, distillation, kill and resume, bad input."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.nn import functional as F

import sparseprune as sp
from sparseprune.calibration import CalibrationData
from sparseprune.models import find_linears
from sparseprune.recovery import (
    Distillation,
    SparsityMasks,
    TokenStream,
    freeze_zeros,
    recover,
    to_dense,
)
from sparseprune.recovery.attention import FastAttention
from sparseprune.recovery.distill import Objective
from sparseprune.recovery.lora import adapters
from sparseprune.recovery.losses import IGNORED, head_loss, hidden_loss
from sparseprune.recovery.schedule import learning_rate_factor

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "mixing": lambda p: Mixing(p, lr=0.1),
}


class Mixing(torch.optim.Optimizer):
    """Every entry of a weight moves by the mean gradient, and so does its state: no zero survives by itself."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["mean"] = state.get("mean", 0) + torch.full_like(parameter, parameter.grad.mean())
                    parameter.sub_(group["lr"] * state["mean"] + 1e-3)


def peaked(make=tiny.llama, **kwargs) -> nn.Module:
    """A tiny model whose predictions are far from uniform, so that there is something to lose and to recover."""
    model = make(**kwargs)
    with torch.no_grad():
        for layer in find_linears(model, lm_head=True):
            layer.weight.mul_(6.0)
    return model


def stream(length: int = 24) -> TokenStream:
    return TokenStream(tiny.ids(1, 3000, seed=3)[0], length=length)


def pruned_pair(make=tiny.llama, **kwargs) -> tuple[nn.Module, nn.Module]:
    teacher = peaked(make, **kwargs)
    model = copy.deepcopy(teacher)
    sp.prune(model, "2:4")
    return model, teacher


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def divergence(model: nn.Module, teacher: nn.Module, seed: int = 99) -> float:
    """Mean KL(teacher || model) over unseen tokens, float64."""
    ids = tiny.ids(8, 32, seed=seed)
    with torch.no_grad():
        p, q = (F.log_softmax(it(ids).logits.double(), dim=-1) for it in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def is_plus_zero(tensor: torch.Tensor) -> bool:
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


def train_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        ids = tiny.ids(2, 16, seed=step)
        output = model(ids)
        output = output if isinstance(output, torch.Tensor) else output.logits
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_of_weights_and_state_survive_any_optimizer(name):
    model = peaked()
    sp.prune(model, "2:4")
    zeros = {layer.name: layer.module.weight == 0 for layer in find_linears(model)}
    before = weights(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    freeze_zeros(model, optimizer)
    train_by_hand(model, optimizer)
    for layer in find_linears(model):
        pruned, weight = zeros[layer.name], layer.module.weight.detach()
        assert is_plus_zero(weight[pruned])
        assert not torch.equal(weight[~pruned], before[f"{layer.name}.weight"][~pruned])
        for key, value in optimizer.state[layer.module.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == pruned.shape:
                assert not value[pruned].any(), key


def test_without_masks_a_zero_does_not_survive():
    model = peaked()
    sp.prune(model, "2:4")
    layer = find_linears(model)[0]
    pruned = layer.module.weight == 0
    train_by_hand(model, OPTIMIZERS["adamw"](list(model.parameters())))
    assert layer.module.weight[pruned].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.lstm_classifier])
def test_masks_hold_in_every_kind_of_layer(make, dtype):
    model = make().to(dtype)
    sp.prune(model, "unstructured", sparsity=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = freeze_zeros(model, optimizer)
    train_by_hand(model, optimizer)
    assert masks.count_zeros() == masks.zeros > 0.59 * masks.weights


def test_tied_weights_have_one_mask_and_keep_their_zeros():
    model = tiny.llama(tied=True)
    sp.prune(model, "2:4", lm_head=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    masks = freeze_zeros(model, optimizer, lm_head=True)
    train_by_hand(model, optimizer)
    pruned = masks.pruned[find_linears(model, lm_head=True)[-1].name]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert is_plus_zero(model.model.embed_tokens.weight.detach()[pruned])


def test_optimizer_state_from_before_pruning_is_masked_too():
    model = peaked()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train_by_hand(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    sp.prune(model, "2:4")
    with SparsityMasks.of(model).enforce(optimizer) as masks:
        for _ in range(2):
            for layer in find_linears(model):
                state = optimizer.state[layer.module.weight]
                assert not state["exp_avg"][masks.pruned[layer.name]].any()
                assert state["exp_avg"].any()
            optimizer.load_state_dict(saved)  # brings the dense state back


def test_a_negative_zero_becomes_positive_and_detach_frees_the_zeros():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight[0] = -0.0
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masks = freeze_zeros(model, optimizer)
    assert is_plus_zero(layer.weight.detach()[0])
    model(torch.ones(1, 4)).sum().backward()
    assert not layer.weight.grad[0].any() and layer.weight.grad[1].all()
    masks.detach()
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert layer.weight[0].all()


def test_freeze_zeros_needs_zeros():
    model = tiny.llama()
    with pytest.raises(ValueError, match="no linear layer with zeros"):
        freeze_zeros(model, torch.optim.SGD(model.parameters(), lr=0.1))


def reference_loss(states, weight, bias, labels, taught, its_weight, ce, kl, temperature):
    """The same sum by plain autograd."""
    logits = F.linear(states, weight, bias)
    counted = labels != IGNORED
    total = ce * F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if taught is not None:
        p = F.log_softmax(F.linear(taught, its_weight) / temperature, dim=-1)
        q = F.log_softmax(logits / temperature, dim=-1)
        rows = (p.exp() * (p - q)).sum(-1)
        total = total + kl * temperature**2 * rows[counted].sum()
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("ce", "kl"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_head_loss_and_its_gradients_are_those_of_autograd(ce, kl, temperature):
    torch.manual_seed(0)
    rows, width, vocabulary = 150, 12, 37  # three chunks, the last one short
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    states, weight, bias = make(rows, width), make(vocabulary, width), make(vocabulary)
    labels = torch.randint(vocabulary, (rows,))
    labels[::7] = IGNORED
    taught, its_weight = make(rows, 9), make(vocabulary, 9)
    leaves = [it.clone().requires_grad_() for it in (states, weight, bias)]
    result = head_loss(
        leaves[0], (leaves[1], leaves[2]), labels, taught, (its_weight, None), ce, kl, temperature
    )
    (result.total * 0.37).backward()
    expected = [it.clone().requires_grad_() for it in (states, weight, bias)]
    total = reference_loss(*expected, labels, taught, its_weight, ce, kl, temperature)
    (total * 0.37).backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for mine, its in zip(leaves, expected, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-10, atol=1e-12)
    parts = ce * result.cross_entropy + kl * temperature**2 * result.divergence
    torch.testing.assert_close(parts, result.total.detach(), rtol=1e-12, atol=1e-12)


def test_head_loss_passes_gradcheck():
    torch.manual_seed(1)
    states = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, IGNORED, 3, 1])

    def total(states, weight):
        return head_loss(states, (weight, None), labels, taught, None, 0.4, 0.8, 1.7).total

    assert torch.autograd.gradcheck(total, (states, weight))


def test_head_loss_of_plain_logits_without_labels():
    torch.manual_seed(2)
    logits = torch.randn(70, 11, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(70, 11, dtype=torch.float64)
    kept = logits.detach().clone()
    head_loss(logits, None, None, taught, None).total.backward()
    assert torch.equal(logits.detach(), kept)
    expected = F.softmax(kept, -1) - F.softmax(taught, -1)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


def test_head_loss_in_bfloat16_is_close_to_float64():
    torch.manual_seed(3)
    states, weight = torch.randn(100, 64), torch.randn(500, 64) / 4
    taught = states + 0.3 * torch.randn_like(states)
    labels = torch.randint(500, (100,))
    grads = []
    for dtype, compute in ((torch.float64, None), (torch.float32, torch.bfloat16)):
        leaf = states.to(dtype).requires_grad_()
        its = (taught.to(dtype), (weight.to(dtype), None))
        head_loss(leaf, (weight.to(dtype), None), labels, *its, 0.5, 0.5, 1.0, compute).total.backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("tokens", [7, 128, 150])
def test_attention_goes_backwards_like_float64(tokens, heads, key_heads, is_causal):
    torch.manual_seed(5)
    shapes = [(2, it, tokens, 16) for it in (heads, key_heads, key_heads)]
    inputs = [2 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)

    def run(dtype, fast):
        leaves = [it.to(dtype, copy=True).requires_grad_() for it in inputs]
        with FastAttention() if fast else contextlib.nullcontext():
            output = F.scaled_dot_product_attention(
                *leaves, is_causal=is_causal, scale=0.2, enable_gqa=heads != key_heads
            )
        assert ("_Attention" in type(output.grad_fn).__name__) is fast
        output.backward(upstream.to(dtype))
        return [output.detach(), *(it.grad for it in leaves)]

    exact = run(torch.float64, False)
    torchs, ours = ([it.double() for it in run(torch.bfloat16, fast)] for fast in (False, True))
    for mine, its, reference in zip(ours, torchs, exact, strict=True):
        error = (mine - reference).norm()
        assert error < 0.015 * reference.norm()
        assert error < 2 * (its - reference).norm() + 1e-6


def test_hidden_loss_counts_every_token_alike():
    torch.manual_seed(4)
    teacher = torch.randn(2, 5, 8)
    teacher[:, 0] *= 1000  # the first token's massive activations
    student = teacher * 1.1
    assert float(hidden_loss(student, teacher)) == pytest.approx(10 * 0.01, rel=1e-4)
    counts = torch.zeros(2, 5, dtype=torch.bool)
    counts[0, :2] = True
    assert float(hidden_loss(student, teacher, counts)) == pytest.approx(2 * 0.01, rel=1e-4)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_objective_is_what_the_whole_model_gives(make):
    model, teacher = pruned_pair(make)
    ids = tiny.ids(3, 20)
    weights = Distillation(cross_entropy=0.5, logits=0.7, temperature=2.0)
    losses = Objective(model, teacher, weights)(ids)
    with torch.no_grad():
        logits, its = (it(ids).logits[:, :-1].double() for it in (model, teacher))
    ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    p, q = F.log_softmax(its / 2, -1), F.log_softmax(logits / 2, -1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert float(losses.cross_entropy) == pytest.approx(float(ce), rel=1e-4)
    assert float(losses.divergence) == pytest.approx(float(kl), rel=1e-4)
    assert losses.total.item() == pytest.approx(float(0.5 * ce + 0.7 * 4 * kl), rel=1e-4)


def test_a_model_that_scales_its_logits_is_run_whole():
    class Capped(type(tiny.llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    model = peaked()
    model.__class__ = Capped
    ids = tiny.ids(2, 16)
    losses = Objective(model, None, Distillation(cross_entropy=1.0, logits=0.0))(ids)
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(losses.cross_entropy) == pytest.approx(float(expected), rel=1e-4)


def test_padding_counts_for_nothing():
    model, teacher = pruned_pair()
    ids, weights = tiny.ids(1, 12), Distillation(cross_entropy=1.0, logits=1.0, hidden=1.0)
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 12 + [0] * 6]),
    }
    objective = Objective(model, teacher, weights)
    assert objective.count(padded) == objective.count(ids) == 11
    for plain, with_padding in zip(objective(ids), objective(padded), strict=True):
        assert with_padding.item() == pytest.approx(plain.item(), rel=1e-4)


def test_labels_of_a_masked_language_model_are_not_shifted():
    model = peaked(tiny.bert, head=True)
    labels = tiny.ids(2, 10, seed=5)
    labels[:, ::2] = IGNORED
    batch = {"input_ids": tiny.ids(2, 10), "labels": labels}
    objective = Objective(model, None, Distillation(cross_entropy=1.0, logits=0.0))
    with torch.no_grad():
        expected = model(**batch).loss
    assert objective.count(batch) == 10
    assert objective(batch).total.item() == pytest.approx(float(expected), rel=1e-4)


RECIPES = {
    "logits": {},
    "with hidden states": {"distillation": Distillation(cross_entropy=0.2, hidden=0.5, temperature=1.5)},
    "autocast": {"autocast": "bfloat16"},
    "accumulated": {"batch": 4, "accumulate": 2},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.02},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_distillation_halves_the_divergence_to_the_teacher(recipe):
    model, teacher = pruned_pair()
    before, taught = divergence(model, teacher), weights(teacher)
    options = {"learning_rate": 3e-3, "batch": 4, "autocast": None} | RECIPES[recipe]
    report = recover(model, stream(), teacher, steps=80, **options)
    assert divergence(model, teacher) < 0.5 * before
    assert report.zeros_after == report.zeros_before == 7680
    assert report.steps == 80 and report.losses[-1].total < report.losses[0].total
    for name, tensor in weights(teacher).items():
        assert torch.equal(tensor, taught[name])


def test_distillation_beats_fine_tuning_on_text_that_says_nothing():
    # the tokens are random: only the teacher knows anything that can be learned
    results = {}
    for name in ("distilled", "fine-tuned"):
        model, teacher = pruned_pair()
        given = teacher if name == "distilled" else None
        recover(model, stream(), given, steps=60, learning_rate=3e-3, batch=4, autocast=None)
        results[name] = divergence(model, teacher)
    assert results["distilled"] < 0.5 * results["fine-tuned"]


def test_fine_tuning_learns_the_text():
    model, _ = pruned_pair()
    text = torch.arange(96).repeat(40)
    report = recover(
        model, TokenStream(text, length=24), steps=80, learning_rate=3e-3, batch=4, autocast=None
    )
    assert report.losses[-1].cross_entropy < 0.6 * report.losses[0].cross_entropy


def test_embeddings_and_head_are_trained_only_on_request():
    for train, changes in (("linears", False), ("all", True)):
        model, teacher = pruned_pair()
        before = weights(model)
        recover(model, stream(), teacher, steps=2, learning_rate=1e-2, train=train, autocast=None)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(model.state_dict()[name], before[name]) is not changes
        assert not torch.equal(model.state_dict()["model.norm.weight"], before["model.norm.weight"])


def test_a_bfloat16_model_learns_from_steps_below_its_spacing():
    model, teacher = pruned_pair()
    model = model.to(torch.bfloat16)
    before, flags = weights(model), [it.requires_grad for it in model.parameters()]
    recover(model, stream(), teacher, steps=30, learning_rate=1e-4, autocast=None)
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

    report = recover(model, batches, loss=loss, steps=60, learning_rate=1e-2, train="all", autocast=None)
    assert report.losses[-1].cross_entropy < 0.5 * report.losses[0].cross_entropy
    assert report.zeros_after == report.zeros_before

    distilled = copy.deepcopy(teacher)
    sp.prune(distilled, "unstructured", sparsity=0.5)
    report = recover(distilled, batches, teacher, steps=60, learning_rate=1e-2, autocast=None)
    assert report.losses[-1].divergence < 0.3 * report.losses[0].divergence


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_adapters_merge_to_what_was_trained_without_losing_a_zero(make):
    model, _ = pruned_pair(make)
    layers, ids = find_linears(model), tiny.ids(2, 20, seed=7)
    zeros = {layer.name: layer.weight == 0 for layer in layers}
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = weights(model)
    with adapters(layers, rank=4) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.02)
        for _ in range(3):
            model(ids).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = model(ids).logits.detach()
    assert torch.equal(model(ids).logits, trained)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for layer in layers:
        assert is_plus_zero(layer.weight[zeros[layer.name]])
        changed = layer.weight != (
            before[f"{layer.name}.weight"].t() if make is tiny.gpt2 else before[f"{layer.name}.weight"]
        )
        assert changed[~zeros[layer.name]].float().mean() > 0.9


def test_adapters_of_a_shared_weight_are_shared():
    shared = nn.Linear(16, 16, bias=False)
    other = nn.Linear(16, 16, bias=False)
    other.weight = shared.weight
    model = nn.Sequential(shared, nn.Tanh(), other)
    sp.prune(model, "2:4")
    with adapters(find_linears(model), rank=2) as parameters:
        assert len(parameters) == 2
        for parameter in parameters.values():
            parameter.data.normal_()
        expected = model(torch.ones(1, 16)).detach()
    assert other.weight is shared.weight and int((shared.weight == 0).sum()) == 128
    assert torch.equal(model(torch.ones(1, 16)), expected)


def test_recovery_by_adapters(tmp_path):
    model, teacher = pruned_pair()
    before, dense = divergence(model, teacher), weights(model)
    options = {"learning_rate": 1e-2, "batch": 4, "autocast": None, "lora": 8, "steps": 80}
    report = recover(model, stream(), teacher, checkpoint=tmp_path, **options)
    assert divergence(model, teacher) < 0.6 * before
    assert report.zeros_after == report.zeros_before == 7680
    assert torch.equal(model.state_dict()["model.norm.weight"], dense["model.norm.weight"])
    resumed, _ = pruned_pair()
    assert recover(resumed, stream(), teacher, checkpoint=tmp_path, **options).resumed_at == 80
    for name, tensor in weights(model).items():
        assert torch.equal(weights(resumed)[name], tensor)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        recover(model, stream(), teacher, steps=1, lora=0)


class Killed(Exception):
    pass


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, optimizer, dropout):
    make = tiny.gpt2 if dropout else tiny.llama
    options = {
        "steps": 9,
        "learning_rate": 3e-3,
        "optimizer": optimizer,
        "dropout": dropout,
        "autocast": None,
        "distillation": Distillation(cross_entropy=0.5, hidden=0.3),
        "evaluate_every": 2,
    }
    whole, teacher = pruned_pair(make)
    reference = recover(whole, stream(), teacher, evaluate=lambda it: divergence(it, teacher), **options)

    def dies(model: nn.Module) -> float:
        dies.calls += 1
        if dies.calls == 4:
            raise Killed
        return divergence(model, teacher)

    dies.calls = 0
    model, _ = pruned_pair(make)
    disk = {"checkpoint": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(Killed):
        recover(model, stream(), teacher, evaluate=dies, **options, **disk)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recovery.safetensors"]

    torch.rand(7)  # the global generator has no say
    again, _ = pruned_pair(make)
    report = recover(again, stream(), teacher, evaluate=lambda it: divergence(it, teacher), **options, **disk)
    assert report.resumed_at == 3
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert [it.total for it in report.losses] == [it.total for it in reference.losses]
    assert [(it.step, it.value) for it in report.evaluations] == [
        (it.step, it.value) for it in reference.evaluations
    ]

    finished, _ = pruned_pair(make)
    report = recover(
        finished, stream(), teacher, evaluate=lambda it: divergence(it, teacher), **options, **disk
    )
    assert report.resumed_at == 9 and torch.equal(
        next(iter(weights(finished).values())), next(iter(weights(whole).values()))
    )


def test_minutes_count_what_an_earlier_run_used(tmp_path):
    model, teacher = pruned_pair()
    options = {"minutes": 0.02, "autocast": None, "checkpoint": tmp_path}
    report = recover(model, stream(), teacher, **options)
    assert 1.2 <= report.seconds < 4 and report.steps > 1
    again, _ = pruned_pair()
    resumed = recover(again, stream(), teacher, **options)
    assert resumed.steps == report.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-2}, "learning_rate=0.003, got 0.01"),
        ({"seed": 1}, "seed=0, got 1"),
        ({"optimizer": "sgd"}, "optimizer='AdamW', got 'SGD'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    model, teacher = pruned_pair()
    options = {"steps": 2, "learning_rate": 3e-3, "autocast": None, "checkpoint": tmp_path}
    recover(model, stream(), teacher, **options)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        recover(model, stream(), teacher, **options | change)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    assert recover(model, stream(), teacher, resume=False, **options | change).resumed_at is None


def test_a_checkpoint_with_other_zeros_or_damage_is_refused(tmp_path):
    model, teacher = pruned_pair()
    options = {"steps": 2, "autocast": None, "checkpoint": tmp_path}
    recover(model, stream(), teacher, **options)
    other = peaked()
    sp.prune(other, "unstructured", sparsity=0.5)
    with pytest.raises(ValueError, match="zeros="):
        recover(other, stream(), teacher, **options)
    file = tmp_path / "recovery.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        recover(model, stream(), teacher, **options)


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
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        recover(model, stream(), teacher, steps=3, autocast=None)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])


def test_sparse_layers_must_be_dense_to_be_trained():
    model, teacher = pruned_pair()
    expected = weights(model)
    sp.sparsify(model, policy="always")
    with pytest.raises(ValueError, match="to_dense"):
        recover(model, stream(), teacher, steps=1)
    to_dense(model)
    assert weights(model).keys() == expected.keys()
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, expected[name])
    recover(model, stream(), teacher, steps=2, autocast=None)


BAD = [
    ({}, "steps, minutes: one of the two"),
    ({"steps": 1, "minutes": 1.0}, "steps, minutes: one of the two"),
    ({"steps": 0}, "steps: must be at least 1, got 0"),
    ({"minutes": -1.0}, "minutes: must be above 0"),
    ({"steps": 1, "learning_rate": 0.0}, "learning_rate: must be above 0"),
    ({"steps": 1, "optimizer": "adams"}, "optimizer: must be one of adamw"),
    ({"steps": 1, "train": "some"}, "train: must be"),
    ({"steps": 1, "warmup": 1.5}, r"warmup: must be in \[0, 1\)"),
    ({"steps": 1, "clip": 0.0}, "clip: must be above 0"),
    ({"steps": 1, "batch": 0}, "batch: must be at least 1"),
    ({"steps": 1, "accumulate": 3}, "accumulate: must divide"),
    ({"steps": 1, "autocast": "float16"}, "autocast: must be"),
    ({"steps": 1, "evaluate_every": 1}, "evaluate_every: needs evaluate"),
    ({"steps": 1, "checkpoint_every": 1}, "checkpoint_every: needs checkpoint"),
    ({"steps": 1, "teacher": None, "distillation": Distillation()}, "teacher: must be given"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(arguments, message):
    model, teacher = pruned_pair()
    with pytest.raises(ValueError, match=message):
        recover(model, stream(), **{"teacher": teacher} | arguments)


def test_bad_teachers_and_data_are_named():
    model, teacher = pruned_pair()
    with pytest.raises(ValueError, match="teacher: must be another model"):
        recover(model, stream(), model, steps=1)
    with pytest.raises(ValueError, match="vocabulary of 96, it has 90"):
        recover(model, stream(), tiny.llama(vocab_size=90), steps=1)
    with pytest.raises(ValueError, match="hidden: needs as many blocks"):
        recover(model, stream(), tiny.llama(layers=3), steps=1, distillation=Distillation(hidden=1.0))
    with pytest.raises(TypeError, match="TokenStream"):
        recover(model, "some text", teacher, steps=1)
    with pytest.raises(ValueError, match="positions end at 64"):
        recover(model, stream(100), teacher, steps=1)
    with pytest.raises(ValueError, match="at least one window of 50 tokens, got 10"):
        TokenStream(torch.arange(10), length=50)
    with pytest.raises(ValueError, match="must have labels"):
        recover(tiny.bert(head=True), CalibrationData([tiny.ids()]), steps=1)
    with pytest.raises(ValueError, match="temperature: must be above 0"):
        Distillation(temperature=0)
    with pytest.raises(ValueError, match="must not all be 0"):
        Distillation(logits=0)


def test_report_reads_as_a_table_and_as_json():
    import json

    model, teacher = pruned_pair()
    report = recover(
        model, stream(), teacher, steps=40, autocast=None, evaluate=lambda _: 1.5, evaluate_every=20
    )
    text = str(report)
    assert "40 steps" in text and "7,680 before, 7,680 after, of 15,360" in text and "cross-entropy" in text
    assert len(report.table().rows) <= 17
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["losses"]) == 40 and [it["step"] for it in data["evaluations"]] == [0, 20, 40]
