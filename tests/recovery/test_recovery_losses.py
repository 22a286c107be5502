"""Recovery's losses and its attention against plain autograd in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from helpers import tiny
from helpers.recovery import divergence, peaked, pruned_pair, stream
from torch.nn import functional as F

from sparseprune.models.losses import IGNORED
from sparseprune.recovery import Distillation, Training, recover
from sparseprune.recovery.attention import FastAttention
from sparseprune.recovery.head import head_loss
from sparseprune.recovery.objective import Objective
from sparseprune.recovery.terms import weight_of
from sparseprune.recovery.terms.base import LogitsTerm, RowLosses, Term
from sparseprune.recovery.terms.cross_entropy import CrossEntropy
from sparseprune.recovery.terms.hidden import hidden_loss
from sparseprune.recovery.terms.logits import Divergence


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
    terms = [CrossEntropy(ce), Divergence(kl, temperature)]
    result = head_loss(leaves[0], (leaves[1], leaves[2]), labels, taught, (its_weight, None), terms)
    (result.total * 0.37).backward()
    expected = [it.clone().requires_grad_() for it in (states, weight, bias)]
    total = reference_loss(*expected, labels, taught, its_weight, ce, kl, temperature)
    (total * 0.37).backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for mine, its in zip(leaves, expected, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-10, atol=1e-12)
    parts = ce * result.sums[0] + kl * temperature**2 * result.sums[1]
    torch.testing.assert_close(parts, result.total.detach(), rtol=1e-12, atol=1e-12)


def test_head_loss_passes_gradcheck():
    torch.manual_seed(1)
    states = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, IGNORED, 3, 1])

    def total(states, weight):
        terms = [CrossEntropy(0.4), Divergence(0.8, 1.7)]
        return head_loss(states, (weight, None), labels, taught, None, terms).total

    assert torch.autograd.gradcheck(total, (states, weight))


def test_head_loss_of_plain_logits_without_labels():
    torch.manual_seed(2)
    logits = torch.randn(70, 11, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(70, 11, dtype=torch.float64)
    kept = logits.detach().clone()
    head_loss(logits, None, None, taught, None, [Divergence(1.0)]).total.backward()
    assert torch.equal(logits.detach(), kept)
    expected = F.softmax(kept, -1) - F.softmax(taught, -1)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


def test_head_loss_in_bfloat16_is_close_to_float64():
    torch.manual_seed(3)
    states, weight = torch.randn(100, 64), torch.randn(500, 64) / 4
    taught = states + 0.3 * torch.randn_like(states)
    labels = torch.randint(500, (100,))
    grads, terms = [], [CrossEntropy(0.5), Divergence(0.5)]
    for dtype, compute in ((torch.float64, None), (torch.float32, torch.bfloat16)):
        leaf = states.to(dtype).requires_grad_()
        its = (taught.to(dtype), (weight.to(dtype), None))
        head_loss(leaf, (weight.to(dtype), None), labels, *its, terms, compute).total.backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 7), (1, 128), (2, 150)])
def test_attention_goes_backwards_like_float64(batch, tokens, heads, key_heads, is_causal):
    torch.manual_seed(5)
    shapes = [(batch, tokens, it, 16) for it in (heads, key_heads, key_heads, heads)]
    # a model's projections give [batch, tokens, heads, features], and heads are moved forward as a view
    tensors = [torch.randn(shape, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    inputs, upstream = [2 * it for it in tensors[:3]], tensors[3]

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
    assert float(losses["cross_entropy"]) == pytest.approx(float(ce), rel=1e-4)
    assert float(losses["logits"]) == pytest.approx(float(kl), rel=1e-4)
    assert losses["total"].item() == pytest.approx(float(0.5 * ce + 0.7 * 4 * kl), rel=1e-4)


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
    assert float(losses["cross_entropy"]) == pytest.approx(float(expected), rel=1e-4)


def test_padding_counts_for_nothing():
    model, teacher = pruned_pair()
    ids, weights = tiny.ids(1, 12), Distillation(cross_entropy=1.0, logits=1.0, hidden=1.0)
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 12 + [0] * 6]),
    }
    objective = Objective(model, teacher, weights)
    assert objective.count(padded) == objective.count(ids) == 11
    plain, with_padding = objective(ids), objective(padded)
    for name, value in plain.items():
        assert with_padding[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_labels_of_a_masked_language_model_are_not_shifted():
    model = peaked(tiny.bert, head=True)
    labels = tiny.ids(2, 10, seed=5)
    labels[:, ::2] = IGNORED
    batch = {"input_ids": tiny.ids(2, 10), "labels": labels}
    objective = Objective(model, None, Distillation(cross_entropy=1.0, logits=0.0))
    with torch.no_grad():
        expected = model(**batch).loss
    assert objective.count(batch) == 10
    assert objective(batch)["total"].item() == pytest.approx(float(expected), rel=1e-4)


@dataclass(frozen=True)
class Squares(LogitsTerm):
    """Half the squared distance of the logits, `power` times; all of its gradient is its own."""

    power: float = 1.0
    title = "squares"

    @property
    def scale(self):
        return self.power

    def rows(self, rows):
        difference = rows.logits - rows.teacher
        factor = self.weight * self.scale
        return RowLosses(
            difference.square().sum(dim=1) / 2, add=lambda grad: grad.add_(difference, alpha=factor)
        )


class LastBlock(Term):
    """What takes no pass over the logits."""

    title = "last block"
    reads_blocks = True

    def loss(self, student, teacher, batch):
        return (student.hidden[-1] - teacher.hidden[-1]).square().mean()


@dataclass(frozen=True)
class Own(Distillation):
    squares: float = weight_of(Squares, 0.0, "power")
    power: float = 1.0
    last: float = weight_of(LastBlock, 0.0)


def test_terms_of_ones_own_share_the_pass_with_the_others():
    model, teacher = pruned_pair()
    ids = tiny.ids(3, 20)
    objective = Objective(
        model, teacher, Own(cross_entropy=0.5, logits=0.7, squares=0.3, power=2.0, last=0.2)
    )
    losses = objective(ids)
    losses["total"].backward()
    found = {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        its = teacher(ids, output_hidden_states=True)
    outputs = model(ids, output_hidden_states=True)
    p, q = F.log_softmax(its.logits[:, :-1], -1), F.log_softmax(outputs.logits[:, :-1], -1)
    squares = (outputs.logits - its.logits)[:, :-1].square().sum(-1).mean() / 2
    ce, kl = F.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten()), (p.exp() * (p - q)).sum(-1).mean()
    blocks = []
    for it in (model, teacher):
        handle = it.model.layers[-1].register_forward_hook(
            lambda module, args, output: blocks.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
        it(ids)
        handle.remove()
    last = (blocks[0] - blocks[1].detach()).square().mean()
    total = 0.5 * ce + 0.7 * kl + 0.3 * 2 * squares + 0.2 * last
    total.backward()
    assert losses["total"].item() == pytest.approx(total.item(), rel=1e-4)
    assert losses["squares"].item() == pytest.approx(squares.item(), rel=1e-4)
    assert losses["last"].item() == pytest.approx(last.item(), rel=1e-4)
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_term_of_ones_own_is_trained_checked_and_reported():
    model, teacher = pruned_pair()
    before = divergence(model, teacher)
    recipe = Own(logits=0.0, squares=1.0)
    report = recover(
        model,
        stream(),
        teacher=teacher,
        steps=60,
        training=Training(3e-3, windows=4, autocast=None),
        distillation=recipe,
    )
    assert divergence(model, teacher) < 0.7 * before
    assert report.losses[-1].terms["squares"] < report.losses[0].terms["squares"]
    assert "squares" in str(report) and report.losses[0].terms["last"] == 0
    with pytest.raises(ValueError, match=r"teacher: must be given for .* squares=1, last=0"):
        recover(model, stream(), steps=1, distillation=recipe)
    with pytest.raises(ValueError, match="last: must be at least 0, got -1"):
        Own(last=-1)
