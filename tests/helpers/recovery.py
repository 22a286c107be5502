"""A pruned tiny model, its dense teacher, and a text: what the tests of recovery begin with."""

from __future__ import annotations

import copy

import torch
from helpers import tiny
from torch import Tensor, nn
from torch.nn import functional as F

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.recovery import TokenStream


def peaked(make=tiny.llama, **kwargs) -> nn.Module:
    """A tiny model whose predictions are far from uniform, so that there is something to lose and to recover."""
    model = make(**kwargs)
    with torch.no_grad():
        for layer in find_sites(model, lm_head=True):
            layer.weight.mul_(6.0)
    return model


def pruned_pair(make=tiny.llama, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(2:4 model, dense model)"""
    teacher = peaked(make, **kwargs)
    model = copy.deepcopy(teacher)
    sp.prune(model, "2:4")
    return model, teacher


def stream(length: int = 24) -> TokenStream:
    return TokenStream(tiny.ids(1, 3000, seed=3)[0], length=length)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def divergence(model: nn.Module, teacher: nn.Module, seed: int = 99) -> float:
    """Mean KL(teacher || model) over unseen tokens, float64."""
    ids = tiny.ids(8, 32, seed=seed)
    with torch.no_grad():
        p, q = (F.log_softmax(it(ids).logits.double(), dim=-1) for it in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def is_plus_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())
