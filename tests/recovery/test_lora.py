"""Adapters that merge without losing a zero."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.recovery import divergence, is_plus_zero, pruned_pair, stream, weights
from torch import nn

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.recovery import Training, recover
from sparseprune.recovery.lora import adapters


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
    options = {"training": Training(1e-2, windows=4, autocast=None, lora=8), "steps": 80}
    report = recover(model, stream(), teacher=teacher, checkpoint=tmp_path, **options)
    assert divergence(model, teacher) < 0.6 * before
    assert report.zeros_after == report.zeros_before == 7680
    assert torch.equal(model.state_dict()["model.norm.weight"], dense["model.norm.weight"])
    resumed, _ = pruned_pair()
    assert recover(resumed, stream(), teacher=teacher, checkpoint=tmp_path, **options).resumed_at == 80
    for name, tensor in weights(model).items():
        assert torch.equal(weights(resumed)[name], tensor)
    with pytest.raises(ValueError, match="rank must be at least 1"), adapters(find_sites(model), rank=0):
        pass
