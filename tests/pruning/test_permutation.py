"""Channel permutation: what N:M keeps, and that folding changes no output."""

import itertools

import pytest
import torch
from helpers import tiny
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import find_sites
from sparseprune.pruning import Pattern, prune
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.methods.permutation import column_order, kept_score, permute_neurons

CALIBRATION = CalibrationData([tiny.ids(seed=0), tiny.ids(seed=1)], "random ids")


def heavy(rows, columns, seed=0):
    """Scores with some columns that matter far more than others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    return scores * torch.exp(torch.randn(columns, generator=generator))


class TestColumnOrder:
    @pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "1:2"])
    @pytest.mark.parametrize("rows", [1, 30])
    def test_is_a_permutation_that_keeps_more(self, pattern, rows):
        pattern = Pattern.parse(pattern)
        scores = heavy(rows, 40 * pattern.m // 4 // pattern.m * pattern.m)
        order = column_order(scores, pattern)
        assert torch.equal(order.sort().values, torch.arange(scores.shape[1]))
        dealt = column_order(scores, pattern, sweeps=0)
        kept = [kept_score(scores[:, it], pattern) for it in (torch.arange(scores.shape[1]), dealt, order)]
        assert kept[0] <= kept[1] <= kept[2]
        assert kept[2] > 1.01 * kept[0]

    def test_refinement_beats_dealing(self):
        scores, pattern = heavy(64, 160), Pattern(2, 4)
        dealt, refined = (
            kept_score(scores[:, column_order(scores, pattern, sweeps)], pattern) for sweeps in (0, 4)
        )
        assert refined > 1.005 * dealt

    def test_against_all_orders(self):
        # 2 groups of 3: 10 ways to split 6 columns
        pattern = Pattern(1, 3)
        reached = 0
        for seed in range(10):
            scores = heavy(5, 6, seed)
            splits = itertools.combinations(range(6), 3)
            kept = [
                kept_score(scores[:, [*split, *(set(range(6)) - set(split))]], pattern) for split in splits
            ]
            found = kept_score(scores[:, column_order(scores, pattern)], pattern)
            assert found <= max(kept) * (1 + 1e-6)
            reached += found >= 0.99 * max(kept)
        assert reached >= 7

    def test_never_worse_than_given(self):
        pattern = Pattern(2, 4)
        best = heavy(8, 32)[:, column_order(heavy(8, 32), pattern, sweeps=50)]
        again = column_order(best, pattern, sweeps=0)
        assert kept_score(best[:, again], pattern) >= kept_score(best, pattern)

    def test_one_group(self):
        assert column_order(heavy(3, 4), Pattern(2, 4)).sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert, tiny.lstm_classifier])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folding_keeps_the_outputs(build, dtype):
    model = build().to(dtype)
    for parameter in model.parameters():  # biases start at zero, and must move too
        parameter.data += 0.02 * torch.randn(parameter.shape).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = first_output(model, tiny.ids())
        changed = []
        method = find_method("ria+permute")
        layers = find_sites(model)
        notes = permute_neurons(model, layers, method, Pattern(2, 4), CALIBRATION, changed.append)
        found = first_output(model, tiny.ids())
    blocks = 1 if build is tiny.lstm_classifier else 2
    assert notes[0].startswith(f"the neurons that {blocks} layers read were reordered: 2:4 keeps ")
    assert len(notes) == 1
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert (found - expected).norm() <= tolerance * expected.norm()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parameters = dict(model.named_parameters())
    assert moved == {name for name in moved if any(parameters[name] is it for it in changed)}
    per_block = {tiny.llama: 3, tiny.gpt2: 3, tiny.bert: 3, tiny.lstm_classifier: 3}[build]
    assert len(moved) == blocks * per_block


def first_output(model, ids):
    output = model(ids)
    return (output if isinstance(output, torch.Tensor) else output[0]).double()


def test_neurons_that_are_not_alike_keep_their_order():
    class Scaled(nn.Module):
        """A scale for each place in between, which does not move with the neurons."""

        def __init__(self):
            super().__init__()
            self.up, self.down, self.plain = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
            self.out = nn.Linear(16, 8)

        def forward(self, x):
            hidden = self.up(x)
            scale = torch.linspace(-5, 5, hidden.shape[-1])
            return self.out(torch.relu(self.plain(self.down(torch.relu(hidden * scale)))))

    torch.manual_seed(0)
    model = Scaled()
    x = torch.randn(6, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        notes = permute_neurons(
            model,
            find_sites(model),
            find_method("wanda+permute"),
            Pattern(2, 4),
            CalibrationData([x]),
            lambda _: None,
        )
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert "the neurons that 1 layers read were reordered" in notes[0]
    assert "1 layers read are not alike, and keep their order" in notes[1]
    after = model.state_dict()
    assert torch.equal(after["up.weight"], before["up.weight"])
    assert torch.equal(after["down.weight"], before["down.weight"])
    assert not torch.equal(after["out.weight"], before["out.weight"])


@pytest.mark.parametrize("method", ["ria", "magnitude", "admm", "wanda+swaps", "taylor"])
def test_prune_keeps_more_of_the_outputs(method):
    errors = {}
    x = tiny.ids(4, 16, seed=5)
    for name in (method, f"{method}+permute"):
        model = tiny.llama(intermediate_size=96)
        with torch.no_grad():
            for block in model.model.layers:
                # neurons of different size, the large ones side by side, and outputs that they decide
                size = torch.exp(torch.linspace(2, -2, 96))
                block.mlp.up_proj.weight *= size[:, None]
                block.mlp.down_proj.weight *= 20
            wanted = model.model(x).last_hidden_state
            calibration = None if method == "magnitude" else CALIBRATION
            report = prune(model, "2:4", name, calibration=calibration, include="*.down_proj")
            errors[name] = (model.model(x).last_hidden_state - wanted).square().mean().item()
        assert report.method == name
        assert report.sparsity_after == 0.5
        assert any("reordered" in note for note in report.notes) == ("permute" in name)
    if method == "magnitude":  # it does not see which neurons are large
        assert errors["magnitude+permute"] != errors["magnitude"]
    else:
        assert errors[f"{method}+permute"] < 0.9 * errors[method]


class TestErrors:
    def test_not_n_of_m(self):
        with pytest.raises(
            ValueError, match="method: .permute rearranges the groups of N:M, got pattern unst"
        ):
            prune(tiny.llama(), "unstructured", "wanda+permute", sparsity=0.5, calibration=CALIBRATION)

    def test_no_neurons(self):
        with pytest.raises(ValueError, match="needs hidden neurons that a pruned layer reads, found none"):
            prune(tiny.llama(), "2:4", "ria+permute", calibration=CALIBRATION, include="*.q_proj")

    def test_an_error_later_restores_the_order(self):
        model = tiny.llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        broken = find_method("ria+permute")
        object.__setattr__(broken, "update", lambda weight, mask, statistic: weight / 0)
        with pytest.raises(ValueError, match="gave NaN or Inf"):
            prune(model, "2:4", broken, calibration=CALIBRATION)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
