import copy

import pytest
import torch
from helpers import tiny
from helpers.structured import FAMILIES, correlated, gpt_neox, logits, phi3
from torch import nn

import sparseprune as sp
from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import find_sites
from sparseprune.statistics.inputs import Gram, collect
from sparseprune.surgery import remove_neurons
from sparseprune.surgery.compensation import compensated, damped
from sparseprune.surgery.criteria import activation, l1, obs_removed, taylor
from sparseprune.surgery.probe import find_heads, find_neurons, sample_batch


@pytest.fixture(scope="module")
def data():
    return CalibrationData([tiny.ids(2, 24, seed) for seed in range(4)])


class TestProbe:
    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (tiny.llama, ("mlp.down_proj", ["gate_proj", "up_proj"], (1, 1))),
            (tiny.gpt2, ("mlp.c_proj", ["c_fc"], (1,))),
            (tiny.bert, ("output.dense", ["dense"], (1,))),
            (phi3, ("mlp.down_proj", ["gate_up_proj"], (2,))),
            (gpt_neox, ("mlp.dense_4h_to_h", ["dense_h_to_4h"], (1,))),
        ],
    )
    def test_neurons(self, make, expected):
        model = make()
        groups = find_neurons(model, sample_batch(model, None))
        assert len(groups) == 2
        for group in groups:
            assert group.consumer.name.endswith(expected[0])
            assert [layer.name.split(".")[-1] for layer in group.producers] == expected[1]
            assert group.parts == expected[2]

    def test_neurons_of_plain_torch(self):
        model = tiny.lstm_classifier()
        (group,) = find_neurons(model, sample_batch(model, None))
        assert (group.consumer.name, group.producers[0].name) == ("classifier", "hidden")

    @pytest.mark.parametrize(
        "between",
        [nn.LayerNorm(16), nn.BatchNorm1d(16), nn.Softmax(dim=-1), nn.PReLU(16)],
        ids=["normalised", "scaled by channel", "softmax", "sloped by channel"],
    )
    def test_neurons_that_are_not_apart_are_left(self, between):
        model = nn.Sequential(nn.Linear(8, 16), between, nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)).eval()
        groups = find_neurons(model, torch.randn(3, 8))
        assert [group.consumer.name for group in groups] == ["4"]

    def test_neurons_that_others_read_are_left(self):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

            def forward(self, x):
                hidden = self.a(x)
                return self.c(torch.relu(self.b(torch.relu(hidden)) + hidden))

        assert find_neurons(Skip(), torch.randn(3, 8)) == []

    def test_experts(self):
        class Experts(nn.Module):
            """Each token goes to one of four experts."""

            def __init__(self):
                super().__init__()
                self.embedding, self.router = nn.Embedding(96, 16), nn.Linear(16, 4)
                self.experts = nn.ModuleList(
                    nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4)
                )

            def forward(self, ids):
                hidden = self.embedding(ids)
                choice = self.router(hidden).argmax(-1)
                output = hidden.clone()
                for index in choice.unique().tolist():
                    output[choice == index] = self.experts[index](hidden[choice == index])
                return output

        torch.manual_seed(0)
        model = Experts().eval()
        with pytest.raises(ValueError, match="must reach every layer, .* did not run on its first batch"):
            remove_neurons(model, 1 / 3, calibration=[tiny.ids(1, 2)])
        report = remove_neurons(model, 1 / 3, calibration=[tiny.ids(8, 32)])
        assert [cut.name for cut in report.cuts] == [f"experts.{index}.2" for index in range(4)]
        assert all(expert[0].out_features == expert[2].in_features == 16 for expert in model.experts)

    @pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, phi3, gpt_neox])
    def test_heads(self, make):
        model = make()
        groups = find_heads(model, sample_batch(model, None), 4)
        assert len(groups) == 2
        pairs = make in (tiny.llama, phi3)
        assert groups[0].groups == (((0, 1), (2, 3)) if pairs else ((0,), (1,), (2,), (3,)))
        if make is tiny.gpt2:  # query, key and value rows of head 1
            assert groups[0].head_rows[0][1] == (*range(8, 16), *range(40, 48), *range(72, 80))
        if make is gpt_neox:
            assert groups[0].head_rows[0][1] == tuple(range(24, 48))
        if make is phi3:
            assert groups[0].head_rows[0][3] == (*range(24, 32), *range(40, 48), *range(56, 64))


class TestScores:
    def test_against_the_formulas(self):
        torch.manual_seed(0)
        weight, up = torch.randn(5, 8), torch.randn(8, 3)
        inputs = torch.randn(40, 8)
        gram = inputs.t() @ inputs
        pairs = torch.arange(8).reshape(4, 2)
        exact = [float((inputs[:, pair].double() @ weight[:, pair].double().t()).norm()) for pair in pairs]
        torch.testing.assert_close(activation(weight, gram, pairs).tolist(), exact, rtol=1e-5, atol=0)
        single = torch.arange(8).unsqueeze(1)
        exact = [float(inputs[:, j].norm() * weight[:, j].norm()) for j in range(8)]
        torch.testing.assert_close(
            activation(weight, gram.diagonal(), single).tolist(), exact, rtol=1e-5, atol=0
        )
        exact = [float(weight[:, pair].abs().sum() + up[pair].abs().sum()) for pair in pairs]
        torch.testing.assert_close(l1(weight, pairs, [(up, list(pairs))]).tolist(), exact, rtol=1e-5, atol=0)

    def test_taylor_is_activation_times_gradient(self, data):
        model = tiny.llama()
        layer = next(it for it in find_sites(model) if it.name.endswith("0.mlp.down_proj"))
        (found,) = taylor(model, [layer], [torch.arange(48).reshape(24, 2)], data, None)
        assert all(parameter.grad is None for parameter in model.parameters())
        exact = torch.zeros(24)
        for batch in data:
            kept = []
            handle = layer.module.register_forward_pre_hook(
                lambda module, args, kept=kept: kept.append(args[0])
            )
            loss = model(batch, labels=batch).loss
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, kept[0])
            exact += (kept[0] * gradient).reshape(-1, 24, 2).sum(2).abs().sum(0).detach()
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)

    def test_obs_is_the_exact_loss_of_the_best_choice(self):
        # one channel is a sum of two others: activations call it the largest, yet nothing is lost without it
        torch.manual_seed(0)
        inputs = torch.randn(500, 6)
        inputs[:, 5] = inputs[:, 0] + inputs[:, 1]
        weight = torch.ones(4, 6)
        gram = inputs.t() @ inputs
        channels = torch.arange(6).unsqueeze(1)
        assert activation(weight, gram, channels).argmax() == 5
        (gone,) = obs_removed(weight, gram, channels, {0: 1}, torch.zeros(6, dtype=torch.int64))
        assert gone in (0, 1, 5)

    def test_obs_keeps_to_the_quota(self):
        torch.manual_seed(0)
        inputs = torch.randn(100, 12)
        owner = torch.tensor([0, 0, 0, 1, 1, 1])
        gone = obs_removed(
            torch.randn(4, 12), inputs.t() @ inputs, torch.arange(12).reshape(6, 2), {0: 1, 1: 2}, owner
        )
        assert sorted(owner[gone].tolist()) == [0, 1, 1]


class TestCompensation:
    def test_is_least_squares(self):
        torch.manual_seed(0)
        inputs = torch.randn(300, 20) @ torch.randn(20, 20)
        weight, keep = torch.randn(7, 20), torch.arange(0, 20, 2)
        gram = inputs.t() @ inputs
        found = compensated(weight, gram, 300, keep).double()
        kept, target = inputs[:, keep].double(), inputs.double() @ weight.double().t()
        damping, _ = damped(gram[keep][:, keep], 20 / 300)
        root = damping**0.5
        exact = torch.linalg.lstsq(
            torch.cat([kept, root * torch.eye(10, dtype=torch.float64)]),
            torch.cat([target, root * weight[:, keep].t().double()]),
        ).solution.t()
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        plain = (kept @ weight[:, keep].t().double() - target).norm()
        assert (kept @ found.t() - target).norm() < 0.8 * plain

    def test_singular_and_dead(self):
        inputs = torch.randn(5, 12)
        inputs[:, 3] = 0
        found = compensated(torch.randn(4, 12), inputs.t() @ inputs, 5, torch.arange(8))
        assert found.isfinite().all()
        zero = torch.zeros(12, 12)
        weight = torch.randn(4, 12)
        assert torch.equal(compensated(weight, zero, 5, torch.arange(8)), weight[:, :8])
        with pytest.raises(ValueError, match="gram: must be finite"):
            compensated(weight, torch.full((12, 12), float("nan")), 5, torch.arange(8))


class TestNeurons:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("criterion", ["activation", "l1", "obs"])
    def test_neurons_that_add_nothing_go_and_outputs_stay(self, family, criterion, data):
        model = FAMILIES[family]()
        if family == "lstm":  # no neuron that its ReLU makes idle
            nn.init.ones_(model.hidden.bias)
        dead = {}
        for index, group in enumerate(find_neurons(model, sample_batch(model, None))):
            numbers = torch.randperm(group.width, generator=torch.Generator().manual_seed(index))[
                : group.width // 4
            ]
            group.consumer.weight[:, numbers] = 0
            if criterion == "l1":  # it looks at what makes them as well
                for producer in group.producers:
                    producer.weight[numbers] *= 1e-3
            dead[group.consumer.name] = sorted(numbers.tolist())
        expected = logits(model)
        report = remove_neurons(
            model,
            0.25,
            criterion,
            calibration=None if criterion == "l1" else data,
            multiple_of=1,
            compensate=False,
        )
        assert {cut.name: list(cut.removed) for cut in report.cuts} == dead
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("make", [*FAMILIES.values(), phi3, gpt_neox])
    def test_smaller_modules_and_config(self, make, data):
        model = make()
        before = sum(parameter.numel() for parameter in model.parameters())
        group = find_neurons(model, sample_batch(model, None))[0]
        width, shape = group.width, group.consumer.weight.shape
        report = remove_neurons(model, 0.5, calibration=data, multiple_of=2)
        after = sum(parameter.numel() for parameter in model.parameters())
        assert (report.parameters_before, report.parameters_after) == (before, after) and after < before
        assert report.bytes_after == 4 * after
        assert group.consumer.weight.shape == (shape[0], width // 2)
        for part, producer in zip(group.parts, group.producers, strict=True):
            assert producer.out_features == part * width // 2
        assert report.removed_fraction == 0.5 and report.compensated
        module = group.consumer.module
        assert getattr(module, "in_features", None) == width // 2 or module.nx == width // 2
        if hasattr(model, "config"):
            assert report.reloads == "from_pretrained"
            sizes = model.config.to_dict()
            assert sizes.get("intermediate_size", sizes.get("n_inner")) == width // 2

    def test_compensation_lowers_the_error(self, data):
        for family in ("llama", "gpt2", "bert", "lstm"):
            model = correlated(FAMILIES[family]())
            ids = data.batches[0]
            expected, errors = logits(model, ids), {}
            for compensate in (False, True):
                cut = copy.deepcopy(model)
                report = remove_neurons(cut, 0.5, calibration=data, multiple_of=2, compensate=compensate)
                assert report.compensated is compensate
                errors[compensate] = (logits(cut, ids) - expected).norm()
            assert errors[True] < 0.8 * errors[False], family

    @pytest.mark.parametrize("criterion", ["activation", "taylor", "obs", "l1"])
    def test_criteria_beat_random(self, criterion, data):
        model = correlated(tiny.llama())
        expected = logits(model, data.batches[0])

        def error(criterion, seed=0):
            cut = copy.deepcopy(model)
            calibration = None if criterion in ("l1", "random") else data
            remove_neurons(
                cut, 0.25, criterion, calibration=calibration, multiple_of=4, compensate=False, seed=seed
            )
            return float((logits(cut, data.batches[0]) - expected).norm())

        assert error(criterion) < 0.8 * sum(error("random", seed) for seed in range(4)) / 4

    def test_random_is_seeded(self):
        removed = [
            remove_neurons(tiny.llama(), 0.25, "random", seed=seed).cuts[0].removed for seed in (0, 0, 1)
        ]
        assert removed[0] == removed[1] != removed[2]

    def test_obs_beats_activation_where_neurons_are_alike(self, data):
        model = correlated(tiny.llama())
        expected, errors = logits(model, data.batches[0]), {}
        for criterion in ("activation", "obs"):
            cut = copy.deepcopy(model)
            remove_neurons(cut, 0.5, criterion, calibration=data, multiple_of=2)
            errors[criterion] = (logits(cut, data.batches[0]) - expected).norm()
        assert errors["obs"] < errors["activation"]

    def test_sequential_statistics_are_those_of_the_cut_blocks(self, data):
        model = correlated(tiny.llama())
        whole, walked = copy.deepcopy(model), copy.deepcopy(model)
        remove_neurons(whole, 0.5, calibration=data, multiple_of=2, sequential=False)
        report = remove_neurons(walked, 0.5, calibration=data, multiple_of=2, sequential=True)
        first, second = (find_neurons(it, tiny.ids())[0].consumer.weight for it in (whole, walked))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
        # the second block's update is least squares on what the cut first block gives it
        layer = next(it for it in find_sites(model) if it.name == report.cuts[1].name)
        partly = copy.deepcopy(model)
        partly.model.layers[0] = walked.model.layers[0]
        gram = collect(
            partly, [next(it for it in find_sites(partly) if it.name == layer.name)], data, statistic=Gram
        )
        keep = torch.tensor(sorted(set(range(48)) - set(report.cuts[1].removed)))
        exact = compensated(layer.weight, gram[layer.name].matrix, 4 * 48, keep)
        found = next(it for it in find_sites(walked) if it.name == layer.name).weight
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)

    def test_earlier_zeros_are_not_filled(self, data):
        model = tiny.llama()
        sp.prune(model, "2:4")
        assert not remove_neurons(model, 0.5, calibration=data).compensated
        layer = next(it for it in find_sites(model) if it.name.endswith("down_proj"))
        assert layer.weight.count_nonzero() < 0.6 * layer.weight.numel()

    def test_some_layers_only(self, data, tmp_path):
        model = tiny.llama()
        report = remove_neurons(model, 0.5, calibration=data, include="model.layers.1.*")
        assert [cut.name for cut in report.cuts] == ["model.layers.1.mlp.down_proj"]
        assert report.reloads == "sparseprune.load"
        sp.save(model, tmp_path)
        assert torch.equal(logits(sp.load(tmp_path)), logits(model))
        # the others as well, and the config says it all again
        report = remove_neurons(model, 0.5, calibration=data, exclude="model.layers.1.*")
        assert report.reloads == "from_pretrained" and not hasattr(model.config, "sparseprune_sizes")

    def test_half_precision(self, data):
        model = tiny.llama().to(torch.bfloat16)
        report = remove_neurons(model, 0.25, calibration=data)
        assert report.compensated and logits(model).isfinite().all()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
