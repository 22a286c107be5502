import json

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseprune.calibration import CalibrationData, windows
from sparseprune.models.sites import find_sites
from sparseprune.pruning import METHODS, Method, Pattern, mask_from_scores, prune
from sparseprune.pruning.methods.magnitude import magnitude_scores
from sparseprune.pruning.methods.wanda import wanda_scores
from sparseprune.statistics.inputs import InputSquares


def naive_keep(scores, count):
    """Indices of the `count` largest of a list, the first of equals."""
    return set(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])


def naive_mask(scores, pattern, sparsity, scope):
    rows, columns = scores.shape
    flat = scores.flatten().tolist()
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        length, count = m, n
    else:
        length = columns if scope == "row" else rows * columns
        count = length - round(length * sparsity)
    kept = []
    for start in range(0, rows * columns, length):
        chosen = naive_keep(flat[start : start + length], count)
        kept += [index in chosen for index in range(length)]
    return torch.tensor(kept).reshape(rows, columns)


@st.composite
def score_matrices(draw):
    """Matrices with many ties: a few distinct values, zeros and repeated rows among them."""
    pattern = draw(st.sampled_from(["unstructured", "2:4", "4:8", "1:2", "1:4", "3:5", "20:40"]))
    m = 1 if pattern == "unstructured" else int(pattern.split(":")[1])
    rows = draw(st.integers(1, 6))
    columns = m * draw(st.integers(1, max(1, 80 // m)))
    values = draw(st.sampled_from([[0.0], [0.0, 1.0], [0.5, 0.25, 1.0, 2.0], None]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if values is None:
        scores = torch.rand(rows, columns, generator=generator)
    else:
        scores = torch.tensor(values)[torch.randint(len(values), (rows, columns), generator=generator)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return scores.to(dtype), pattern


class TestMaskFromScores:
    @settings(deadline=None, max_examples=300)
    @given(score_matrices(), st.floats(0, 1, exclude_max=True), st.sampled_from(["row", "layer"]))
    def test_equals_the_naive_reference(self, case, sparsity, scope):
        scores, pattern = case
        given_sparsity = sparsity if pattern == "unstructured" else None
        before = scores.clone()
        mask = mask_from_scores(scores, pattern, given_sparsity, scope=scope)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, naive_mask(scores, pattern, sparsity, scope))
        assert torch.equal(scores, before)

    @pytest.mark.parametrize("shape", [(64, 200), (3, 1001)])
    def test_long_slices_with_ties(self, shape):
        scores = torch.randint(0, 5, shape).float()
        for scope in ("row", "layer"):
            assert torch.equal(
                mask_from_scores(scores, "unstructured", 0.7, scope=scope),
                naive_mask(scores, "unstructured", 0.7, scope),
            )

    @pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
    def test_counts_are_exact(self, sparsity):
        scores = torch.rand(37, 83)
        by_row = mask_from_scores(scores, "unstructured", sparsity, scope="row")
        assert set(by_row.sum(1).tolist()) == {83 - round(83 * sparsity)}
        by_layer = mask_from_scores(scores, "unstructured", sparsity, scope="layer")
        assert by_layer.sum() == 37 * 83 - round(37 * 83 * sparsity)

    def test_transposed_scores(self):
        scores = torch.rand(24, 8)
        for pattern, sparsity in (("2:4", None), ("unstructured", 0.5)):
            expected = mask_from_scores(scores.t().contiguous(), pattern, sparsity, scope="layer")
            assert torch.equal(mask_from_scores(scores.t(), pattern, sparsity, scope="layer"), expected)

    @pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
    @pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.5)])
    @pytest.mark.parametrize("scope", ["row", "layer"])
    def test_empty(self, shape, pattern, sparsity, scope):
        assert mask_from_scores(torch.empty(shape), pattern, sparsity, scope=scope).shape == shape

    def test_errors(self):
        good = torch.rand(2, 6)
        with pytest.raises(
            ValueError, match=r"scores: columns must be a multiple of 4 for 2:4, got 6; .*unstructured"
        ):
            mask_from_scores(good, "2:4")
        for bad in (float("nan"), float("inf"), -float("inf")):
            scores = good.clone()
            scores[1, 3] = bad
            with pytest.raises(ValueError, match="scores: must be finite"):
                mask_from_scores(scores, "unstructured", 0.5)
        for wrong in (torch.rand(6), torch.rand(1, 2, 6), torch.ones(2, 6, dtype=torch.int64)):
            with pytest.raises(ValueError, match="scores: must be floating point"):
                mask_from_scores(wrong, "unstructured", 0.5)
        with pytest.raises(ValueError, match='scope: must be "row" or "layer", got \'model\''):
            mask_from_scores(good, "unstructured", 0.5, scope="model")


class TestPattern:
    @pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "unstructured"])
    def test_round_trip(self, text):
        assert str(Pattern.parse(text)) == text
        assert Pattern.parse(Pattern.parse(text)) == Pattern.parse(text)

    @pytest.mark.parametrize(
        "text", ["", "2", "2:", "a:b", "2:4:8", "-1:4", "2.0:4", " 2:4", "Unstructured", None, 24]
    )
    def test_not_a_pattern(self, text):
        with pytest.raises(ValueError, match='pattern: must be "N:M"'):
            Pattern.parse(text)

    @pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0", "1:0"])
    def test_impossible(self, text):
        with pytest.raises(ValueError, match=f"pattern: N:M needs 1 <= N < M, got {text}"):
            Pattern.parse(text)

    @pytest.mark.parametrize("sparsity", [1.0, 1.2, -0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
    def test_sparsity_range(self, pattern, sparsity):
        with pytest.raises(ValueError, match=r"sparsity: must be in \[0, 1\), got"):
            Pattern.parse(pattern).resolve_sparsity(sparsity)

    def test_sparsity_and_pattern_must_agree(self):
        assert Pattern.parse("2:4").resolve_sparsity(None) == 0.5
        assert Pattern.parse("1:3").resolve_sparsity(0.6666667) == pytest.approx(2 / 3)
        with pytest.raises(ValueError, match=r"sparsity: pattern 2:4 removes 0\.5, got 0\.6; leave it out"):
            Pattern.parse("2:4").resolve_sparsity(0.6)
        with pytest.raises(ValueError, match="sparsity: must be given for the unstructured pattern"):
            Pattern.parse("unstructured").resolve_sparsity(None)


class TestScores:
    def test_magnitude(self):
        assert magnitude_scores(torch.tensor([[-3.0, 2.0, 0.0]])).tolist() == [[3.0, 2.0, 0.0]]

    def test_wanda_against_loops(self):
        weight, inputs = torch.randn(3, 5), torch.randn(7, 5)
        statistic = InputSquares(5, torch.device("cpu"))
        statistic.update(inputs)
        scores = wanda_scores(weight, statistic)
        for i in range(3):
            for j in range(5):
                norm = sum(float(inputs[t, j]) ** 2 for t in range(7)) ** 0.5
                assert scores[i, j].item() == pytest.approx(abs(weight[i, j].item()) * norm, rel=1e-5)


def correlated_inputs(tokens, features):
    """Channels that share a few hidden causes, with scales a thousandfold apart, as in a language model."""
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(tokens, features // 4, generator=generator)
    mixed = causes @ torch.randn(features // 4, features, generator=generator)
    noise = 0.1 * torch.randn(tokens, features, generator=generator)
    return (mixed + noise) * torch.logspace(-1.5, 1.5, features)[
        torch.randperm(features, generator=generator)
    ]


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", None)]
)
def test_wanda_keeps_the_output_better_than_magnitude(pattern, sparsity):
    x = correlated_inputs(400, 64)
    errors = {}
    for method in ("magnitude", "wanda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48))
        with torch.no_grad():
            wanted = model(x[200:])
            calibration = [x[:200]] if method == "wanda" else None
            prune(model, pattern, method, sparsity=sparsity, calibration=calibration)
            errors[method] = (model(x[200:]) - wanted).square().mean().item()
    assert 0 < errors["wanda"] < 0.5 * errors["magnitude"]


CALIBRATION = CalibrationData([tiny.ids(seed=0), tiny.ids(seed=1)], "random ids")
BUILDERS = [tiny.llama, tiny.gpt2, tiny.bert, tiny.lstm_classifier]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_prune_keeps_exactly_the_best(build, method, pattern, sparsity, dtype):
    model = build().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = find_sites(model)
    dense = {layer.name: layer.weight.clone() for layer in layers}
    calibration = CALIBRATION if METHODS[method].statistic is not None else None
    report = prune(model, pattern, method, sparsity=sparsity, calibration=calibration)

    pruned = {f"{layer.name}.weight" for layer in layers}
    for name, value in model.state_dict().items():
        assert name in pruned or torch.equal(value, before[name])
    assert [row.name for row in report.layers] == [layer.name for layer in layers]
    for layer, row in zip(layers, report.layers, strict=True):
        weight, was = layer.weight, dense[layer.name]
        assert row.shape == tuple(weight.shape)
        assert row.zeros_after == (weight == 0).sum()
        assert row.zeros_before == (was == 0).sum()
        kept = weight != 0
        assert torch.equal(weight[kept], was[kept])
        assert not weight[~kept].signbit().any(), "a removed weight is +0.0"
        if pattern == "2:4":
            assert (kept.reshape(-1, 4).sum(1) <= 2).all()
        scope = METHODS[method].scope
        if method == "magnitude":
            mask = naive_mask(was.float().abs(), pattern, sparsity, scope)
            assert torch.equal(weight, torch.where(mask, was, torch.zeros_like(was)))
        elif pattern == "unstructured" and scope == "row":
            columns = weight.shape[1]
            assert ((weight == 0).sum(1) >= round(columns * sparsity)).all()
    target = 0.5 if sparsity is None else sparsity
    assert report.sparsity_after == pytest.approx(target, abs=0.02)


def test_wanda_ranks_by_weight_times_input_norm():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    prune(model, "unstructured", "wanda", sparsity=0.5, calibration=[torch.tensor([[1.0, 1.0, 10.0, 10.0]])])
    assert model[0].weight.tolist() == [[0.0, 0.0, 2.0, 1.0]]


def test_scope_changes_what_is_ranked_together():
    weight = torch.tensor([[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]])

    def pruned(**kwargs):
        model = nn.Sequential(nn.Linear(4, 2))
        with torch.no_grad():
            model[0].weight[:] = weight
        report = prune(model, "unstructured", sparsity=0.5, **kwargs)
        return (model[0].weight != 0).sum(1).tolist(), report.scope

    assert pruned() == ([4, 0], "layer")
    assert pruned(scope="layer") == ([4, 0], "layer")
    assert pruned(scope="row") == ([2, 2], "row")


def test_head_and_tied_embedding_only_when_asked():
    model = tiny.llama(tied=True)
    embedding = model.get_input_embeddings().weight
    was = embedding.detach().clone()
    prune(model)
    assert torch.equal(embedding, was)
    report = prune(model, lm_head=True)
    assert report.layers[-1].name == "lm_head"
    assert (embedding.reshape(-1, 4).count_nonzero(1) <= 2).all()
    assert model.lm_head.weight is embedding


def test_include_exclude():
    model = tiny.llama()
    report = prune(model, include="*.mlp.*", exclude="*.down_proj")
    assert len(report.layers) == 4
    assert model.model.layers[0].self_attn.q_proj.weight.count_nonzero() == 32 * 32


def test_pruning_twice_changes_nothing_more():
    model = tiny.llama()
    prune(model, "2:4")
    once = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune(model, "2:4")
    assert all(torch.equal(once[name], value) for name, value in model.state_dict().items())
    assert all(row.zeros_before == row.zeros_after for row in report.layers)


def test_training_mode_and_gradients_survive():
    model = tiny.llama().train()
    prune(
        model,
        "unstructured",
        "wanda",
        sparsity=0.5,
        calibration=windows(tiny.ids(1, 64)[0], length=16, count=4),
    )
    assert model.training
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_method_of_ones_own():
    least_first = Method("inverse", lambda weight, statistic: -weight.abs(), scope="row")
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert prune(model, "2:4", least_first).method == "inverse"
    assert model[0].weight.tolist() == [[1.0, 2.0, 0.0, 0.0]]


class TestErrorsComeBeforeAnyChange:
    def check(self, model, match, *args, **kwargs):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            prune(model, *args, **kwargs)
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) or value.isnan().any() for name, value in before.items())

    def test_arguments(self):
        model = tiny.llama()
        self.check(model, 'pattern: must be "N:M"', "2/4")
        self.check(
            model,
            "method: must be one of admm, .*, with any of .permute, .swaps, .least-squares .*, got 'magic'",
            method="magic",
        )
        self.check(model, "sparsity: must be given", "unstructured")
        self.check(model, r"sparsity: must be in \[0, 1\)", "unstructured", sparsity=1.0)
        self.check(model, "calibration: method wanda needs some", method="wanda")
        self.check(model, "calibration: method magnitude looks at weights only", calibration=CALIBRATION)
        self.check(model, "batches: must hold at least one", method="wanda", calibration=[])
        self.check(model, "scope: pattern 2:4 ranks", scope="row")
        self.check(model, "scope: must be", "unstructured", sparsity=0.5, scope="model")
        self.check(model, "include: 'nothing' matches no linear layer of this Llama", include="nothing")

    def test_width_that_the_pattern_cannot_divide(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
        self.check(model, r"^2: columns must be a multiple of 4 for 2:4, got 6; exclude the layer", "2:4")
        assert len(prune(model, "2:4", exclude="2").layers) == 2
        assert len(prune(model, "unstructured", sparsity=0.5).layers) == 3

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    def test_weights_not_finite(self, build, bad):
        model = build()
        layer = find_sites(model)[-1]
        layer.weight[1, 2] = bad
        self.check(model, f"^{layer.name}: weights must be finite, got NaN or Inf")

    def test_activations_not_finite(self):
        model = tiny.llama()
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[:] = float("inf")
        self.check(model, r"the inputs of model\.layers\.1\.mlp", method="wanda", calibration=CALIBRATION)

    def test_calibration_longer_than_the_model_reads(self):
        self.check(tiny.gpt2(), "positions end at 64", method="wanda", calibration=[tiny.ids(1, 65)])

    def test_scores_not_finite(self):
        # fails at the last layer, when the masks of the others are known
        broken = Method("broken", lambda weight, statistic: weight / (weight.shape[0] != 4))
        self.check(tiny.lstm_classifier(), "^classifier: scores: must be finite", method=broken)

    def test_eight_bit_floats(self):
        model = nn.Sequential(nn.Linear(4, 4)).to(torch.float8_e4m3fn)
        self.check(model, r"^0: weights must be float32, .* got torch\.float8_e4m3fn")

    def test_meta_weights(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=r"^0: its weights must be loaded"):
            prune(model)


class TestReport:
    def test_table_and_dict(self):
        model = tiny.llama()
        report = prune(model, "unstructured", "wanda", sparsity=0.25, calibration=CALIBRATION)
        text = str(report)
        assert "Pruned by wanda, unstructured 25.0%, ranked per row" in text
        assert "model.layers.1.mlp.down_proj" in text
        assert "calibration: random ids" in text
        assert f"the model has {sum(p.numel() for p in model.parameters()):,} parameters" in text
        data = json.loads(json.dumps(report.to_dict()))
        assert data["zeros"] == sum(row["zeros_after"] for row in data["layers"])
        assert data["weights"] == sum(row["shape"][0] * row["shape"][1] for row in data["layers"])
        assert data["layers"][0]["sparsity_before"] == 0
        assert data["sparsity_after"] == pytest.approx(0.25, abs=0.01)

    def test_groups(self):
        report = prune(tiny.lstm_classifier(), "2:4")
        assert report.scope == "group"
        assert report.table().title == "Pruned by magnitude, 2:4"
        assert report.calibration is None

    def test_weights_stored_with_gaps(self):
        model = nn.Sequential(nn.Linear(8, 4))
        wide = torch.randn(4, 16)
        model[0].weight = nn.Parameter(wide[:, ::2])
        expected = naive_mask(wide[:, ::2].abs(), "2:4", None, "row")
        prune(model)
        assert torch.equal(model[0].weight != 0, expected)
        assert wide[:, 1::2].count_nonzero() == 32

    def test_progress_goes_to_stderr(self, capfd):
        prune(tiny.lstm_classifier(), "2:4", "wanda", calibration=CALIBRATION, progress=True)
        out, err = capfd.readouterr()
        assert out == ""
        assert "calibration" in err
        assert "pruning (wanda)" in err
        prune(tiny.lstm_classifier(), "2:4")
        assert capfd.readouterr() == ("", "")
