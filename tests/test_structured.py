import copy

import pytest
import torch
from helpers import tiny
from torch import nn

import sparseprune as sp
from sparseprune.calibration import CalibrationData, Gram, collect
from sparseprune.models import find_blocks, find_linears
from sparseprune.pruning.structured import (
    apply_sizes,
    prune_structured,
    remove_heads,
    remove_layers,
    remove_neurons,
)
from sparseprune.pruning.structured.compensation import compensated, damped
from sparseprune.pruning.structured.criteria import activation, l1, obs_removed, taylor
from sparseprune.pruning.structured.probe import find_heads, find_neurons, sample_batch


@pytest.fixture(scope="module")
def data():
    return CalibrationData([tiny.ids(2, 24, seed) for seed in range(4)])


def logits(model, ids=None):
    with torch.no_grad():
        output = model(tiny.ids(2, 12, 99) if ids is None else ids)
    return next(
        value
        for value in (getattr(output, "logits", None), getattr(output, "last_hidden_state", None), output)
        if isinstance(value, torch.Tensor)
    )


def correlated(model, seed=1):
    """Gives the hidden neurons very different sizes, and makes half of them near copies of others."""
    generator = torch.Generator().manual_seed(seed)
    for group in find_neurons(model, sample_batch(model, None)):
        half = group.width // 2
        for layer in group.producers:
            weight = layer.weight
            weight[half : 2 * half] = (
                weight[:half] + 0.05 * torch.randn(half, weight.shape[1], generator=generator) * weight.std()
            )
        group.consumer.weight.mul_(torch.exp(torch.randn(group.width, generator=generator)))
    return model


FAMILIES = {
    "llama": tiny.llama,
    "llama tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "bert mlm": lambda: tiny.bert(head=True),
    "lstm": tiny.lstm_classifier,
}
TRANSFORMERS = [name for name in FAMILIES if name != "lstm"]


def phi3():
    """Fused query, key and value; fused gate and up."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config).eval()


def gpt_neox():
    """Fused query, key and value, interleaved by head; attention and feed-forward side by side."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return GPTNeoXForCausalLM(config).eval()


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
        layer = next(it for it in find_linears(model) if it.name.endswith("0.mlp.down_proj"))
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
            model, 0.25, criterion, None if criterion == "l1" else data, multiple_of=1, compensate=False
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
            remove_neurons(cut, 0.25, criterion, calibration, multiple_of=4, compensate=False, seed=seed)
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
            remove_neurons(cut, 0.5, criterion, data, multiple_of=2)
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
        layer = next(it for it in find_linears(model) if it.name == report.cuts[1].name)
        partly = copy.deepcopy(model)
        partly.model.layers[0] = walked.model.layers[0]
        gram = collect(partly, [next(it for it in find_linears(partly) if it.name == layer.name)], data, Gram)
        keep = torch.tensor(sorted(set(range(48)) - set(report.cuts[1].removed)))
        exact = compensated(layer.weight, gram[layer.name].matrix, 4 * 48, keep)
        found = next(it for it in find_linears(walked) if it.name == layer.name).weight
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)

    def test_earlier_zeros_are_not_filled(self, data):
        model = tiny.llama()
        sp.prune(model, "2:4")
        assert not remove_neurons(model, 0.5, calibration=data).compensated
        layer = next(it for it in find_linears(model) if it.name.endswith("down_proj"))
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


class TestHeads:
    @pytest.mark.parametrize("make", [*(FAMILIES[name] for name in TRANSFORMERS), phi3, gpt_neox])
    @pytest.mark.parametrize("criterion", ["activation", "l1", "obs", "taylor"])
    def test_heads_that_add_nothing_go_and_outputs_stay(self, make, criterion, data):
        model = make()
        if criterion == "taylor" and make in (FAMILIES["bert"], FAMILIES["bert mlm"]):
            with pytest.raises(ValueError, match="loss: must be given for a Bert"):
                remove_heads(model, 0.5, criterion, data)
            return
        dead = {}
        for index, group in enumerate(find_heads(model, sample_batch(model, None), 4)):
            heads = group.groups[index] if len(group.groups) == 2 else (index, 3)
            group.consumer.weight[:, group.channels(heads)] = 0
            if criterion == "l1":
                for number, producer in enumerate(group.producers):
                    producer.weight[group.rows(number, heads)] *= 1e-3
            dead[group.consumer.name] = tuple(heads)
        expected = logits(model)
        report = remove_heads(model, 0.5, criterion, None if criterion == "l1" else data, compensate=False)
        assert {cut.name: cut.removed for cut in report.cuts} == dead
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("make", [tiny.llama, phi3])
    def test_query_heads_of_every_group(self, make, data):
        model = make()
        for group in find_heads(model, sample_batch(model, None), 4):
            group.consumer.weight[:, group.channels((1, 2))] = 0
        expected = logits(model)
        report = remove_heads(model, 0.5, calibration=data, unit="query", compensate=False)
        assert {cut.removed for cut in report.cuts} == {(1, 2)}
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    def test_groups_go_with_their_key_and_value(self, data):
        model = tiny.llama()
        remove_heads(model, 0.5, calibration=data)
        attention = model.model.layers[1].self_attn
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
        assert attention.q_proj.weight.shape == (16, 32) and attention.k_proj.weight.shape == (8, 32)
        assert attention.num_key_value_groups == 2 and model.config.head_dim == 8

    def test_only_numbers_that_the_config_can_say(self):
        # 48 wide, 6 heads: 5 and 7 do not divide it, transformers would refuse the config
        model = tiny.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=6)
        report = remove_heads(model, 0.2, "l1")
        assert model.config.num_attention_heads == 4 and report.removed_fraction == pytest.approx(1 / 3)

    def test_compensation_lowers_the_error(self, data):
        for family in ("llama", "gpt2", "bert"):
            model = FAMILIES[family]()
            ids = data.batches[0]
            for group in find_heads(model, tiny.ids(), 4):  # random attention is small beside the residual
                group.consumer.weight.mul_(20)
            expected, errors = logits(model, ids), {}
            for compensate in (False, True):
                cut = copy.deepcopy(model)
                remove_heads(cut, 0.5, calibration=data, compensate=compensate)
                errors[compensate] = (logits(cut, ids) - expected).norm()
            assert errors[True] < errors[False], family

    def test_a_second_time(self, data, tmp_path):
        model = tiny.gpt2()
        remove_heads(model, 0.25, "l1")
        remove_heads(model, 0.3, "l1")
        remove_neurons(model, 0.25, calibration=data)
        remove_layers(model, 1, "l1")
        assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 3 * 16)
        assert model.transformer.h[0].attn.split_size == 16
        sp.save(model, tmp_path)
        assert torch.equal(logits(sp.load(tmp_path)), logits(model))


class TestLayers:
    @pytest.mark.parametrize("criterion", ["influence", "activation", "taylor"])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
    def test_a_layer_that_does_nothing_goes_first(self, family, criterion, data):
        model = tiny.llama(layers=4) if family == "llama" else FAMILIES[family]()
        blocks = find_blocks(model)
        idle = len(blocks) - 2
        if family != "bert":
            for name, module in blocks[idle][1].named_modules():
                if name.split(".")[-1] in ("o_proj", "down_proj", "c_proj"):
                    nn.init.zeros_(module.weight)
        expected = logits(model)
        if family == "bert":  # normalised after each block, so that none does nothing
            if criterion == "taylor":
                with pytest.raises(ValueError, match="loss: must be given for a BertModel"):
                    remove_layers(model, 1, criterion, data)
                return
            remove_layers(model, 1, criterion, data)
        else:
            report = remove_layers(model, 1, criterion, data)
            assert report.cuts[0].removed == (idle,)
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert len(find_blocks(model)) == len(blocks) - 1 == model.config.num_hidden_layers

    @torch.no_grad()
    def test_influence_is_one_minus_the_cosine(self, data):
        model = tiny.llama(layers=5)
        states = [model(batch, output_hidden_states=True).hidden_states for batch in data]
        # the last hidden state is behind the final norm: the last layer's output is taken before it
        last = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        for batch in data:
            model(batch)
        handle.remove()
        exact = []
        for index in range(5):
            cosines = [
                nn.functional.cosine_similarity(it[index], it[index + 1] if index < 4 else end, dim=-1)
                for it, end in zip(states, last, strict=True)
            ]
            exact.append(1 - float(torch.cat(cosines).mean()))
        report = remove_layers(model, 2, "influence", data)
        assert report.cuts[0].removed == tuple(sorted(sorted(range(5), key=lambda index: exact[index])[:2]))

    @torch.no_grad()
    def test_loss_takes_the_least_harmful_at_each_step(self, data):
        model = tiny.llama(layers=4)
        for block in model.model.layers:  # large enough that layers matter
            block.mlp.down_proj.weight.data.mul_(20)
        chosen = []
        for _ in range(2):
            losses = {}
            for index in set(range(4)) - set(chosen):
                cut = copy.deepcopy(model)
                kept = [it for number, it in enumerate(cut.model.layers) if number not in (*chosen, index)]
                cut.model.layers = nn.ModuleList(kept)
                cut.config.num_hidden_layers = len(kept)
                losses[index] = sum(float(cut(batch, labels=batch, use_cache=False).loss) for batch in data)
            chosen.append(min(losses, key=losses.get))
        report = remove_layers(model, 2, "loss", data)
        assert report.cuts[0].removed == tuple(sorted(chosen))

    def test_numbers_for_the_cache(self):
        model = tiny.llama(layers=4, layer_types=None)
        remove_layers(model, 2, "random", include=["model.layers.0", "model.layers.2"])
        assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]

    def test_lists_by_layer_follow(self, data):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        config = Qwen2Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=kinds,
        )
        model = Qwen2ForCausalLM(config).eval()
        remove_layers(model, 1, "l1", include="model.layers.0")
        assert model.config.layer_types == kinds[1:]
        assert [block.self_attn.sliding_window for block in model.model.layers] == [4, None, 4]

    def test_a_layer_that_depends_on_its_number_stays(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=96,
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            scale_attn_by_inverse_layer_idx=True,
        )
        model = GPT2LMHeadModel(config).eval()
        expected = logits(model)
        with pytest.raises(ValueError, match="must not depend on its number, scaling of"):
            remove_layers(model, 1, "l1", include="transformer.h.0")
        assert torch.equal(logits(model), expected) and model.config.n_layer == 3

    def test_plain_stack(self):
        block = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)]
        model = nn.Sequential(nn.Embedding(96, 8), nn.Sequential(*block), nn.Linear(8, 4))
        nn.init.zeros_(block[1][2].weight)
        report = remove_layers(model, 1, "l1")
        assert report.cuts[0].removed == (1,) and model[1][1] is block[2]


class TestReload:
    @pytest.mark.parametrize("make", [*(FAMILIES[name] for name in TRANSFORMERS), phi3])
    @pytest.mark.parametrize("structure", ["neurons", "heads", "layers"])
    def test_round_trip(self, make, structure, data, tmp_path):
        model = make()
        report = prune_structured(
            model, structure, 0.5, "influence" if structure == "layers" else "activation", data
        )
        expected = logits(model)
        sp.save(model, tmp_path / "ours")
        loaded = sp.load(tmp_path / "ours")
        assert torch.equal(logits(loaded), expected)
        by_config = structure != "heads" or make in (tiny.llama, FAMILIES["llama tied"], phi3)
        assert report.reloads == ("from_pretrained" if by_config else "sparseprune.load")
        if by_config:
            model.save_pretrained(tmp_path / "theirs")
            theirs = type(model).from_pretrained(tmp_path / "theirs").eval()
            torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-6)
        if model.can_generate():
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            written = model.generate(tiny.ids(), **options)
            assert torch.equal(written, loaded.generate(tiny.ids(), **options))
            # through the cache the same as without it
            assert torch.equal(written, model.generate(tiny.ids(), use_cache=False, **options))

    def test_plain_torch(self, data, tmp_path):
        model = tiny.lstm_classifier()
        report = remove_neurons(model, 0.25, calibration=data)
        sp.save(model, tmp_path)
        fresh = tiny.LstmClassifier()
        with pytest.raises(ValueError, match="shape must be"):
            sp.load(tmp_path, fresh)
        apply_sizes(fresh, report.sizes)
        assert torch.equal(logits(sp.load(tmp_path, fresh)), logits(model))

    def test_then_sparse(self, data, tmp_path):
        model = tiny.gpt2()
        remove_heads(model, 0.25, calibration=data)
        sp.prune(model, "2:4")
        sp.sparsify(model, policy="always")
        sp.save(model, tmp_path)
        torch.testing.assert_close(logits(sp.load(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "sizes",
        [
            [],
            {"linears": {}},
            {"linears": {"nowhere": [1, 2]}, "attributes": {}},
            {"linears": {"hidden": [0, 4]}, "attributes": {}},
        ],
    )
    def test_damaged_sizes(self, sizes):
        with pytest.raises(ValueError, match="sizes: must be those of a LstmClassifier"):
            apply_sizes(tiny.lstm_classifier(), sizes)


class TestReport:
    def test_table_and_dict(self, data):
        import json

        report = remove_neurons(tiny.llama(), 1 / 3, calibration=data)
        text = str(report)
        assert (
            "33.3%" in text
            and "reloads with from_pretrained" in text
            and "model.layers.0.mlp.down_proj" in text
        )
        found = json.loads(json.dumps(report.to_dict()))
        assert found["removed_fraction"] == pytest.approx(1 / 3)
        assert (
            found["cuts"][0]["before"] - found["cuts"][0]["after"] == len(found["cuts"][0]["removed"]) == 16
        )


class TestErrors:
    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), None, True])
    def test_fraction(self, fraction):
        for remove in (remove_neurons, remove_heads):
            with pytest.raises(ValueError, match=r"fraction: must be in \(0, 1\), got"):
                remove(tiny.llama(), fraction, "l1")

    @pytest.mark.parametrize("sparsity", [None, 0, 1.0])
    def test_sparsity(self, sparsity):
        with pytest.raises(ValueError, match=r"sparsity: must be in \(0, 1\) for neurons, got"):
            prune_structured(tiny.llama(), "neurons", sparsity)

    @pytest.mark.parametrize("count", [0, 4, 1.0, True, "1", -1])
    def test_count(self, count):
        with pytest.raises(ValueError, match="count: |fraction: "):
            remove_layers(tiny.llama(layers=4), count, "l1")

    def test_messages(self, data):
        model = tiny.llama()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        cases = [
            (
                lambda: remove_neurons(model, 0.5, "magnitude"),
                "criterion: must be one of activation, l1, obs",
            ),
            (lambda: remove_layers(model, 1, "obs"), "criterion: must be one of influence"),
            (lambda: remove_neurons(model, 0.5), "calibration: criterion activation needs some, got None"),
            (lambda: remove_neurons(model, 0.5, "l1", compensate=True), "calibration: compensate needs some"),
            (lambda: remove_neurons(model, 0.01, "l1"), "a multiple of 8 below 48 must stay"),
            (lambda: remove_neurons(model, 0.5, "l1", multiple_of=0), "multiple_of: must be at least 1"),
            (lambda: remove_neurons(model, 0.5, "l1", include="nothing"), "has no hidden neurons to remove"),
            (lambda: remove_heads(model, 0.1, "l1"), "fraction: of 4 heads in 2 groups none can go at 0.1"),
            (lambda: remove_heads(model, 0.5, "l1", unit="key"), 'unit: must be "group" or "query"'),
            (
                lambda: remove_layers(model, 1, "l1", include="nothing"),
                "count: of 2 layers, 0 of which may go",
            ),
            (lambda: prune_structured(model, "channels", 0.5), "pattern: structured ones are neurons"),
            (
                lambda: remove_heads(tiny.lstm_classifier(), 0.5, "l1"),
                "its config must give num_attention_heads",
            ),
            (lambda: remove_layers(tiny.lstm_classifier(), 1, "l1"), "must have one stack of blocks"),
            (lambda: remove_neurons(nn.Sequential(nn.Linear(8, 8)), 0.5, "l1"), "has no hidden neurons"),
            (
                lambda: remove_layers(model, 1, calibration=[tiny.ids(1, 65)]),
                "the model's positions end at 64",
            ),
            (lambda: remove_heads(model, 0.5, calibration=[]), "batches: must hold at least one"),
            (lambda: remove_neurons(nn.Conv2d(3, 3, 3), 0.5, "l1"), "calibration: must be given to see"),
        ]
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.config.to_dict() == config

    def test_bad_weights(self, data):
        model = tiny.llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        for remove in (remove_neurons, remove_layers):
            with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*: weights must be finite"):
                remove(model, 0.5, "l1")

    def test_an_error_in_the_middle_leaves_the_model(self, data):
        model = tiny.llama(layers=3)
        # the second block overflows, after the first has been cut
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
            remove_neurons(model, 0.5, calibration=data)
        assert model.config.to_dict() == config
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_a_model_whose_config_says_something_else(self):
        model = tiny.llama()
        model.config.intermediate_size = 40
        with pytest.raises(ValueError, match="must have the shapes that its config says"):
            remove_neurons(model, 0.5, "l1")
