"""Weights trained through their codes: the forward pass is what is stored, the backward one is what the papers say."""

from __future__ import annotations

import pytest
import torch
from helpers.shapes import generator
from torch import nn

from sparseprune.kernels.packing import CODES
from sparseprune.models.sites import site_of
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.quantizer import TrainedCodes
from sparseprune.weights.sparse_weight import SparseWeight

KINDS = ["int8", "int4", "int4_minimum"]


def layer(rows: int = 5, cols: int = 72) -> nn.Linear:
    linear = nn.Linear(cols, rows)
    linear.weight.data = torch.randn(rows, cols, generator=generator(1)) * 0.1
    return linear


def encoded(linear: nn.Linear, kind: str, form: str = "dense", group: int = 32) -> SparseWeight:
    return SparseWeight.from_dense(linear.weight, form, Encoding(kind, group, torch.float16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [32, 72, 65, 1])
def test_a_forward_pass_is_exactly_what_will_be_stored(kind, cols):
    linear = layer(cols=cols)
    weight = encoded(linear, kind)
    with TrainedCodes([(site_of(linear), weight)]) as codes:
        assert torch.equal(linear.weight, weight.dense())
        optimizer = torch.optim.Adam(linear.parameters(), 0.01)
        for seed in range(5):
            x = torch.randn(7, cols, generator=generator(seed))
            (linear(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = linear.weight.detach().clone()
    (found,) = codes.weights().values()
    assert torch.equal(found.dense(), trained) and not torch.equal(trained, weight.dense())
    assert torch.equal(linear.weight, trained) and type(linear) is nn.Linear
    assert [name for name, _ in linear.named_parameters()] == ["bias", "weight"]
    moved = found.parts().items()
    assert any(
        not torch.equal(it, weight.parts()[name]) for name, it in moved if name in ("scales", "minimums")
    )
    found.validate()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_of_two_of_four_stay_zeros_under_any_optimizer(kind):
    linear = layer(8, 64)
    linear.weight.data.view(8, 16, 4)[..., 1:3] = 0
    zeros = linear.weight == 0
    weight = encoded(linear, kind, "2:4")
    with TrainedCodes([(site_of(linear), weight)]) as codes:
        parameters = list(linear.parameters())
        for _ in range(3):
            linear(torch.randn(9, 64)).square().sum().backward()
            with torch.no_grad():
                for it in parameters:
                    it.add_(torch.randn(it.shape) * 0.1)  # moves what has no gradient, too
    (found,) = codes.weights().values()
    assert not bool(linear.weight[zeros].any())
    assert torch.equal(found.mask, weight.mask) and torch.equal(found.dense(), linear.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_straight_through_estimator(kind):
    rows, cols, size = 3, 64, 32
    linear = layer(rows, cols)
    weight = encoded(linear, kind)
    code = CODES[kind]
    with TrainedCodes([(site_of(linear), weight)]):
        quantizer = linear.parametrizations.weight[0]
        original = linear.parametrizations.weight.original
        with torch.no_grad():
            original.mul_(1.3)  # some are clamped
        upstream = torch.randn(rows, cols, generator=generator(2))
        (linear.weight * upstream).sum().backward()
        scale = weight.scales.double().repeat_interleave(size, 1)
        minimum = 0 if weight.minimums is None else weight.minimums.double().repeat_interleave(size, 1)
        steps = (original.detach().double() - minimum) / scale + code.zero
        rounded = steps.round().clamp(code.least, code.largest)
        inside = (rounded - steps).abs() <= 0.5
        assert 0 < int(inside.sum()) < inside.numel()
        expected = torch.where(inside, upstream, 0)
        assert torch.equal(original.grad, expected)
        slope = torch.where(inside, rounded - steps, rounded - code.zero)
        of_scale = (upstream.double() * slope).view(rows, -1, size).sum(-1)
        reach = quantizer.reach.grad.double() * quantizer.farthest / quantizer.damping
        assert torch.allclose(reach, of_scale, rtol=2e-2, atol=2e-2)
        if code.minimums:
            of_minimum = torch.where(inside, 0, upstream.double()).view(rows, -1, size).sum(-1)
            assert torch.allclose(quantizer.minimum.grad.double(), of_minimum, rtol=1e-5, atol=1e-5)


def test_scales_of_zero_and_groups_of_zeros_stay_finite():
    linear = layer(2, 64)
    linear.weight.data[:, :32] = 0
    weight = encoded(linear, "int4")
    assert bool((weight.scales == 0).any())
    with TrainedCodes([(site_of(linear), weight)]):
        linear(torch.ones(1, 64)).sum().backward()
        assert all(bool(it.grad.isfinite().all()) for it in linear.parameters())
    assert not bool(linear.weight[:, :32].any())


def test_an_error_inside_leaves_a_plain_layer():
    linear = layer()
    weight = encoded(linear, "int4")
    with pytest.raises(KeyError), TrainedCodes([(site_of(linear), weight)]):
        raise KeyError
    assert type(linear) is nn.Linear and torch.equal(linear.weight, weight.dense())


def test_autocast_gets_the_weight_in_its_own_dtype():
    linear = layer()
    weight = encoded(linear, "int4")
    with TrainedCodes([(site_of(linear), weight)]), torch.autocast("cpu", torch.bfloat16):
        assert linear.weight.dtype == torch.bfloat16
        assert torch.equal(linear.weight, weight.dense().bfloat16())
        assert linear(torch.ones(2, 72)).dtype == torch.bfloat16
