"""benchmarks/gpu_check: a run from its first step to its page, cut, failing, dry; what needs a card meets a stand-in for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import gpu_check, processes
from helpers.gpu_check import SMI

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_check import build, checks, environment, measure, steps
from gpu_check.process import Finished
from gpu_check.record import Budget, Record

RUN = build.ROOT / "benchmarks" / "gpu_check" / "run.py"


@pytest.fixture
def dry_messages():
    return gpu_check.dry_messages()


def check(tmp_path, run, dry_run=False, now=None, cards=SMI, nvcc="release 13.0"):
    outputs = {"nvidia-smi": cards, "nvcc": nvcc, "cmake": "cmake version 3.28.1"}
    packages = dict.fromkeys(environment.PACKAGES, "1")
    time = [0.0] if now is None else now
    budget = Budget(570, lambda: time[0])
    record = Record(tmp_path / "r.json", dry_run, 570)
    return steps.Check(
        tmp_path,
        record,
        budget,
        dry_run,
        1,
        run,
        lambda: {**environment.look(lambda it: outputs.get(it[0])), "packages": packages},
        lambda line: None,
    )


def states(tmp_path) -> dict[str, str]:
    return {it["name"]: it["state"] for it in json.loads((tmp_path / "r.json").read_text())["steps"]}


def what_runs(command) -> str:
    """The step that a command belongs to."""
    if command[0] in ("cmake", "compute-sanitizer"):
        return command[0].removeprefix("compute-")
    assert command[1] == str(build.CHILD)
    return command[3].removeprefix("gpu_check.")


def test_a_run_in_order_every_result_at_once(tmp_path, monkeypatch, dry_messages):
    monkeypatch.setattr(checks, "sanitizer_is_here", lambda: True)
    order, now = [], [0.0]

    def run(command, seconds, on_line=lambda line: None, env=None, cwd=None):
        order.append((what_runs(command), seconds))
        now[0] += 20
        if order[-1][0] == "measure":
            for i, message in enumerate(dry_messages):
                on_line(json.dumps(message))
                on_line("UserWarning: something")
                kept = json.loads((tmp_path / "r.json").read_text())
                assert len(kept["linears"]) == sum(it["kind"] == "linear" for it in dry_messages[: i + 1])
        if order[-1][0] == "pytest":
            on_line("tests/test_ops.py::test_masks[cuda] PASSED [ 50%]")
        return Finished(0, 20.0, "")

    assert check(tmp_path, run, now=now).all()
    names = [name for name, _ in order]
    assert names == ["cmake"] * 3 + ["small_part", "pytest"] + ["sanitizer"] * 4 + ["measure"]
    assert set(states(tmp_path).values()) == {"done"}
    for name, seconds in order:
        assert 0 < seconds <= 570, name
    assert order[-1][1] == pytest.approx(570 - 180 - steps.RESERVE_SECONDS)
    assert (tmp_path / "r.md").exists() and (tmp_path / "r.svg").exists()


def test_a_build_that_fails_ends_the_run_and_keeps_the_words(tmp_path):
    assert not check(tmp_path, lambda *_, **__: Finished(1, 3.0, "error: no such thing")).all()
    data = json.loads((tmp_path / "r.json").read_text())
    assert [it["state"] for it in data["steps"]] == ["done", "failed"]
    assert data["steps"][1]["output"] == "error: no such thing"
    assert "error: no such thing; more" in data["steps"][1]["summary"]
    assert [it["what"] for it in data["left_out"]] == [
        "first call",
        "op tests",
        "compute-sanitizer",
        "benchmarks",
    ]
    assert "build: failed" in (tmp_path / "r.md").read_text()


def test_no_card_ends_the_run_before_the_build(tmp_path):
    assert not check(tmp_path, lambda *_, **__: pytest.fail("nothing may run"), cards=None).all()
    assert states(tmp_path) == {"environment": "failed"}


def test_failing_tests_do_not_keep_from_the_benchmarks(tmp_path):
    seen = []

    def run(command, seconds, on_line=lambda line: None, env=None, cwd=None):
        seen.append(what_runs(command))
        return Finished(1 if seen[-1] in ("pytest", "small_part") else 0, 1.0, "E   assert 1 == 2")

    assert not check(tmp_path, run).all()
    found = states(tmp_path)
    assert (found["first call"], found["op tests"], found["benchmarks"]) == ("failed", "failed", "done")
    assert seen[-1] == "measure"


def test_cut_tests_leave_time_for_the_rest_and_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "sanitizer_is_here", lambda: True)
    now = [0.0]

    def run(command, seconds, on_line=lambda line: None, env=None, cwd=None):
        now[0] += seconds
        if what_runs(command) in ("pytest", "sanitizer"):
            on_line("tests/test_ops.py::test_masks[cuda] PASSED [ 50%]")
            return Finished(None, seconds, "")
        return Finished(0, seconds, "")

    assert check(tmp_path, run, now=now).all()
    found = states(tmp_path)
    assert (found["op tests"], found["compute-sanitizer"]) == ("cut", "cut")
    assert now[0] <= 570
    left_out = json.loads((tmp_path / "r.json").read_text())["left_out"]
    assert left_out[0]["what"] == "the rest of the op tests" and "1 passed" in left_out[0]["why"]


def test_benchmarks_go_on_in_a_fresh_process(tmp_path):
    starts = []

    def run(command, seconds, on_line=lambda line: None, env=None, cwd=None):
        if what_runs(command) != "measure":
            return Finished(0, 1.0, "")
        options = dict(zip(command, command[1:], strict=False))
        starts.append((options["--first"], options["--eager"]))
        on_line(json.dumps({"kind": "cells", "count": 9}))
        on_line(json.dumps({"kind": "begin", "index": int(options["--first"]) + 1, "cell": "one"}))
        if len(starts) == 1:
            on_line(json.dumps({"kind": "eager", "names": ["torch cutlass"]}))
            return Finished(measure.AGAIN_EXIT, 1.0, "")
        if len(starts) == 2:
            on_line(json.dumps({"kind": "error", "cell": "one", "error": "illegal memory access"}))
            return Finished(measure.LOST_EXIT, 1.0, "")
        on_line(json.dumps({"kind": "left out", "cells": ["a", "b"]}))
        return Finished(0, 1.0, "")

    assert not check(tmp_path, run).all()  # the error
    assert starts == [("0", ""), ("2", "torch cutlass"), ("4", "torch cutlass")]
    data = json.loads((tmp_path / "r.json").read_text())
    assert "the device was lost to the process at one" in data["notes"]
    assert {"what": "2 cells, from a on", "why": "no time"} in data["left_out"]


def test_a_dry_run_does_what_it_can_and_says_what_it_left_out(tmp_path, dry_messages):
    commands = []

    def run(command, seconds, on_line=lambda line: None, env=None, cwd=None):
        commands.append(command)
        if what_runs(command) == "measure":
            assert "--dry-run" in command
            for message in dry_messages:
                on_line(json.dumps(message))
        return Finished(0, 1.0, "")

    assert check(tmp_path, run, dry_run=True, cards=None, nvcc=None).all()
    assert "-DSPARSEPRUNE_CUDA=OFF" in commands[0]
    assert commands[3][-1] == "cpu" and "--collect-only" in commands[4]
    assert states(tmp_path)["compute-sanitizer"] == "left out"
    left_out = [it["what"] for it in json.loads((tmp_path / "r.json").read_text())["left_out"]]
    assert left_out == [
        "compiling the kernels", "the operations on the card", "op tests on the card", "compute-sanitizer", "benchmarks",
    ]  # fmt: skip


def test_with_nvcc_a_dry_run_compiles_the_kernels(tmp_path):
    commands = []

    def run(command, seconds, *_, **__):
        commands.append(command)
        return Finished(0, 1.0, "")

    check(tmp_path, run, dry_run=True, cards=None).all()
    assert f"-DCMAKE_CUDA_ARCHITECTURES={steps.DRY_ARCHITECTURE}" in commands[0]


def test_an_interrupted_run_writes_its_page(tmp_path):
    def run(command, *_, **__):
        if what_runs(command) == "pytest":
            raise KeyboardInterrupt
        return Finished(0, 1.0, "")

    it = check(tmp_path, run)
    with pytest.raises(KeyboardInterrupt):
        it.all()
    it.interrupted()
    assert states(tmp_path)["op tests"] == "cut"
    assert "the run was interrupted" in (tmp_path / "r.md").read_text()


def test_the_command_without_a_card(tmp_path):
    """For real, as far as this machine goes: without nvidia-smi on PATH no step but the first begins."""
    command = [sys.executable, RUN, "--folder", tmp_path]
    done = processes.run(command, {"PATH": "/nowhere"})
    assert done.returncode == 1, done.stderr
    assert "no NVIDIA card" in done.stdout and "left out: build: environment: failed" in done.stdout
    record = tmp_path / "gpu-check.json"
    page = record.with_suffix(".md").read_text()
    record.with_suffix(".md").unlink()
    assert processes.run([*command, "--render", record]).returncode == 0
    assert record.with_suffix(".md").read_text() == page


@pytest.mark.slow
def test_a_dry_run_for_real(tmp_path):
    seconds = processes.HANGS  # in its own ten minutes a busy machine does not get to the end
    done = processes.run([sys.executable, RUN, "--dry-run", "--folder", tmp_path, "--seconds", seconds])
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu-check-dry.json").read_text())
    assert {it["name"]: it["state"] for it in data["steps"]} == {
        "environment": "done", "build": "done", "first call": "done", "op tests": "left out",
        "compute-sanitizer": "left out", "benchmarks": "done",
    }  # fmt: skip
    assert len(data["linears"]) == 3 and data["masks"] and data["conversions"]
