"""Recovery on two processes, as torchrun starts them, is recovery on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.recovery import pruned_pair, stream
from helpers.torchrun import torchrun
from torch import Tensor

from sparseprune.processes import Processes
from sparseprune.recovery import Distillation, RecoveryReport, Training, recover

KINDS = {"plain": {}, "accumulated": {"accumulate": 2}, "lora": {"lora": 4}}

TWO = """
import os
import sys
import torch
import test_recovery_distributed as cases

# recover() finds WORLD_SIZE and makes the process group itself
torch.save(cases.results(sys.argv[1]), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""


def results(folder: str | Path) -> dict[str, tuple[dict[str, Tensor], dict]]:
    """What each process of a run saves: for each kind the model's weights, and the report."""
    found = {}
    for kind, options in KINDS.items():
        model, teacher = pruned_pair()
        report: RecoveryReport = recover(
            model,
            stream(),
            teacher=teacher,
            steps=12,
            distillation=Distillation(cross_entropy=0.5, hidden=0.3),
            training=Training(
                windows=4,
                autocast=None,
                # epsilon: where a gradient is zero but for rounding, rounding must not decide where a weight goes
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4),
                **options,
            ),
            checkpoint=Path(folder) / kind,
        )
        found[kind] = (model.state_dict(), report.to_dict())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun(TWO, folder)
    two = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return results(tmp_path_factory.mktemp("one")), two, folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_what_one_gives(runs, kind):
    one, two, _ = runs
    weights, report = one[kind]
    start = pruned_pair()[0].state_dict()
    for name, tensor in weights.items():
        assert torch.equal(two[0][kind][0][name], two[1][kind][0][name]), name
        torch.testing.assert_close(two[0][kind][0][name], tensor, rtol=1e-3, atol=1e-4)
        if "proj" in name:
            assert torch.equal(two[0][kind][0][name] == 0, start[name] == 0)
            assert not torch.allclose(tensor, start[name], rtol=1e-3, atol=1e-3)
    for _, its in (rank[kind] for rank in two):
        assert its["tokens"] == report["tokens"] == 12 * 4 * 23
        assert its["zeros_after"] == report["zeros_after"] == 7680
        for ours, theirs in zip(its["losses"], report["losses"], strict=True):
            assert ours["total"] == pytest.approx(theirs["total"], rel=1e-3)


def test_the_first_process_writes_the_checkpoint(runs):
    folder = runs[2]
    for kind in KINDS:
        assert [path.name for path in (folder / kind).iterdir()] == ["recovery.safetensors"]


def test_a_wrapped_model_is_refused(tmp_path):
    model, teacher = pruned_pair()
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="model: must be the plain model in each process"):
            recover(torch.nn.parallel.DistributedDataParallel(model), stream(), teacher=teacher, steps=1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_batch_that_processes_cannot_share_is_refused():
    assert [list(Processes(rank, 2).share(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="batch: must be a multiple of the number of processes, 2, got 3"):
        Processes(0, 2).share(3)
