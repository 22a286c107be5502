"""Two processes that share the calibration batches get what one process gets."""

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import weights
from helpers.torchrun import torchrun

from sparseprune import processes
from sparseprune.io.checkpoint import load
from sparseprune.models.sites import find_sites
from sparseprune.pruning import prune
from sparseprune.statistics.inputs import Gram, InputSquares, collect
from sparseprune.streaming import prune_folder

METHODS = ("wanda", "sparsegpt")

TWO = """
import sys
import torch
from helpers import tiny
from sparseprune.cli import app
from sparseprune.models.sites import find_sites
from sparseprune.pruning import prune
from sparseprune.statistics.inputs import Gram, collect
import test_distributed as cases

torch.distributed.init_process_group("gloo")
cases.stream(sys.argv[1])
for name in ("--stream", "--no-stream"):
    app(["prune", f"{sys.argv[1]}/dense", f"{sys.argv[1]}/cli{name}", name, "--policy", "always"], standalone_mode=False)
torch.save(cases.results(), f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def batches(count=5):
    # an odd number: the shares differ in size
    return [tiny.ids(batch=1, length=12, seed=seed) for seed in range(count)]


def results():
    """What each process of a run saves: statistics of a model, its weights after pruning by each method."""
    model = tiny.llama()
    layers = find_sites(model)
    found = collect(model, layers, batches(), statistic=Gram)
    statistics = {name: (it.matrix, it.sum_squares, it.tokens) for name, it in found.items()}
    shared = len({id(it) for it in found.values()})
    weights = {}
    for method in METHODS:
        pruned = tiny.llama()
        prune(pruned, "2:4", method, calibration=batches())
        weights[method] = {layer.name: layer.weight.clone() for layer in find_sites(pruned)}
    return statistics, shared, weights


def stream(folder):
    """Prunes the checkpoint in `folder` by each method, from file to file."""
    for method in METHODS:
        prune_folder(f"{folder}/dense", f"{folder}/{method}", "2:4", method=method, calibration=batches())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tiny.llama().save_pretrained(folder / "dense", max_shard_size="20KB")
    (folder / "stdout").write_text(torchrun(TWO, folder))
    return results(), *(torch.load(folder / f"{rank}.pt") for rank in range(2)), folder


def test_statistics_add_up_to_those_of_one_process(runs):
    (one, shared, _), *processes, _ = runs
    for statistics, shared_there, _ in processes:
        assert shared_there == shared < len(one)  # q, k and v read one tensor, and are added up once
        for name, (matrix, squares, tokens) in one.items():
            matrix_there, squares_there, tokens_there = statistics[name]
            assert tokens_there == tokens == 5 * 12
            torch.testing.assert_close(squares_there, squares, rtol=1e-9, atol=0)
            torch.testing.assert_close(matrix_there, matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_pruning_gives_the_same_masks_in_two_processes_as_in_one(runs, method):
    (_, _, one), *processes, _ = runs
    for _, _, found in processes:
        for name, weight in one[method].items():
            assert torch.equal(found[method][name] != 0, weight != 0), name
            torch.testing.assert_close(found[method][name], weight, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(processes[0][2][method][name], processes[1][2][method][name]) for name in one[method]
    )


def test_a_share_alone_gives_other_statistics(runs):
    (one, _, _), *_ = runs
    model = tiny.llama()
    half = collect(model, find_sites(model), batches()[::2], statistic=InputSquares)
    assert all(not torch.allclose(found.sum_squares, one[name][1]) for name, found in half.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_of_two_processes_gives_the_same_masks_as_one(runs, method):
    (_, _, one), *_, folder = runs
    assert sorted(path.name for path in (folder / method).iterdir()) == [
        "config.json", "generation_config.json", *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]  # fmt: skip
    model = load(folder / method)
    for name, weight in one[method].items():
        found = model.get_submodule(name).weight
        assert torch.equal(found != 0, weight != 0), name
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)


def test_one_process_of_a_command_writes_and_speaks(runs):
    *_, folder = runs
    output = (folder / "stdout").read_text()
    for name in ("--stream", "--no-stream"):
        assert output.count(f"saved in {folder}/cli{name}\n") == 1
        assert len(weights(load(folder / f"cli{name}"))) == len(weights(tiny.llama()))


def test_there_must_be_a_batch_for_each_process(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert processes.share([1, 2, 3, 4, 5]) == [2, 4]
    with pytest.raises(ValueError, match="batches: must be at least one for each of the 2 processes, got 1"):
        processes.share([1])
