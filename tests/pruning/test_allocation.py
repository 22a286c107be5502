import pytest
import torch
from helpers import tiny
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import find_sites
from sparseprune.pruning.allocation import AllocationContext, resolve_allocation
from sparseprune.pruning.base import Method
from sparseprune.pruning.methods import METHODS
from sparseprune.pruning.patterns import Pattern, removed
from sparseprune.statistics.gradients import collect_gradients
from sparseprune.statistics.inputs import InputSquares, collect

DATA = CalibrationData([tiny.ids(2, 16, seed) for seed in range(3)])


def context(model=None, method="magnitude", sparsity=0.6, pattern="unstructured", scope=None, data=DATA):
    model = spread(tiny.llama(layers=3)) if model is None else model
    found = METHODS[method] if isinstance(method, str) else method
    scope = scope or found.scope
    return AllocationContext(
        model, find_sites(model), found, Pattern.parse(pattern), sparsity, scope, data
    )  # fmt: skip


def spread(model):
    """Layers of different scales and shapes of their weights, so that no allocation is uniform by accident."""
    generator = torch.Generator().manual_seed(1)
    for index, layer in enumerate(find_sites(model)):
        with torch.no_grad():
            noise = torch.randn(layer.module.weight.shape, generator=generator)
            layer.module.weight.copy_(noise.sign() * noise.abs() ** (1 + index % 4) * 0.05 * (1 + index % 3))
    return model


def removed_weights(it, targets):
    return sum(int((~targets[layer.name].mask(layer.weight.abs())).sum()) for layer in it.layers)


def uniform_weights(it):
    return removed_weights(it, resolve_allocation("uniform", it))


def test_uniform():
    it = context(sparsity=0.3)
    targets = resolve_allocation("uniform", it)
    assert list(targets) == [layer.name for layer in it.layers]
    assert {(str(target.pattern), target.sparsity, target.scope) for target in targets.values()} == {
        ("unstructured", 0.3, "layer")
    }


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.613, 0.8])
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("name", ["global", "std", "owl"])
def test_as_many_weights_as_uniform(name, scope, sparsity):
    it = context(method="wanda", sparsity=sparsity, scope=scope)
    targets = resolve_allocation(name, it)
    assert len({target.sparsity for target in targets.values()}) > 2
    assert all(0 <= target.sparsity < 1 for target in targets.values())
    step = min(layer.out_features for layer in it.layers) if scope == "row" else 1
    assert 0 <= uniform_weights(it) - removed_weights(it, targets) < step


@pytest.mark.parametrize("sparsity", [0.05, 0.4, 0.6])
def test_global_magnitude_is_one_threshold_over_the_model(sparsity):
    it = context(sparsity=sparsity)
    targets = resolve_allocation("global", it)
    everything = torch.cat([layer.weight.abs().flatten() for layer in it.layers])
    count = sum(removed(layer.weight.numel(), sparsity) for layer in it.layers)
    threshold = everything.sort().values[count]
    for layer in it.layers:
        assert torch.equal(targets[layer.name].mask(layer.weight.abs()), layer.weight.abs() >= threshold)


def test_global_with_ties_keeps_the_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.constant_(layer.weight, -1.0)
    targets = resolve_allocation("global", context(model, sparsity=0.25))
    assert [target.sparsity for target in targets.values()] == [0.0, 0.5]


def test_global_wanda_is_blind_to_the_scale_of_a_layer():
    it = context(method="wanda", scope="layer")
    before = resolve_allocation("global", it)
    statistics = collect(it.model, it.layers, DATA)
    with torch.no_grad():
        it.layers[4].module.weight.mul_(8)  # exact, and the statistics below stay those of before
    it.score_statistics = lambda: statistics
    assert resolve_allocation("global", it) == before


def test_global_orders_signed_scores():
    method = Method("signed", lambda weight, statistic: weight, scope="layer")
    it = context(method=method)
    targets = resolve_allocation("global", it)
    everything = torch.cat([layer.weight.flatten() for layer in it.layers])
    threshold = everything.sort().values[sum(removed(layer.weight.numel(), 0.6) for layer in it.layers)]
    for layer in it.layers:
        share = float((layer.weight < threshold).sum()) / layer.weight.numel()
        assert targets[layer.name].sparsity == pytest.approx(share)


def test_std_is_a_rate_times_the_deviation():
    it = context(scope="layer")
    targets = resolve_allocation("std", it)
    rates = []
    for layer in it.layers:
        weight = layer.weight.double()
        mask = targets[layer.name].mask(layer.weight.abs())
        ratio = weight.abs() / weight.std(correction=0)
        rates.append((float(ratio[~mask].max()), float(ratio[mask].min())))
    assert max(low for low, _ in rates) <= min(high for _, high in rates) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_owl_against_the_formula(method):
    it = context(method=method, sparsity=0.7)
    targets = resolve_allocation("owl", it)
    statistics = collect(it.model, it.layers, DATA, statistic=InputSquares)
    shares = []
    for block in range(3):
        scores = []
        for layer in it.layers:
            if f"layers.{block}." in layer.name:
                norm = statistics[layer.name].sum_squares.sqrt() if method == "wanda" else 1
                scores.append((layer.weight.double().abs() * norm).flatten())
        scores = torch.cat(scores)
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
    keep = [0.16 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    mean = sum(keep) / 3  # the three blocks are of one size
    for layer in it.layers:
        block = int(layer.name.split(".")[2])
        rounding = 1 / layer.in_features + 1e-9
        expected = 0.7 - (keep[block] - mean)
        assert abs(targets[layer.name].sparsity - expected) <= rounding, layer.name
    assert max(keep) - min(keep) == pytest.approx(0.16)


def test_scores_of_gradients():
    it = context(method="taylor", sparsity=0.5)
    targets = resolve_allocation("global", it)
    gradients = collect_gradients(it.model, it.layers, DATA, statistic=it.method.statistic)
    scores = {layer.name: it.method.score(layer.weight, gradients[layer.name]) for layer in it.layers}
    threshold = torch.cat([score.flatten() for score in scores.values()]).quantile(0.5)
    for name, score in scores.items():
        assert targets[name].sparsity == pytest.approx(float((score < threshold).float().mean()), abs=0.01)


def test_block_patterns_add_up_in_blocks():
    it = context(spread(tiny.llama(layers=3)), "wanda", 0.5, "16x1", "layer")
    targets = resolve_allocation("owl", it)
    assert len({target.sparsity for target in targets.values()}) > 2
    assert 0 <= uniform_weights(it) - removed_weights(it, targets) < 16


def test_layers_outside_blocks_stand_alone():
    it = context(spread(tiny.lstm_classifier()), method="wanda", sparsity=0.5)
    first, second = resolve_allocation("owl", it).values()
    assert first.sparsity != second.sparsity


def test_a_function_of_ones_own_is_moved_to_the_total():
    it = context(sparsity=0.5)
    targets = resolve_allocation(
        lambda given: {layer.name: 0.9 if "mlp" in layer.name else 0.7 for layer in given.layers}, it
    )
    assert uniform_weights(it) == removed_weights(it, targets)
    by_kind = {name.split(".")[-1]: target.sparsity for name, target in targets.items()}
    assert by_kind["up_proj"] - by_kind["q_proj"] == pytest.approx(0.2, abs=1e-3)


def test_mapping_is_taken_at_its_word():
    it = context(sparsity=0.5)
    targets = resolve_allocation(
        {"*.0.*down_proj": 0.1, "*.down_proj": 0.2, "*.q_proj": "2:4", "*.k_proj": "dense"}, it
    )
    assert targets["model.layers.0.mlp.down_proj"].sparsity == 0.1
    assert targets["model.layers.1.mlp.down_proj"].sparsity == 0.2
    assert str(targets["model.layers.1.self_attn.q_proj"].pattern) == "2:4"
    assert targets["model.layers.1.self_attn.k_proj"].sparsity == 0
    assert targets["model.layers.1.self_attn.v_proj"].sparsity == 0.5


def test_n_m_takes_patterns_only():
    it = context(pattern="2:4", sparsity=0.5)
    targets = resolve_allocation({"*.q_proj": "4:8", "*.mlp.*": "dense", "*.v_proj": 0.0}, it)
    assert str(targets["model.layers.0.self_attn.q_proj"].pattern) == "4:8"
    assert str(targets["model.layers.0.self_attn.o_proj"].pattern) == "2:4"
    kept = targets["model.layers.0.mlp.up_proj"].mask(torch.rand(48, 32))
    assert kept.all()
    assert targets["model.layers.0.self_attn.v_proj"].sparsity == 0
    for allocation, message in [
        ("owl", "allocation: pattern 2:4 removes the same share of every layer, got 'owl'"),
        ({"*.q_proj": 0.3}, r"allocation\['\*.q_proj'\]: pattern 2:4 fixes the sparsity, got 0.3"),
        ({"*.q_proj": "2:5"}, "q_proj: columns must be a multiple of 5"),
        ({"*.q_proj": "4:2"}, r"allocation\['\*.q_proj'\]: pattern: N:M needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_allocation(allocation, it)


def test_errors():
    it = context()
    for allocation, message in [
        ("best", "allocation: must be one of uniform, global, owl, .*got 'best'"),
        (
            {"nothing": 0.5},
            "allocation: 'nothing' matches no layer to prune; names are such as model.layers.0",
        ),
        ({"*": 1.0}, r"allocation\['\*'\]: must be in \[0, 1\), got 1.0"),
        ({"*": float("nan")}, r"must be in \[0, 1\), got nan"),
        ({"*": "unstructured"}, r"allocation\['\*'\]: sparsity: must be given"),
        (lambda given: {}, "must give every layer a sparsity, gave model.layers.0.self_attn.q_proj None"),
        (lambda given: {layer.name: float("nan") for layer in given.layers}, "gave .*q_proj nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_allocation(allocation, it)
    with pytest.raises(ValueError, match="calibration: allocation owl needs some, got None"):
        resolve_allocation("owl", context(data=None))
