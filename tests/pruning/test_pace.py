"""Pruning ends in the minutes that it is given, on machines of any speed."""

from __future__ import annotations

import pytest
from helpers import tiny

from sparseprune import prune
from sparseprune.pruning.base import Method, Pruned
from sparseprune.pruning.reconstruction import Reconstruction
from sparseprune.statistics import walk
from sparseprune.statistics.inputs import Gram

BATCHES = [tiny.ids(2, 8, seed) for seed in range(24)]
BLOCKS = 4


@pytest.fixture
def machine(ticks, monkeypatch):
    """On this one a pass of a block over a batch takes a second, and all else a millisecond a look at the clock."""
    real, passes = walk.run_block, []

    def run_block(block, hidden, how):
        ticks.seconds += 1
        passes.append(len(passes))
        return real(block, hidden, how)

    monkeypatch.setattr("sparseprune.statistics.walk.run_block", run_block)
    monkeypatch.setattr("sparseprune.pruning.reconstruction.run_block", run_block)
    return passes


def pruned(minutes, method="admm", **options):
    return prune(tiny.llama(layers=BLOCKS), "2:4", method, calibration=BATCHES, minutes=minutes, **options)


def test_time_enough_changes_nothing(machine):
    report = pruned(60, reconstruction=Reconstruction(epochs=2))
    assert {it.epochs for it in report.blocks} == {2}
    assert not any("calibrated on" in note for note in report.notes)
    assert (
        len(machine) == BLOCKS * len(BATCHES) * 7 + 2
    )  # 3 to read, 2 losses, 2 epochs; one is timed beforehand, twice


@pytest.mark.parametrize("minutes", [2, 4, 8])
@pytest.mark.parametrize(
    "options", [{}, {"reconstruction": Reconstruction(epochs=20)}], ids=["solver", "reconstruction"]
)
def test_minutes_are_kept(machine, minutes, options):
    report = pruned(minutes, **options)
    assert report.sparsity_after == 0.5
    needed = BLOCKS * len(BATCHES) * (23 if options else 2)
    assert report.seconds < 60 * minutes * 1.05
    assert report.seconds > min(needed, 60 * minutes) * 0.6, "time was left"


def test_batches_are_dropped_before_the_epoch_is(machine):
    report = pruned(2, reconstruction=Reconstruction(epochs=20))
    assert len(report.blocks) == BLOCKS
    (note,) = [it for it in report.notes if it.startswith("calibrated on")]
    assert "of 24 batches" in note
    assert note in str(report)


def test_a_solver_that_takes_its_time_leaves_less_to_read(machine, ticks):
    def solve(weight, statistic, target):
        ticks.seconds += 2
        mask = target.mask(weight.abs())
        return Pruned(weight * mask, mask)

    slow = Method("slow", solve=solve, statistic=Gram)
    report = pruned(2, slow)
    assert any("calibrated on" in note for note in report.notes)
    assert 2 * 7 * BLOCKS < report.seconds < 2 * 60 * 1.05


def test_a_block_that_was_held_up_costs_the_others_a_quarter_at_most(machine, ticks):
    """Threads start and caches fill in the first one; what it drops never comes back."""
    calls = []

    def solve(weight, statistic, target):
        calls.append(ticks.seconds)
        if len(calls) == 1:
            ticks.seconds += 110
        mask = target.mask(weight.abs())
        return Pruned(weight * mask, mask)

    report = pruned(8, Method("held up", solve=solve, statistic=Gram))
    assert len(machine) == 2 + 2 * (24 + 18 * (BLOCKS - 1))
    assert report.seconds < 8 * 60


def test_one_batch_is_read_at_least(machine):
    report = pruned(0.01)
    assert report.sparsity_after == 0.5
    assert len(machine) <= 2 + BLOCKS * 2


def test_without_minutes_nobody_looks_at_the_clock(machine):
    report = pruned(None)
    assert not any("calibrated on" in note for note in report.notes)
    assert len(machine) == BLOCKS * len(BATCHES) * 2
