"""The walk over blocks sees exactly what a pass of the whole model sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.blocks import find_blocks
from sparseprune.models.sites import find_sites
from sparseprune.statistics.inputs import Gram, InputSquares, collect
from sparseprune.statistics.walk import WalkError, advance, block_statistics, capture
from tests.helpers import tiny

FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}


def batches(mask: bool = False):
    ids = [tiny.ids(seed=seed) for seed in range(3)]
    if not mask:
        return ids
    padding = torch.ones(2, 16, dtype=torch.int64)
    padding[1, 10:] = 0
    return [{"input_ids": it, "attention_mask": padding} for it in ids]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_block_by_block_are_those_of_whole_passes(family, mask):
    model = FAMILIES[family]()
    blocks = find_blocks(model)
    modules = [block for _, block in blocks]
    layers = [it for it in find_sites(model) if it.name.startswith(tuple(f"{name}." for name, _ in blocks))]
    whole = collect(model, layers, batches(mask), statistic=Gram)
    walk = capture(model, modules, batches(mask))
    for index, (name, block) in enumerate(blocks):
        inside = [it for it in layers if it.name.startswith(f"{name}.")]
        found = block_statistics(block, inside, walk, index, Gram)
        assert set(found) == {it.name for it in inside}
        for layer in inside:
            torch.testing.assert_close(found[layer.name].matrix, whole[layer.name].matrix)
            assert found[layer.name].tokens == (78 if mask else 96)
        advance(block, walk, index)
    states = (
        model(**batches(True)[0], output_hidden_states=True)
        if mask
        else model(batches()[0], output_hidden_states=True)
    )
    if family == "bert":  # nothing comes after its last block
        torch.testing.assert_close(walk.hidden[0], states.hidden_states[-1])


def test_capture_runs_no_block_but_the_first_and_leaves_the_model_as_it_was():
    model = tiny.llama(layers=3)
    before = model(tiny.ids()).logits
    for layer in find_sites(model, include="model.layers.[12].*"):
        layer.weight.fill_(torch.nan)
    walk = capture(model, [block for _, block in find_blocks(model)], batches())
    assert len(walk.calls) == 3 and all(len(calls) == 3 for calls in walk.calls)
    assert all(state.isfinite().all() for state in walk.hidden)
    assert "forward" not in vars(model.model.layers[0])
    model = tiny.llama(layers=3)
    capture(model, [block for _, block in find_blocks(model)], batches())
    assert torch.equal(model(tiny.ids()).logits, before)


def test_equal_masks_and_positions_are_kept_once():
    model = tiny.llama(layers=3)
    walk = capture(model, [block for _, block in find_blocks(model)], batches())
    places = {call.kwargs["position_embeddings"][0].data_ptr() for calls in walk.calls for call in calls}
    assert len(places) == 1


def test_layers_that_read_the_same_tensor_share_a_statistic():
    model = tiny.llama()
    found = collect(model, find_sites(model), batches(), statistic=InputSquares)
    block = "model.layers.0."
    q, k, v, o = (found[f"{block}self_attn.{name}_proj"] for name in "qkvo")
    gate, up, down = (found[f"{block}mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert q is k is v and gate is up
    assert len({id(it) for it in (q, o, gate, down)}) == 4


class Unlike(nn.Module):
    """Two layers that read the same tensor in the first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.passes = 0

    def forward(self, inputs):
        self.passes += 1
        return self.a(inputs) + self.b(inputs if self.passes == 1 else 2 * inputs)


def test_layers_that_share_only_at_first_are_counted_apart():
    model = Unlike()
    data = [torch.ones(1, 4), torch.ones(1, 4)]
    found = collect(model, find_sites(model), CalibrationData(data), statistic=InputSquares)
    assert found["a"].sum_squares.tolist() == [2.0] * 4
    # the first attempt was the pass in which they were alike; the second one is the count
    assert found["b"].sum_squares.tolist() == [8.0] * 4


class Skipping(nn.Module):
    """Its second block reads what the first one read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])

    def forward(self, inputs):
        return self.blocks[0](inputs) + self.blocks[1](inputs + 1)


def test_a_model_that_is_no_chain_is_refused():
    model = Skipping()
    with pytest.raises(WalkError, match="block 1 does not read what block 0 returns"):
        capture(model, list(model.blocks), [torch.ones(1, 4)])
    assert "forward" not in vars(model.blocks[0])
    with pytest.raises(WalkError, match="no repeated blocks"):
        capture(tiny.lstm_classifier(), [], [tiny.ids()])
