"""A statistic that the library has never seen goes wherever its own go: it says itself how it is collected."""

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import save, weights

from sparseprune.calibration import CalibrationData
from sparseprune.io.checkpoint import load
from sparseprune.models.sites import find_sites
from sparseprune.pruning import prune
from sparseprune.pruning.base import Method
from sparseprune.statistics.inputs import Gram, InputSquares, Statistic
from sparseprune.streaming import prune_folder

DATA = CalibrationData([tiny.ids(2, 16, seed) for seed in range(3)])


class FromTheEnd(Statistic):
    """What takes the whole model: how far a layer is from the last one."""

    whole_model = True
    comparable = True

    def update(self, inputs):
        raise AssertionError("collected by collect alone")

    @classmethod
    def collect(cls, model, layers, batches, *, loss=None, progress=False):
        found = {layer.name: cls.of(layer) for layer in layers}
        for distance, layer in enumerate(reversed(layers)):
            found[layer.name].distance = distance
        return found


class Largest(Statistic):
    """The largest input of each channel."""

    def __init__(self, in_features, device):
        super().__init__(in_features, device)
        self.largest = torch.zeros(in_features, device=device)

    def update(self, inputs):
        self.largest = torch.maximum(self.largest, inputs.float().abs().amax(dim=0))
        self.tokens += len(inputs)

    def error(self, weight, pruned):
        return 0.25


def by_distance(weight, statistic):
    return weight.abs() + 1000 * statistic.distance


def by_largest(weight, statistic):
    return weight.abs() * statistic.largest


FROM_THE_END = Method("from the end", by_distance, statistic=FromTheEnd)
LARGEST = Method("largest", by_largest, statistic=Largest)


@pytest.mark.parametrize("reconstruction", [False, True])
def test_one_of_the_whole_model(reconstruction):
    model = tiny.llama(layers=2)
    report = prune(
        model, "unstructured", FROM_THE_END, sparsity=0.3, calibration=DATA, allocation="global",
        reconstruction=reconstruction,
    )  # fmt: skip
    sparsities = [layer.sparsity_after for layer in report.layers]
    assert sparsities[0] < 0.05 and sparsities[-1] > 0.9  # compared across layers as it is
    assert report.inputs == ("sequential" if reconstruction else "dense")


def test_one_of_the_whole_model_is_not_taken_block_by_block(tmp_path):
    with pytest.raises(
        ValueError, match="sequential: method from the end takes its statistic from the whole"
    ):
        prune(tiny.llama(), "2:4", FROM_THE_END, calibration=DATA, sequential=True)
    save(tiny.llama(), tmp_path / "in")
    with pytest.raises(
        ValueError, match="method: must do without the whole model to be streamed, got from the end"
    ):
        prune_folder(tmp_path / "in", tmp_path / "out", "2:4", method=FROM_THE_END, calibration=DATA)


def test_one_of_inputs_says_what_the_error_is(tmp_path):
    folder = save(tiny.llama(), tmp_path / "in")
    model = tiny.llama()
    report = prune(model, "2:4", LARGEST, calibration=DATA, sequential=True)
    assert {layer.error for layer in report.layers} == {0.25}
    prune_folder(folder, tmp_path / "out", "2:4", method=LARGEST, calibration=DATA, sequential=True)
    streamed = weights(load(tmp_path / "out"))
    for layer in find_sites(model):
        assert torch.equal(streamed[layer.name], layer.weight)


@pytest.mark.parametrize("light", [InputSquares, None])
def test_one_that_is_as_large_as_a_weight_is_taken_block_by_block(light, monkeypatch):
    together = []

    class Counted(Gram):
        alive = 0

        def __init__(self, *arguments):
            super().__init__(*arguments)
            Counted.alive += 1
            together.append(Counted.alive)

        def __del__(self):
            Counted.alive -= 1

    monkeypatch.setattr(Counted, "light", light)
    method = Method("norms", lambda weight, found: weight.abs() * found.norm(), statistic=Counted)
    prune(tiny.llama(layers=3), "2:4", method, calibration=DATA)
    of_a_block = 4  # queries, keys and values share one, and so do gate and up
    assert max(together) == (of_a_block if light else 3 * of_a_block)


def test_a_loss_is_not_taken_and_ignored():
    model = tiny.llama()
    method = Method(
        "norms", lambda weight, found: weight.abs(), statistic=InputSquares, loss=lambda out, batch: 0
    )
    with pytest.raises(ValueError, match="loss: InputSquares has none to differentiate"):
        prune(model, "2:4", method, calibration=DATA)
