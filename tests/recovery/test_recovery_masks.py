"""Zeros that survive any optimizer, and adapters that merge without losing one."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.recovery import divergence, is_plus_zero, peaked, pruned_pair, stream, weights
from torch import nn

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.recovery import SparsityMasks, freeze_zeros, recover
from sparseprune.recovery.lora import adapters

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
    zeros = {layer.name: layer.module.weight == 0 for layer in find_sites(model)}
    before = weights(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    freeze_zeros(model, optimizer)
    train_by_hand(model, optimizer)
    for layer in find_sites(model):
        pruned, weight = zeros[layer.name], layer.module.weight.detach()
        assert is_plus_zero(weight[pruned])
        assert not torch.equal(weight[~pruned], before[f"{layer.name}.weight"][~pruned])
        for key, value in optimizer.state[layer.module.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == pruned.shape:
                assert not value[pruned].any(), key


def test_without_masks_a_zero_does_not_survive():
    model = peaked()
    sp.prune(model, "2:4")
    layer = find_sites(model)[0]
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
    pruned = masks.pruned[find_sites(model, lm_head=True)[-1].name]
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
            for layer in find_sites(model):
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


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_adapters_merge_to_what_was_trained_without_losing_a_zero(make):
    model, _ = pruned_pair(make)
    layers, ids = find_sites(model), tiny.ids(2, 20, seed=7)
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
    with adapters(find_sites(model), rank=2) as parameters:
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
    report = recover(model, stream(), teacher=teacher, checkpoint=tmp_path, **options)
    assert divergence(model, teacher) < 0.6 * before
    assert report.zeros_after == report.zeros_before == 7680
    assert torch.equal(model.state_dict()["model.norm.weight"], dense["model.norm.weight"])
    resumed, _ = pruned_pair()
    assert recover(resumed, stream(), teacher=teacher, checkpoint=tmp_path, **options).resumed_at == 80
    for name, tensor in weights(model).items():
        assert torch.equal(weights(resumed)[name], tensor)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        recover(model, stream(), teacher=teacher, steps=1, lora=0)
