"""Scores against their formulas, and the gradients that some of them need against autograd."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import find_sites
from sparseprune.pruning import METHODS, prune
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.methods.gradient import gradient_scores
from sparseprune.pruning.methods.random_scores import random_scores
from sparseprune.pruning.methods.ria import ria_scores
from sparseprune.statistics.gradients import GradientMagnitudes, GradientSum, collect_gradients
from sparseprune.statistics.inputs import InputSquares

CALIBRATION = CalibrationData([tiny.ids(seed=0), tiny.ids(seed=1), tiny.ids(seed=2)], "random ids")


def masks(model):
    return {layer.name: layer.weight != 0 for layer in find_sites(model)}


class TestRandom:
    def test_same_weights_same_scores_whatever_else_is_drawn(self):
        weight = torch.randn(6, 8)
        first = random_scores(weight)
        torch.rand(3)
        assert torch.equal(random_scores(weight.clone()), first)
        assert torch.equal(random_scores(weight.t().contiguous().t()), first)
        assert not torch.equal(random_scores(weight + 1), first)
        assert not torch.equal(random_scores(weight, seed=1), first)
        assert not torch.equal(random_scores(weight, seed=2**32 - 1), random_scores(weight, seed=1))

    def test_uniform_and_blind_to_the_weights(self):
        scores = random_scores(torch.arange(250_000.0).reshape(500, 500))
        assert scores.min() >= 0 and scores.max() < 1
        assert scores.mean().item() == pytest.approx(0.5, abs=0.01)
        assert scores.std().item() == pytest.approx(12**-0.5, abs=0.01)
        order = torch.arange(250_000.0) - 125_000
        assert abs(torch.corrcoef(torch.stack((order, scores.flatten())))[0, 1]) < 0.01

    def test_prune_with_seeds(self):
        pruned = {}
        for key, seed, exclude in (("a", 0, None), ("b", 0, "*.q_proj"), ("c", 1, None)):
            model = tiny.llama()
            prune(model, "unstructured", "random", sparsity=0.5, exclude=exclude, seed=seed)
            pruned[key] = masks(model)["model.layers.1.mlp.up_proj"]
        assert torch.equal(pruned["a"], pruned["b"]), "the other layers do not matter"
        assert not torch.equal(pruned["a"], pruned["c"])


class TestRia:
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    def test_against_loops(self, power):
        weight, inputs = torch.randn(3, 5), torch.randn(7, 5)
        weight[1, 2] = 0
        statistic = InputSquares(5, torch.device("cpu"))
        statistic.update(inputs)
        scores = ria_scores(weight, statistic, power)
        size = weight.abs().tolist()
        for i in range(3):
            for j in range(5):
                share = size[i][j] / sum(row[j] for row in size) + size[i][j] / sum(size[i])
                norm = sum(float(inputs[t, j]) ** 2 for t in range(7)) ** 0.5
                assert scores[i, j].item() == pytest.approx(share * norm**power, rel=1e-5)

    def test_half_is_the_default(self):
        statistic = InputSquares(4, torch.device("cpu"))
        statistic.update(torch.randn(7, 4))
        weight = torch.randn(3, 4)
        assert torch.equal(METHODS["ria"].score(weight, statistic), ria_scores(weight, statistic, 0.5))
        assert not torch.allclose(ria_scores(weight, statistic), ria_scores(weight, statistic, 1.0))

    def test_channels_of_zeros(self):
        statistic = InputSquares(4, torch.device("cpu"))
        statistic.update(torch.tensor([[1.0, 0.0, 2.0, 3.0]]))
        weight = torch.randn(3, 4)
        weight[1] = 0
        weight[:, 2] = 0
        scores = ria_scores(weight, statistic)
        assert scores.isfinite().all()
        assert (scores[1] == 0).all() and (scores[:, [1, 2]] == 0).all()

    def test_no_channel_goes_as_a_whole(self):
        # one input channel with weights far smaller than the others': magnitude removes all of it
        weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 0.5
        weight[:, 3] *= 0.01
        statistic = InputSquares(64, torch.device("cpu"))
        statistic.update(torch.ones(1, 64))
        assert (ria_scores(weight, statistic).topk(32, dim=1).indices == 3).any()
        assert not (weight.topk(32, dim=1).indices == 3).any()


def autograd_gradients(model, batches, losses):
    """layer name -> list over batches of the gradient [out, in], by plain backward passes."""
    found = {layer.name: [] for layer in find_sites(model)}
    for batch in batches:
        model.zero_grad()
        losses(model, batch).backward()
        for layer in find_sites(model):
            gradient = layer.module.weight.grad.clone()
            found[layer.name].append(gradient.t() if type(layer.module).__name__ == "Conv1D" else gradient)
    model.zero_grad()
    return found


def shifted_loss(model, ids):
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    return -logits.gather(2, ids[:, 1:, None]).mean()


class TestGradients:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    def test_next_token_loss_of_a_causal_model(self, build):
        model = build()
        expected = autograd_gradients(model, CALIBRATION, shifted_loss)
        layers = find_sites(model)
        total = collect_gradients(model, layers, CALIBRATION)
        sizes = collect_gradients(model, layers, CALIBRATION, statistic=GradientMagnitudes)
        for layer in layers:
            gradients = torch.stack(expected[layer.name])
            assert total[layer.name].total.shape == layer.weight.shape
            assert total[layer.name].tokens == 3
            assert torch.allclose(total[layer.name].total, gradients.sum(0), atol=1e-6)
            assert torch.allclose(sizes[layer.name].total, gradients.abs().sum(0), atol=1e-6)
            taylor = METHODS["taylor"].score(layer.weight, sizes[layer.name])
            by_batch = sum((layer.weight * gradient).abs() for gradient in gradients)
            assert torch.allclose(taylor, by_batch, atol=1e-6)

    def test_labels_use_the_models_own_loss(self):
        model = tiny.bert(head=True)
        batches = [{"input_ids": tiny.ids(seed=seed), "labels": tiny.ids(seed=seed + 7)} for seed in range(2)]
        expected = autograd_gradients(model, batches, lambda model, batch: model(**batch).loss)
        layers = find_sites(model)
        total = collect_gradients(model, layers, batches)
        for layer in layers:
            assert torch.allclose(total[layer.name].total, sum(expected[layer.name]), atol=1e-6)

    def test_padding_is_left_out(self):
        model = tiny.llama()
        ids = tiny.ids(2, 12)
        mask = torch.ones_like(ids)
        mask[:, 8:] = 0
        layers = find_sites(model)
        padded = collect_gradients(model, layers, [{"input_ids": ids, "attention_mask": mask}])
        short = collect_gradients(model, layers, [ids[:, :8]])
        for name in padded:
            assert torch.allclose(padded[name].total, short[name].total, atol=1e-6)

    def test_a_loss_of_ones_own(self):
        model = tiny.lstm_classifier()

        def loss(output, batch):
            return output.square().mean()

        layers = find_sites(model)
        expected = autograd_gradients(model, CALIBRATION, lambda model, batch: loss(model(batch), batch))
        total = collect_gradients(model, layers, CALIBRATION, loss=loss)
        for layer in layers:
            assert torch.allclose(total[layer.name].total, sum(expected[layer.name]), atol=1e-6)
        report = prune(
            model,
            "unstructured",
            replace(METHODS["taylor"], loss=loss),
            sparsity=0.5,
            calibration=CALIBRATION,
        )
        assert report.sparsity_after == pytest.approx(0.5, abs=0.01)

    def test_the_model_stays_as_it_was(self):
        model = tiny.llama().train()
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.grad = torch.ones_like(weight)
        model.model.embed_tokens.weight.requires_grad_(False)
        required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        layers = [layer for layer in find_sites(model) if "mlp" in layer.name]
        with torch.no_grad():
            statistics = collect_gradients(model, layers, CALIBRATION)
        assert statistics.keys() == {layer.name for layer in layers}
        assert (weight.grad == 1).all()
        assert model.model.layers[0].mlp.down_proj.weight.grad is None
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
        assert model.training
        assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    def test_a_shared_weight_gets_all_its_uses(self):
        model = tiny.llama(tied=True)
        layers = find_sites(model, include="lm_head", lm_head=True)
        statistics = collect_gradients(model, layers, [tiny.ids()])
        shifted_loss(model, tiny.ids()).backward()
        assert torch.allclose(statistics["lm_head"].total, model.lm_head.weight.grad, atol=1e-6)

    def test_half_precision(self):
        model = tiny.llama().to(torch.bfloat16)
        layers = find_sites(model)
        half = collect_gradients(model, layers, CALIBRATION)
        full = collect_gradients(model.float(), layers, CALIBRATION)
        for name, statistic in half.items():
            assert statistic.total.dtype == torch.float32
            assert torch.corrcoef(torch.stack((statistic.total, full[name].total)).flatten(1))[0, 1] > 0.98

    def test_errors(self):
        ids = [tiny.ids()]
        cases = [
            (tiny.bert(), ids, {}, "loss: BertModel gives none for these batches, .* pass batches with"),
            (tiny.bert(head=True), ids, {}, "loss: BertForMaskedLM gives none"),
            (tiny.lstm_classifier(), ids, {}, "loss: LstmClassifier gives none"),
            (tiny.llama(), [tiny.ids(2, 1)], {}, "batches: must hold token ids .* at least 2 tokens"),
            (tiny.llama(), [], {}, "batches: must hold at least one"),
            (tiny.gpt2(), [tiny.ids(1, 65)], {}, "positions end at 64"),
            (
                tiny.llama(),
                ids,
                {"loss": lambda out, batch: out.logits},
                r"must be one number .*got \[2, 16, 96",
            ),
            (tiny.llama(), ids, {"loss": lambda out, batch: torch.tensor(1.0)}, "loss: must be one number"),
            (tiny.llama(), ids, {"loss": lambda out, batch: 3.0}, "loss: must be one number .*got float"),
            (
                tiny.llama(),
                ids,
                {"loss": lambda out, batch: out.logits.sum() / 0},
                "loss: must be finite, got",
            ),
        ]
        for model, batches, options, match in cases:
            with pytest.raises(ValueError, match=match):
                collect_gradients(model, find_sites(model), batches, statistic=GradientSum, **options)

    def test_gradient_not_finite(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        def loss(output, batch):
            return output.sum().abs().sqrt()

        with pytest.raises(ValueError, match="batches: the gradient of 1 must be finite"), torch.no_grad():
            for parameter in model[1].parameters():
                parameter.zero_()
            collect_gradients(model, find_sites(model), [torch.randn(3, 4)], loss=loss)
        assert model[0].weight.requires_grad

    def test_a_layer_without_gradient(self):
        model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        model.forward = lambda x: model["used"](x)
        with pytest.raises(ValueError, match="depend on every layer, 1 got no gradient, the first is unused"):
            collect_gradients(
                model, find_sites(model), [torch.randn(3, 4)], loss=lambda out, batch: out.sum()
            )


def test_gradient_cancels_out_and_taylor_does_not():
    weight = torch.ones(1, 2)
    totals = {}
    for statistic in (GradientSum, GradientMagnitudes):
        totals[statistic] = statistic(2, torch.device("cpu"), 1)
        for gradient in ([[1.0, 0.3]], [[-1.0, 0.3]]):
            totals[statistic].update(torch.tensor(gradient))
    assert gradient_scores(weight, totals[GradientSum]).tolist() == [[0.0, pytest.approx(0.6)]]
    assert gradient_scores(weight, totals[GradientMagnitudes]).tolist() == [[2.0, pytest.approx(0.6)]]


def trained_llama():
    """A Llama that has learnt to count, so that its gradients mean something."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        shifted_loss(model, counting(generator)).backward()
        optimizer.step()
    return model.eval()


def counting(generator):
    start = torch.randint(96, (8, 1), generator=generator)
    step = torch.randint(1, 4, (8, 1), generator=generator)
    return (start + step * torch.arange(16)) % 96


def test_scores_keep_more_of_a_trained_model_than_chance():
    trained = trained_llama()
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    calibration = [counting(generator) for _ in range(8)]
    losses = {}
    with torch.no_grad():
        test = counting(generator)
        losses["dense"] = shifted_loss(trained, test).item()
        for method in ("random", "gradient", "taylor", "ria"):
            trained.load_state_dict(state)
            prune(
                trained,
                "unstructured",
                method,
                sparsity=0.5,
                calibration=None if method == "random" else calibration,
            )
            losses[method] = shifted_loss(trained, test).item()
    for method in ("gradient", "taylor", "ria"):
        assert losses[method] - losses["dense"] < 0.5 * (losses["random"] - losses["dense"]), losses
    assert losses["taylor"] < losses["gradient"]


@pytest.mark.parametrize("method", ["gradient", "taylor"])
class TestMethods:
    def test_prune_ranks_by_the_loss(self, method):
        model = tiny.llama()
        layers = find_sites(model)
        dense = {layer.name: layer.weight.clone() for layer in layers}
        statistics = collect_gradients(model, layers, CALIBRATION, statistic=METHODS[method].statistic)
        prune(model, "2:4", method, calibration=CALIBRATION)
        for layer in layers:
            scores = (dense[layer.name] * statistics[layer.name].total).abs().reshape(-1, 4)
            kept = (layer.weight != 0).reshape(-1, 4)
            assert (kept.sum(1) == 2).all()
            lowest_kept = scores.masked_fill(~kept, torch.inf).min(1).values
            assert (lowest_kept >= scores.masked_fill(kept, -torch.inf).max(1).values).all()

    def test_reconstruction_takes_the_same_masks(self, method):
        found = []
        for options in ({}, {"reconstruction": True}):
            model = tiny.llama()
            prune(model, "2:4", method, calibration=CALIBRATION, **options)
            found.append(masks(model))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_errors(self, method):
        with pytest.raises(
            ValueError, match=f"sequential: method {method} takes its statistic from the whole"
        ):
            prune(tiny.llama(), "2:4", method, calibration=CALIBRATION, sequential=True)
        with pytest.raises(
            ValueError,
            match=f"method: {method} and .swaps need one statistic .* they need Gradient.* and Gram",
        ):
            find_method(f"{method}+swaps")
        with pytest.raises(ValueError, match="loss: BertModel gives none"):
            prune(tiny.bert(), "2:4", method, calibration=CALIBRATION)
