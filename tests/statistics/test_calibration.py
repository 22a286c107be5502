import pytest
import torch
from helpers import tiny
from torch import nn

from sparseprune.calibration import CalibrationData, token_ids, windows
from sparseprune.models.sites import find_sites
from sparseprune.statistics.inputs import InputSquares, Statistic, collect

TOKENIZER = tiny.WordTokenizer()


class TestTokenIds:
    def test_text_has_no_special_tokens(self):
        ids = token_ids("one two three", TOKENIZER)
        assert ids.dtype == torch.int64
        assert ids.tolist() == TOKENIZER("one two three")["input_ids"][1:]

    @pytest.mark.parametrize(
        "given", [[3, 1, 2], torch.tensor([[3, 1, 2]]), torch.tensor([3, 1, 2], dtype=torch.int32)]
    )
    def test_ids_pass_through(self, given):
        assert token_ids(given).tolist() == [3, 1, 2]

    @pytest.mark.parametrize("text", ["", " \n\t", [], torch.empty(0, dtype=torch.int64)[None]])
    def test_empty(self, text):
        with pytest.raises(ValueError, match=r"text: (must not be empty|.* got 0)"):
            windows(text, TOKENIZER, length=4, count=1)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="tokenizer: must be given"):
            token_ids("a text")
        for ids in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(3, dtype=torch.bool)):
            with pytest.raises(ValueError, match="text: token ids must be integers"):
                token_ids(ids)


class TestWindows:
    def test_drawn_without_overlap_and_in_order(self):
        data = windows(torch.arange(103), length=10, count=4, seed=3)
        starts = [batch[0, 0].item() for batch in data]
        assert len(data) == 4
        assert all(batch.shape == (1, 10) for batch in data)
        assert all(
            batch[0].tolist() == list(range(start, start + 10))
            for batch, start in zip(data, starts, strict=True)
        )
        assert starts == sorted(set(starts))
        assert all(start % 10 == 0 and start <= 90 for start in starts)

    def test_seed_decides(self):
        def drawn(seed):
            return torch.cat(list(windows(torch.arange(1000), length=10, count=5, seed=seed))).tolist()

        assert drawn(1) == drawn(1)
        assert drawn(1) != drawn(2)

    def test_the_whole_text_when_it_just_fits(self):
        data = windows(torch.arange(40), length=10, count=4)
        assert torch.cat(list(data)).flatten().tolist() == list(range(40))
        assert data.source == "4 windows of 10 tokens, seed 0"

    def test_too_short_says_how_many(self):
        with pytest.raises(ValueError, match=r"4 windows of 10 tokens need 40 tokens, got 39; .* count=3"):
            windows(torch.arange(39), length=10, count=4)
        with pytest.raises(ValueError, match=r"need 10 tokens, got 3; .* smaller length"):
            windows("one two three", TOKENIZER, length=10, count=1)

    @pytest.mark.parametrize("argument", ["length", "count"])
    def test_positive(self, argument):
        with pytest.raises(ValueError, match=f"{argument}: must be at least 1, got 0"):
            windows(torch.arange(9), **{argument: 0})


def test_calibration_data_must_hold_something():
    with pytest.raises(ValueError, match="batches: must hold at least one"):
        CalibrationData([])


class TestInputSquares:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_sums_over_updates(self, dtype):
        x = torch.randn(50, 7).to(dtype)
        statistic = InputSquares(7, torch.device("cpu"))
        statistic.update(x[:20])
        statistic.update(x[20:])
        assert statistic.tokens == 50
        assert statistic.sum_squares.dtype == torch.float64
        expected = x.double().square().sum(0)
        torch.testing.assert_close(statistic.sum_squares, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(statistic.norm(), expected.sqrt().float())

    def test_large_finite_inputs_do_not_overflow(self):
        statistic = InputSquares(1, torch.device("cpu"))
        statistic.update(torch.full((4, 1), 1e30))
        torch.testing.assert_close(statistic.norm(), torch.tensor([2e30]))

    def test_small_additions_are_not_lost(self):
        statistic = InputSquares(1, torch.device("cpu"))
        statistic.update(torch.tensor([[2.0**13]]))
        for _ in range(8):
            statistic.update(torch.tensor([[1.0]]))
        assert statistic.sum_squares.item() == 2.0**26 + 8

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        with pytest.raises(FloatingPointError):
            InputSquares(2, torch.device("cpu")).update(torch.tensor([[1.0, bad]]))


def recorded(model, layers, batches):
    """Inputs of each layer [tokens, in], by the plainest of hooks."""
    seen = {layer.name: [] for layer in layers}
    handles = [
        layer.module.register_forward_hook(
            lambda module, args, out, name=layer.name: seen[name].append(
                args[0].reshape(-1, args[0].shape[-1])
            )
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert, tiny.lstm_classifier])
@pytest.mark.parametrize("lm_head", [False, True])
def test_collect_matches_a_plain_recording(build, lm_head):
    model = build()
    layers = find_sites(model, lm_head=lm_head)
    batches = [tiny.ids(seed=0), tiny.ids(batch=1, length=9, seed=1)]
    statistics = collect(model, layers, batches)
    expected = recorded(model, layers, batches)
    assert list(statistics) == [layer.name for layer in layers]
    for name, inputs in expected.items():
        assert statistics[name].tokens == len(inputs)
        torch.testing.assert_close(
            statistics[name].sum_squares, inputs.double().square().sum(0), rtol=1e-4, atol=1e-9
        )


def test_collect_leaves_the_model_as_it_was():
    model = tiny.llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, find_sites(model), [tiny.ids()])
    assert model.training
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).train()
    statistics = collect(model, find_sites(model), [torch.ones(10, 4)])
    assert statistics["1"].sum_squares.tolist() == [10.0] * 4


def test_padding_is_left_out():
    model = tiny.bert()
    layers = find_sites(model, include="*.intermediate.dense")
    ids = tiny.ids(batch=1, length=10)
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(1, 10), torch.zeros(1, 6)], dim=1).long()
    with_padding = collect(model, layers, [{"input_ids": padded, "attention_mask": mask}])
    without = collect(model, layers, [{"input_ids": ids}])
    for layer in layers:
        assert with_padding[layer.name].tokens == 10
        torch.testing.assert_close(
            with_padding[layer.name].sum_squares, without[layer.name].sum_squares, rtol=1e-4, atol=1e-6
        )


def test_batches_as_tuples_and_with_labels():
    model = nn.Bilinear(3, 3, 4)
    chained = nn.Sequential(nn.Linear(4, 2))

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = model, chained

        def forward(self, a, b):
            return self.second(self.first(a, b))

    both = TwoInputs()
    pair = (torch.randn(5, 3), torch.randn(5, 3))
    assert collect(both, find_sites(both), [pair])["second.0"].tokens == 5
    causal = tiny.llama()
    ids = tiny.ids()
    labelled = collect(causal, find_sites(causal), [{"input_ids": ids, "labels": ids}])
    plain = collect(causal, find_sites(causal), [ids])
    name = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(labelled[name].sum_squares, plain[name].sum_squares)


def test_places_that_share_a_weight_add_up_once_each():
    shared = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = shared.weight
    model = nn.Sequential(shared, other, shared)
    (layer,) = find_sites(model)
    x = torch.randn(4, 3)
    with torch.no_grad():
        inputs = [x, shared(x), other(shared(x))]
    expected = sum(part.double().square().sum(0) for part in inputs)
    statistic = collect(model, [layer], [x])["0"]
    assert statistic.tokens == 12
    torch.testing.assert_close(statistic.sum_squares, expected, rtol=1e-6, atol=0)


def test_another_statistic_is_one_small_class():
    class Gram(Statistic):
        def __init__(self, in_features, device):
            super().__init__(in_features, device)
            self.matrix = torch.zeros(in_features, in_features)

        def update(self, inputs):
            self.matrix += inputs.T @ inputs
            self.tokens += len(inputs)

    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(6, 3)
    torch.testing.assert_close(collect(model, find_sites(model), [x], statistic=Gram)["0"].matrix, x.T @ x)


class TestCollectErrors:
    def test_nan_names_the_first_layer_and_removes_the_hooks(self):
        model = tiny.llama().train()
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[0] = float("nan")
        with pytest.raises(
            ValueError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj must be finite"
        ):
            collect(model, find_sites(model), [tiny.ids()])
        assert model.training
        assert model.config.use_cache
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_too_long_before_anything_runs(self):
        model = tiny.llama()
        model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
        for batch in (tiny.ids(1, 65), {"input_ids": tiny.ids(1, 65)}):
            with pytest.raises(ValueError, match="positions end at 64, batch 1 has 65 tokens"):
                collect(model, find_sites(model), [tiny.ids(), batch])

    def test_a_layer_that_never_runs(self):
        model = tiny.lstm_classifier()
        model.unused = nn.Linear(3, 3)
        with pytest.raises(
            ValueError, match="batches: must reach every layer, 1 never ran, the first is unused"
        ):
            collect(model, find_sites(model), [tiny.ids()])

    def test_no_batches(self):
        with pytest.raises(ValueError, match="batches: must hold at least one"):
            collect(tiny.llama(), [], iter(()))
