import copy
import itertools
import math
import random

import pytest
import torch
from helpers import tiny
from helpers.torchrun import torchrun
from test_allocation import context, removed_weights, uniform_weights
from torch.nn import functional as F

from sparseprune.calibration import CalibrationData
from sparseprune.measure.benchmark import LayerTiming
from sparseprune.models.sites import find_sites
from sparseprune.pruning.allocation import Search, resolve_allocation
from sparseprune.pruning.allocation import search as search_module
from sparseprune.pruning.allocation.candidates import Candidates
from sparseprune.pruning.allocation.curves import (
    Curves,
    cheapest,
    levels_around,
    measure_curves,
    statistics_for,
)
from sparseprune.pruning.allocation.judge import Judge, hold_out
from sparseprune.pruning.base import Method, Target
from sparseprune.weights.choose import smallest_bytes

DATA = CalibrationData([tiny.ids(1, 32, seed) for seed in range(12)])
OTHER = [tiny.ids(8, 32, 1000)]


def uneven(build=tiny.llama, **kwargs):
    """A model with opinions, whose layers matter unequally: block 1 hardly adds to the residual stream."""
    model = build(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        for name, parameter in model.named_parameters():
            if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(0.05)
    return model


def job(method="wanda", sparsity=0.6, data=DATA, model=None, **kwargs):
    return context(uneven(layers=3) if model is None else model, method, sparsity, data=data, **kwargs)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(before, model):
    return all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def pruned(it, targets):
    """A copy of the model pruned by magnitude or Wanda scores under these targets."""
    statistics = statistics_for(it, it.calibration)
    model = copy.deepcopy(it.model)
    for layer in find_sites(model):
        found = it.method.prune(layer.weight.float(), statistics.get(layer.name), targets[layer.name])
        layer.weight.copy_(found.weight)
    return model


def naive_kl(reference, model, batches):
    rows = []
    for ids in batches:
        with torch.no_grad():
            p, q = (F.log_softmax(it(input_ids=ids).logits.double(), -1) for it in (reference, model))
        rows.append((p.exp() * (p - q)).sum(-1).flatten())
    return float(torch.cat(rows).mean())


class TestHoldOut:
    def test_text_to_judge_by_is_apart_from_that_for_statistics(self):
        fit, pieces = hold_out(DATA, "search", 2048)
        held = torch.cat([piece.reshape(-1, 32) for piece in pieces])
        assert len(fit) == 9
        assert len(held) == 3
        assert not any(torch.equal(a, b[0]) for a in held for b in fit)

    def test_pieces_are_short_and_few(self):
        data = CalibrationData([tiny.ids(1, 1000, seed) for seed in range(40)])
        _, pieces = hold_out(data, "search", 2048)
        assert [list(piece.shape) for piece in pieces] == [[2, 512], [2, 512]]

    def test_other_batches_stay_whole(self):
        data = CalibrationData([{"input_ids": tiny.ids(2, 16, seed)} for seed in range(8)])
        fit, pieces = hold_out(data, "search", 2048)
        assert len(fit) == 6
        assert [list(piece["input_ids"].shape) for piece in pieces] == [[2, 16], [2, 16]]

    def test_one_batch_is_too_few(self):
        with pytest.raises(ValueError, match="calibration: allocation search .* at least 2 batches, got 1"):
            hold_out(CalibrationData([tiny.ids()]), "search", 2048)


class TestJudge:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    def test_kl_by_hand(self, build):
        model = uneven(build)
        judge = Judge(model, OTHER)
        assert judge() == 0
        reference = copy.deepcopy(model)
        layer = find_sites(model)[-1]
        layer.weight.mul_(0.3)
        assert judge() == pytest.approx(naive_kl(reference, model, OTHER), rel=1e-3)

    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, lambda: tiny.bert(head=True)])
    def test_blocks_before_the_change_need_not_run(self, build):
        model = uneven(build)
        judge = Judge(model, OTHER)
        name = judge.blocks[1][0]
        for parameter in judge.blocks[1][1].parameters():
            parameter.data.mul_(0.7)
        calls = []
        handle = judge.blocks[0][1].register_forward_pre_hook(lambda module, args: calls.append(1))
        runs = [block.forward for _, block in judge.blocks]
        full = judge()
        short = judge(name)
        handle.remove()
        assert short == pytest.approx(full, rel=1e-6)
        assert full > 1e-4
        assert [block.forward for _, block in judge.blocks] == runs

    def test_padding_does_not_count(self):
        mask = torch.ones(2, 16, dtype=torch.int64)
        mask[1, 8:] = 0
        ids = tiny.ids(2, 16)
        scores = []
        for padding in (0, 5):
            model = uneven()
            judge = Judge(model, [{"input_ids": torch.where(mask > 0, ids, padding), "attention_mask": mask}])
            find_sites(model)[-1].weight.mul_(0.5)
            scores.append(judge())
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)

    def test_hidden_states_by_relative_error(self):
        model = tiny.bert()
        judge = Judge(model, OTHER)
        with torch.no_grad():
            before = model(OTHER[0])[0]
            find_sites(model)[-1].weight.mul_(0.5)
            after = model(OTHER[0])[0]
        assert judge() == pytest.approx(
            float((after - before).square().sum() / before.square().sum()), rel=1e-4
        )

    def test_any_model_with_logits(self):
        model = tiny.lstm_classifier()
        judge = Judge(model, OTHER)
        find_sites(model)[1].weight.mul_(0.1)
        assert judge() > 1e-5


class TestCandidates:
    @pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
    def test_weights_are_the_method_s(self, method):
        it = job(method)
        before = state(it.model)
        statistics = statistics_for(it, DATA)
        with Candidates(it, [0.4, 0.8], statistics) as candidates:
            layer = it.layers[3]
            expected = it.method.prune(
                layer.weight.float(), statistics.get(layer.name), Target(it.pattern, 0.8, it.scope)
            )
            candidates.use({layer.name: 0.8})
            assert torch.equal(layer.weight != 0, expected.weight != 0)
            assert torch.allclose(layer.weight, expected.weight, rtol=2**-8)
            candidates.use({layer.name: 0.4})
            assert float((layer.weight == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
            candidates.use({layer.name: 0.0})
            assert same(before, it.model)
            candidates.use({layer.name: 0.8 for layer in it.layers})
        assert same(before, it.model)

    def test_conv1d_and_errors(self):
        it = job(model=uneven(tiny.gpt2))
        before = state(it.model)
        with pytest.raises(RuntimeError), Candidates(it, [0.5], statistics_for(it, DATA)) as candidates:
            candidates.use({layer.name: 0.5 for layer in it.layers})
            assert all(float((layer.weight == 0).float().mean()) > 0.4 for layer in it.layers)
            raise RuntimeError
        assert same(before, it.model)

    def test_a_method_that_fails_names_the_layer(self):
        def fail(weight, statistic):
            raise ValueError("scores: no")

        it = job(Method("failing", fail))
        with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: scores: no"):
            Candidates(it, [0.5], {}).__enter__()


class TestCurves:
    def test_each_layer_alone(self):
        it = job()
        before = state(it.model)
        with Candidates(it, [0.4, 0.7], statistics_for(it, DATA)) as candidates:
            judge = Judge(it.model, OTHER)
            curves = measure_curves(it, candidates, judge, [0.4, 0.7])
            assert curves.measured == len(it.layers)
            for layer in (it.layers[0], it.layers[-1]):
                for level in (0.4, 0.7):
                    candidates.use({layer.name: level})
                    assert curves.losses[layer.name][level] == pytest.approx(judge(), rel=1e-5)
                candidates.use({layer.name: 0.0})
        assert same(before, it.model)

    def test_between_and_beyond_its_points_the_logarithm_is_linear(self):
        curves = Curves({"a": {0.4: 0.01, 0.6: 0.04, 0.7: 0.16}}, 1)
        for sparsity, loss in [(0.4, 0.01), (0.5, 0.02), (0.65, 0.08), (0.3, 0.005), (0.8, 0.64), (0.0, 0.0)]:
            assert curves.at("a", sparsity) == pytest.approx(loss)

    def test_what_there_was_no_time_for_is_estimated_from_block_and_kind(self, monkeypatch):
        it = job(model=uneven(layers=8))
        blocks = {f"model.layers.{index}": 2.0**index for index in range(8)}
        factors = {
            "q_proj": 1.0,
            "k_proj": 0.5,
            "v_proj": 3.0,
            "o_proj": 4.0,
            "gate_proj": 2.0,
            "up_proj": 5.0,
        }

        def truth(name):
            return 1e-4 * blocks[name.rsplit(".", 2)[0]] * factors.get(name.split(".")[-1], 8.0)

        class Fake:
            def use(self, assignment):
                (self.name,) = assignment

        fake = Fake()
        times = iter([0.0] * 40 + [10.0] * 100)
        monkeypatch.setattr("sparseprune.clock.now", lambda: next(times))
        curves = measure_curves(it, fake, lambda block: truth(fake.name), [0.6], deadline=5.0)
        assert curves.measured == 40
        for layer in it.layers:
            # the truths lie up to a factor of 2000 apart
            assert abs(math.log(curves.at(layer.name, 0.6) / truth(layer.name))) < 0.6


class TestCheapest:
    def test_against_every_combination(self):
        generator = random.Random(0)
        for _ in range(30):
            prices = {
                name: sorted((generator.uniform(0, 9) for _ in range(4)), reverse=True) for name in "abcd"
            }
            costs = {name: sorted(generator.uniform(0, 1) for _ in range(4)) for name in "abcd"}
            least, most = (sum(f(prices[name]) for name in "abcd") for f in (min, max))
            budget = least + generator.random() * (most - least)
            chosen = cheapest(costs, prices, budget)
            spent = sum(prices[name][index] for name, index in chosen.items())
            found = sum(costs[name][index] for name, index in chosen.items())
            best = min(
                sum(costs[name][index] for name, index in zip("abcd", combination, strict=True))
                for combination in itertools.product(range(4), repeat=4)
                if sum(prices[name][index] for name, index in zip("abcd", combination, strict=True)) <= budget
            )
            assert spent <= budget * (1 + 1e-9)
            assert found - best <= max(costs[name][-1] - costs[name][0] for name in "abcd")

    def test_exact_for_convex_costs_of_equal_steps(self):
        costs = {
            name: [weight * k * k for k in range(6)] for name, weight in (("a", 1.0), ("b", 3.0), ("c", 9.0))
        }
        prices = {name: [5.0 - k for k in range(6)] for name in costs}
        for budget in range(16):
            best = min(
                sum(costs[name][index] for name, index in zip("abc", combination, strict=True))
                for combination in itertools.product(range(6), repeat=3)
                if sum(5 - index for index in combination) <= budget
            )
            chosen = cheapest(costs, prices, budget)
            assert sum(costs[name][index] for name, index in chosen.items()) == pytest.approx(best)

    def test_equal_layers_get_equal_shares(self):
        chosen = cheapest(
            {name: [0, 1, 4, 9, 16] for name in "abcd"}, {name: [4, 3, 2, 1, 0] for name in "abcd"}, 8
        )
        assert set(chosen.values()) == {2}

    def test_an_impossible_budget(self):
        with pytest.raises(ValueError, match="budget: the least that can be reached is 2, got 1"):
            cheapest({"a": [0, 1]}, {"a": [4, 2]}, 1)


def test_levels_stay_in_range():
    assert levels_around(0.6) == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    for sparsity in (0.01, 0.1, 1 / 3, 0.95, 0.999):
        levels = levels_around(sparsity)
        assert levels[2] == sparsity
        assert levels == sorted(set(levels))
        assert levels[0] > 0
        assert levels[-1] < 1


class TestAllocations:
    @pytest.mark.parametrize("allocation", ["sensitivity", Search(trials=40)])
    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    def test_beats_uniform_on_text_it_never_saw(self, allocation, method):
        it = job(method)
        before = state(it.model)
        targets = resolve_allocation(allocation, it)
        assert same(before, it.model)
        step = min(layer.out_features for layer in it.layers)
        assert 0 <= uniform_weights(it) - removed_weights(it, targets) < step
        ours, uniform = (
            naive_kl(it.model, pruned(it, found), OTHER)
            for found in (targets, resolve_allocation("uniform", it))
        )
        assert ours < 0.8 * uniform
        idle = [target.sparsity for name, target in targets.items() if "layers.1.mlp" in name]
        busy = [target.sparsity for name, target in targets.items() if "layers.2.mlp" in name]
        assert sum(idle) > sum(busy)

    def test_search_improves_on_what_it_starts_from_and_repeats(self):
        found, searches = [], []
        for _ in range(2):
            search = Search(trials=50)
            it = job()
            found.append(resolve_allocation(search, it))
            searches.append(search)
            assert "search: 50 allocations tried" in it.notes[0]
        assert found[0] == found[1]
        losses = searches[0].losses
        assert losses == searches[1].losses
        assert min(losses) < min(losses[:5])

    def test_bytes(self):
        it = job("magnitude")

        def packed(layer, sparsity):
            return smallest_bytes((layer.out_features, layer.in_features), layer.weight.dtype, sparsity)

        size = sum(packed(layer, 0.55) for layer in it.layers)
        targets = resolve_allocation(Search(trials=20, bytes=int(size)), it)
        taken = sum(packed(layer, targets[layer.name].sparsity) for layer in it.layers)
        assert 0.95 * size < taken <= size

    def test_seconds(self, monkeypatch):
        def fake(linear, formats, batches, seconds):
            size = linear.weight.numel() * 1e-9
            density = float((linear.weight != 0).float().mean())
            # sparse kernels pay from 55 % zeros on
            return [
                LayerTiming(batches[0], size, {str(form): size * (0.2 + 1.8 * density) for form in formats})
            ]

        monkeypatch.setattr(search_module, "time_layer", fake)
        it = job("magnitude")
        dense = sum(layer.weight.numel() for layer in it.layers) * 1e-9

        def seconds(targets):
            return sum(
                layer.weight.numel() * 1e-9 * min(1, 0.2 + 1.8 * (1 - targets[layer.name].sparsity))
                for layer in it.layers
            )

        targets = resolve_allocation(Search(trials=20, seconds=0.9 * dense), it)
        assert seconds(targets) <= 0.9 * dense * 1.05
        slow = {target.sparsity for target in targets.values()}
        assert not any(
            0 < sparsity < 0.5 for sparsity in slow
        )  # never slower than dense and worse than dense
        with pytest.raises(ValueError, match=r"seconds: the layers take at least .* at 80% zeros, got 1e-06"):
            resolve_allocation(Search(seconds=1e-6), it)

    def test_marginals_are_losses_of_one_step_more_of_a_group(self):
        it = job()
        sizes = {layer.name: layer.weight.numel() for layer in it.layers}
        levels = levels_around(0.6)
        groups = search_module._groups(it)
        with Candidates(it, levels, statistics_for(it, DATA)) as candidates:
            judge = Judge(it.model, OTHER)
            trials = search_module._Trials(candidates, judge, [0.0, *levels], {}, 0, False)
            found = trials.marginals(0.6, groups, sizes)
            by_hand = {}
            for key in found:
                candidates.use(dict.fromkeys(sizes, 0.6))
                before = judge()
                members = [name for name, pair in groups.items() if key in pair]
                candidates.use(dict.fromkeys(members, 0.7))
                by_hand[key] = (judge() - before) / sum(sizes[name] for name in members)
        ratios = {key: value / by_hand[key] for key, value in found.items() if 0.05 < value < 20}
        assert len(ratios) > 6
        assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-4)
        idle = groups["model.layers.1.mlp.up_proj"][1]
        others = {groups[f"model.layers.{block}.mlp.up_proj"][1] for block in (0, 2)}
        assert len({idle, *others}) == 3
        assert found[idle] < 0.3 * min(found[key] for key in others)

    def test_nan_predictions(self):
        model = uneven(layers=3)
        with torch.no_grad():
            model.lm_head.weight[0] = math.nan
        with pytest.raises(ValueError, match="model: predictions must not be NaN"):
            resolve_allocation(Search(trials=5), job(model=model))

    def test_processes_agree(self, tmp_path):
        torchrun(
            """
import sys
import torch
import test_search as cases
from sparseprune.pruning.allocation import Search, resolve_allocation

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
it = cases.job()
it.seed = rank  # as clocks differ
search = Search(trials=12)
torch.save((resolve_allocation(search, it), search.losses), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
""",
            tmp_path,
        )
        (first, losses), (second, others) = (
            torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
        )
        assert first == second
        assert losses != others

    def test_any_model(self):
        data = CalibrationData([tiny.ids(4, 12, seed) for seed in range(8)])
        it = job("wanda", 0.5, data, tiny.lstm_classifier())
        targets = resolve_allocation(Search(trials=5), it)
        assert 0 <= uniform_weights(it) - removed_weights(it, targets) < 20

    @pytest.mark.parametrize("minutes", [2 / 60, 1])
    def test_time_is_kept(self, ticks, monkeypatch, minutes):
        judge = Judge.__call__

        def slow(self, *arguments):
            ticks.seconds += 0.1
            return judge(self, *arguments)

        monkeypatch.setattr(Judge, "__call__", slow)
        it = job()
        it.minutes = minutes
        search = Search()
        resolve_allocation(search, it)
        assert len(search.losses) >= 2
        # the marginals and the first start are made in any case
        assert ticks.seconds < max(30 * minutes, 2.5) + 0.5

    def test_errors(self):
        it = job()
        for options, message in [
            ({"minutes": 0}, "minutes: must be above 0, got 0"),
            ({"seconds": math.nan}, "seconds: must be above 0, got nan"),
            ({"bytes": 1, "seconds": 1}, "bytes, seconds: must be given one at a time"),
        ]:
            with pytest.raises(ValueError, match=message):
                Search(**options)
        with pytest.raises(ValueError, match=r"bytes: the layers take at least .* at 80% zeros, got 100 B"):
            resolve_allocation(Search(bytes=100), it)
        with pytest.raises(ValueError, match="calibration: allocation search needs some"):
            resolve_allocation("search", job("magnitude", data=None))
