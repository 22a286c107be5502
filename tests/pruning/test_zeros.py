"""Zeros that survive any optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.recovery import is_plus_zero, peaked, pruned_pair, weights
from torch import nn

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.pruning import Zeros, hold_zeros

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


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_of_weights_and_state_survive_any_optimizer(name, known):
    model = peaked()
    sp.prune(model, "2:4")
    zeros = {layer.name: layer.module.weight == 0 for layer in find_sites(model)}
    before = weights(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    with hold_zeros(model, optimizer if known else None):
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
    zeros = Zeros(model).attach(optimizer)
    train_by_hand(model, optimizer)
    assert zeros.count_now() == zeros.count > 0.59 * zeros.weights


def test_tied_weights_have_one_mask_and_keep_their_zeros():
    model = tiny.llama(tied=True)
    sp.prune(model, "2:4", lm_head=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    zeros = Zeros(model).attach(optimizer)
    train_by_hand(model, optimizer)
    (pruned,) = [it for name, it in zeros.masks().items() if "embed_tokens" in name]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert is_plus_zero(model.model.embed_tokens.weight.detach()[pruned])


def test_optimizer_state_from_before_pruning_is_masked_too():
    model = peaked()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train_by_hand(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    sp.prune(model, "2:4")
    with hold_zeros(model, optimizer) as zeros:
        pruned = zeros.masks()
        for _ in range(2):
            for layer in find_sites(model):
                state = optimizer.state[layer.module.weight]
                assert not state["exp_avg"][pruned[f"{layer.name}.weight"]].any()
                assert state["exp_avg"].any()
            optimizer.load_state_dict(saved)  # brings the dense state back


def test_a_negative_zero_becomes_positive_and_detach_frees_the_zeros():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight[0] = -0.0
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    zeros = Zeros(model).attach(optimizer)
    assert is_plus_zero(layer.weight.detach()[0])
    model(torch.ones(1, 4)).sum().backward()
    assert not layer.weight.grad[0].any() and layer.weight.grad[1].all()
    zeros.detach()
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert layer.weight[0].all()


def test_gradients_are_zero_before_anybody_clips_them():
    model, _ = pruned_pair()
    with hold_zeros(model) as zeros:
        model(tiny.ids()).logits.square().mean().backward()
        for name, pruned in zeros.masks().items():
            gradient = model.get_parameter(name).grad
            assert is_plus_zero(gradient[pruned]) and gradient[~pruned].all()


def test_parameters_of_any_shape():
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten())
    kernel, bias = model[0].weight, model[0].bias
    masks = {"0.weight": torch.rand(4, 3, 5, 5) < 0.4, "0.bias": torch.tensor([True, False, False, True])}
    zeros = Zeros(model, ())
    zeros.set(masks)
    assert all(torch.equal(zeros.masks()[name], mask) for name, mask in masks.items())
    assert torch.equal(kernel == 0, masks["0.weight"]) and torch.equal(bias == 0, masks["0.bias"])
    assert zeros.count == zeros.count_now() == sum(int(mask.sum()) for mask in masks.values())
    with zeros.held():
        model(torch.ones(1, 3, 5, 5)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(kernel == 0, masks["0.weight"]) and torch.equal(bias == 0, masks["0.bias"])


def test_layers_of_another_model_are_named():
    with pytest.raises(
        TypeError, match="layers: model.layers.0.self_attn.q_proj.weight must be a parameter of"
    ):
        Zeros(tiny.llama(), find_sites(tiny.llama()))


def test_hold_zeros_needs_zeros():
    with pytest.raises(ValueError, match="no linear layer with zeros"), hold_zeros(tiny.llama()):
        pass
