"""prune() over whole models: block by block, cutting structures out, in several steps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.sites import find_sites
from sparseprune.pruning import METHODS, Method, Pruned, Reconstruction, prune
from sparseprune.pruning.schedules import Gradual, Greedy
from sparseprune.statistics.inputs import Gram
from tests.helpers import tiny

CALIBRATION = CalibrationData([tiny.ids(seed=0), tiny.ids(seed=1)], "random ids")


class TestBlockByBlock:
    """What happens to the model as a whole where a method reads each block's inputs in turn."""

    def losses(self, **arguments):
        model, dense = tiny.llama(layers=3), tiny.llama(layers=3)
        report = prune(model, calibration=CALIBRATION, **arguments)
        with torch.no_grad():
            difference = model.model(tiny.ids()).last_hidden_state - dense.model(tiny.ids()).last_hidden_state
        return float(difference.square().mean()), report, model

    @pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda+swaps+least-squares"])
    def test_sequential_by_default(self, method):
        loss, report, model = self.losses(method=method)
        wanda, wanda_report, _ = self.losses(method="wanda")
        assert loss < 0.9 * wanda
        assert (report.inputs, wanda_report.inputs) == ("sequential", "dense")
        for row, layer in zip(report.layers, find_sites(model), strict=True):
            assert row.name == layer.name
            assert 0 < row.error < 0.6
            assert row.zeros_after == (layer.weight == 0).sum() == layer.weight.numel() // 2

    def test_inputs_are_those_of_the_blocks_pruned_before(self):
        model = tiny.llama()
        prune(model, "2:4", "sparsegpt", calibration=CALIBRATION)
        half = tiny.llama()
        prune(half, "2:4", "sparsegpt", calibration=CALIBRATION, include="model.layers.0.*")
        prune(half, "2:4", "sparsegpt", calibration=CALIBRATION, include="model.layers.1.*")
        dense = tiny.llama()
        report = prune(dense, "2:4", "sparsegpt", calibration=CALIBRATION, sequential=False)
        assert report.inputs == "dense"
        last = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(model.state_dict()[last], half.state_dict()[last])
        assert not torch.equal(model.state_dict()[last], dense.state_dict()[last])

    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
    def test_reconstruction_brings_the_output_nearer(self, method):
        plain, *_ = self.losses(method=method) if method != "magnitude" else (None, None)
        loss, report, model = self.losses(
            method=method, reconstruction=Reconstruction(20, learning_rate=0.1, batch=1)
        )
        if plain is not None:
            assert loss < 0.95 * plain
        assert len(report.blocks) == 3
        assert all(block.after < 0.97 * block.before for block in report.blocks)
        assert all((layer.weight == 0).sum() == layer.weight.numel() // 2 for layer in find_sites(model))
        assert not any(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_reconstruction_keeps_what_it_cannot_better(self):
        _, report, model = self.losses(
            method="sparsegpt", reconstruction=Reconstruction(1, learning_rate=1e3)
        )
        assert all(block.after == block.before for block in report.blocks)
        assert all(
            layer.weight.abs().max() < 1 for layer in find_sites(model)
        )  # a step would go as far as 1e3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_reconstruction_of_a_half_precision_model_trains_in_float32(self, dtype):
        model = tiny.llama().to(dtype)
        report = prune(
            model,
            "2:4",
            "wanda",
            calibration=CALIBRATION,
            reconstruction=Reconstruction(20, learning_rate=0.1, batch=1),
        )
        assert all(parameter.dtype == dtype for parameter in model.parameters())
        assert all(block.after < 0.97 * block.before for block in report.blocks)

    def test_reconstruction_knows_no_dropout(self):
        models = [tiny.gpt2(), tiny.gpt2().train()]
        for model in models:
            prune(model, "2:4", "wanda", calibration=CALIBRATION, reconstruction=Reconstruction(2))
        assert models[1].training
        assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))

    def test_an_error_in_the_last_block_restores_the_first(self):
        model = tiny.llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}

        def solve(weight, statistic, target):
            if weight.shape == (32, 48) and seen.add(id(statistic)) is None and len(seen) == 2:
                raise ValueError("it cannot be")
            return METHODS["sparsegpt"].prune(weight, statistic, target)

        seen = set()
        method = Method("fragile", solve=solve, statistic=Gram)
        with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: it cannot be"):
            prune(model, "2:4", method, calibration=CALIBRATION, reconstruction=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_what_lies_outside_the_blocks_is_pruned_too(self):
        model = tiny.llama()
        report = prune(model, "2:4", "sparsegpt", calibration=CALIBRATION, lm_head=True)
        assert report.layers[-1].name == "lm_head"
        assert report.sparsity_after == 0.5

    def test_a_model_that_is_no_chain_of_blocks(self):
        report = prune(tiny.lstm_classifier(), "2:4", "admm", calibration=CALIBRATION)
        assert report.inputs == "dense"
        assert "has no repeated blocks" in report.notes[0]
        for arguments in ({"sequential": True}, {"reconstruction": True}):
            with pytest.raises(ValueError, match="has no repeated blocks"):
                prune(tiny.lstm_classifier(), "2:4", "admm", calibration=CALIBRATION, **arguments)

    def test_arguments_that_contradict(self):
        model = tiny.llama()
        with pytest.raises(ValueError, match="sequential: reconstruction trains"):
            prune(model, "2:4", "admm", calibration=CALIBRATION, sequential=False, reconstruction=True)
        with pytest.raises(ValueError, match="calibration: reconstruction needs some"):
            prune(model, "2:4", "magnitude", reconstruction=True)
        with pytest.raises(ValueError, match="sequential: method magnitude looks at weights only"):
            prune(model, "2:4", "magnitude", sequential=True)
        with pytest.raises(ValueError, match="epochs: must be at least 1, got 0"):
            Reconstruction(epochs=0)
        with pytest.raises(ValueError, match="learning_rate: must be above 0, got 0"):
            Reconstruction(learning_rate=0)

    def test_auto_is_the_solver_with_reconstruction(self):
        loss, report, _ = self.losses(method="auto")
        admm, *_ = self.losses(method="admm")
        assert loss < admm
        assert report.method == "admm+permute"
        assert "auto: admm+permute, then each block reconstructed" in report.notes
        assert "auto: admm+permute, then each block reconstructed" in str(report)
        assert {block.epochs for block in report.blocks} == {Reconstruction().epochs}

    def test_auto_makes_do_with_the_time_it_has(self, ticks):
        _, report, _ = self.losses(method="auto", minutes=1e-6)
        assert (report.method, report.blocks) == ("wanda", ())
        assert "no block was reconstructed: not one epoch fits in the time" in report.notes
        _, report, _ = self.losses(method="auto", minutes=5, reconstruction=Reconstruction(2))
        assert report.method == "admm+permute"
        assert {block.epochs for block in report.blocks} == {2}
        assert not any("batches" in note for note in report.notes)
        assert report.seconds < 5 * 60

    def test_auto_without_a_chain_of_blocks(self):
        report = prune(tiny.lstm_classifier(), "2:4", "auto", calibration=CALIBRATION)
        assert (report.method, report.blocks) == ("admm+permute", ())
        assert "is not a chain of blocks" in report.notes[0]

    def test_auto_where_blocks_are_no_chain(self):
        class Parallel(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])

            def forward(self, inputs):
                return self.blocks[0](inputs) + self.blocks[1](inputs + 1)

        data = [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))]
        report = prune(Parallel(), "2:4", "auto", calibration=data)
        assert (report.inputs, report.blocks, report.sparsity_after) == ("dense", (), 0.5)
        assert any("block 1 does not read what block 0 returns" in note for note in report.notes)
        assert "no block was reconstructed" in report.notes
        with pytest.raises(ValueError, match="block 1 does not read"):
            prune(Parallel(), "2:4", "auto", calibration=data, reconstruction=True)

    def test_a_solver_that_needs_no_text(self):
        def halve(weight, statistic, target):
            mask = target.mask(weight.abs())
            return Pruned(torch.where(mask, weight / 2, 0), mask)

        model, dense = tiny.llama(), tiny.llama()
        prune(model, "2:4", Method("halve", solve=halve))
        for layer, was in zip(find_sites(model), find_sites(dense), strict=True):
            kept = layer.weight != 0
            assert torch.equal(layer.weight[kept], was.weight[kept] / 2)


@pytest.mark.parametrize("structure", ["neurons", "heads", "layers"])
def test_structures_are_cut_elsewhere(structure):
    model = tiny.llama()
    with pytest.raises(ValueError, match=f"pattern: .* got '{structure}'; .* are cut out: sparseprune.cut"):
        prune(model, structure, "l1", sparsity=0.25, schedule="nonsense", minutes=-5)


class TestSchedules:
    def test_gradual_recovers_between_its_steps(self):
        model = tiny.llama()
        seen = []

        def recover(model):
            seen.append(sum(int((layer.weight == 0).sum()) for layer in find_sites(model)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)

        report = prune(
            model,
            "unstructured",
            "wanda",
            sparsity=0.6,
            calibration=CALIBRATION,
            schedule=Gradual(3),
            recover=recover,
        )
        total = sum(layer.weight.numel() for layer in find_sites(model))
        assert [it / total for it in seen] == pytest.approx(
            [0.422, 0.578, 0.6], abs=0.015
        )  # whole weights a row
        assert [it.sparsity for it in report.schedule.steps] == [it / total for it in seen]
        assert report.sparsity_after == pytest.approx(0.6, abs=0.01)
        assert all(row.zeros_before == 0 for row in report.layers)
        assert "Pruned gradually in 3 steps" in str(report)
        assert json.dumps(report.to_dict())

    def test_greedy_goes_where_the_loss_grows_least(self):
        model = tiny.llama()
        with torch.no_grad():  # a block that does nothing can lose everything
            model.model.layers[1].self_attn.o_proj.weight.zero_()
            model.model.layers[1].mlp.down_proj.weight.zero_()
        with torch.no_grad():
            dense = model(tiny.ids()).logits

        def loss(model):
            with torch.no_grad():
                return float((model(tiny.ids()).logits - dense).square().mean())

        report = prune(
            model, "unstructured", "magnitude", sparsity=0.3, schedule=Greedy(step=0.2), evaluate=loss
        )
        assert {step.pruned.split()[0] for step in report.schedule.steps[:2]} == {"model.layers.1"}
        assert report.sparsity_after >= 0.3

    def test_greedy_prunes_what_is_included_and_the_head_where_it_is_asked_for(self):
        model = tiny.llama()
        before = {name: it.clone() for name, it in model.state_dict().items()}

        def loss(model):
            with torch.no_grad():
                return float(model(tiny.ids()).logits.square().mean())

        arguments = {"sparsity": 0.3, "schedule": Greedy(step=0.3), "evaluate": loss}
        report = prune(model, "unstructured", **arguments, include=["*.q_proj", "lm_head"], lm_head=True)
        assert {row.name.rpartition(".")[2] for row in report.layers} == {"q_proj", "lm_head"}
        assert report.sparsity_after == pytest.approx(0.3, abs=0.02)
        assert "lm_head" in {step.pruned.split()[0] for step in report.schedule.steps}
        changed = {name for name, it in model.state_dict().items() if not it.equal(before[name])}
        assert changed <= {"lm_head.weight", *(f"{row.name}.weight" for row in report.layers)}

    def test_bad_arguments(self):
        model = tiny.llama()
        with pytest.raises(ValueError, match="minutes: bounds one pruning and a schedule makes many"):
            prune(model, "unstructured", sparsity=0.5, schedule="gradual", minutes=1)
        with pytest.raises(ValueError, match="sparsity: must be above 0 for a schedule"):
            prune(model, "unstructured", sparsity=0, schedule="gradual")
        with pytest.raises(ValueError, match="recover: must be given for recover_trials"):
            prune(
                model,
                "unstructured",
                sparsity=0.5,
                schedule=Greedy(recover_trials=True),
                evaluate=lambda it: 0.0,
            )
        with pytest.raises(
            ValueError, match="schedule: must be one of one-shot, gradual, greedy.*got 'slow'"
        ):
            prune(model, schedule="slow")
        with pytest.raises(ValueError, match="schedule: pattern 2:4 has one sparsity"):
            prune(model, schedule="gradual")
        with pytest.raises(ValueError, match="evaluate: a greedy schedule needs it"):
            prune(model, "unstructured", sparsity=0.5, schedule="greedy")
        with pytest.raises(ValueError, match="recover: belongs to a schedule of several steps"):
            prune(model, recover=print)
