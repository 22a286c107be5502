"""Block patterns; the others are in test_pruning.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseprune.pruning import Pattern, mask_from_scores, prune


def block_reference(scores, height, width, sparsity, scope):
    """Blocks ranked by their sums in Python, the first of equals kept."""
    rows, columns = scores.shape
    strips = []
    for top in range(0, rows, height):
        sums = [scores[top : top + height, left : left + width].sum() for left in range(0, columns, width)]
        strips.append([float(value) for value in sums])
    slices = strips if scope == "row" else [sum(strips, [])]
    kept = []
    for values in slices:
        count = len(values) - round(len(values) * sparsity)
        best = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
        kept += [index in set(best) for index in range(len(values))]
    blocks = torch.tensor(kept).reshape(rows // height, columns // width)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            mask[row, column] = blocks[row // height, column // width]
    return mask


@st.composite
def block_cases(draw):
    height, width = draw(st.sampled_from([(16, 1), (4, 4), (1, 2), (3, 5), (2, 1)]))
    rows, columns = height * draw(st.integers(1, 4)), width * draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # integers: ties, and sums that do not depend on their order
    scores = torch.randint(0, draw(st.sampled_from([2, 5, 1000])), (rows, columns), generator=generator)
    return scores.float(), height, width


@settings(deadline=None, max_examples=200)
@given(block_cases(), st.floats(0, 1, exclude_max=True), st.sampled_from(["row", "layer"]))
def test_equals_the_reference(case, sparsity, scope):
    scores, height, width = case
    mask = mask_from_scores(scores, f"{height}x{width}", sparsity, scope=scope)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, block_reference(scores, height, width, sparsity, scope))


def test_a_block_counts_as_the_sum_of_its_weights():
    scores = torch.tensor([[3.0, 9.0], [3.0, 1.0], [4.0, 1.0], [4.0, 0.0]])
    assert mask_from_scores(scores, "2x1", 0.5).tolist() == [[False, True]] * 2 + [[True, False]] * 2
    assert mask_from_scores(scores, "4x1", 0.5).tolist() == [[True, False]] * 4


@pytest.mark.parametrize("text", ["16x1", "4x4", "1x8", "32x2"])
def test_round_trip(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert pattern.block == tuple(map(int, text.split("x")))
    assert not pattern.structured
    assert Pattern.parse("2:4").block == Pattern.parse("unstructured").block == (1, 1)


@pytest.mark.parametrize("text", ["0x4", "4x0", "0x0", "1x1"])
def test_impossible(text):
    with pytest.raises(
        ValueError, match=f"pattern: a block RxC needs R, C >= 1 .*got {text}|got {text}; such"
    ):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["x4", "4x", "4X4", "4x4x4", "-4x4", "4 x 4", "2:4x1"])
def test_not_a_pattern(text):
    with pytest.raises(ValueError, match='pattern: must be "N:M" such as .*, a block .*, or "unstructured"'):
        Pattern.parse(text)


def test_neither_both():
    with pytest.raises(ValueError, match="pattern: a block RxC"):
        Pattern(2, 4, 4, 1)


def test_sparsity_is_needed():
    with pytest.raises(ValueError, match="sparsity: must be given for the block pattern 16x1; pass 0.5"):
        Pattern.parse("16x1").resolve_sparsity(None)
    assert Pattern.parse("16x1").resolve_sparsity(0.3) == 0.3


def test_shape_that_it_cannot_divide():
    for shape, side, unit in (((8, 6), "columns", 4), ((6, 8), "rows", 4)):
        with pytest.raises(ValueError, match=f"scores: {side} must be a multiple of {unit} for 4x4, got 6"):
            mask_from_scores(torch.rand(shape), "4x4", 0.5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.raises(
        ValueError, match="^1: rows must be a multiple of 4 for 4x1, got 6; exclude the layer"
    ):
        prune(model, "4x1", sparsity=0.5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty(shape):
    assert mask_from_scores(torch.empty(shape), "4x4", 0.5).shape == shape


def test_prune_removes_whole_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    report = prune(model, "16x1", sparsity=0.75)
    for layer in (model[0], model[2]):
        blocks = (layer.weight != 0).reshape(-1, 16, 32).sum(1)
        assert set(blocks.flatten().tolist()) == {0, 16}
        assert (blocks == 0).float().mean() == 0.75
    assert report.sparsity_after == 0.75
