"""benchmarks/gpu_check, each step by itself: what needs a card meets a stand-in for it here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import backends, processes
from helpers.gpu_check import SMI

from sparseprune.kernels import cuda
from sparseprune.kernels.packing import packing_code

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu_check import build, checks, environment, measure, plan, small_part, steps
from gpu_check.process import Finished, stream
from gpu_check.record import Budget, Record

TESTS = Path(__file__).resolve().parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


# --- children ---------------------------------------------------------------------------------------------------------


def test_stream_hands_on_lines_and_the_exit_code():
    lines = []
    done = stream(
        python("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"), 60, lines.append
    )
    assert (done.code, done.state, lines, done.tail) == (3, "failed", ["a", "b"], "a\nb")
    assert stream(python("pass"), 60).state == "done"


def test_stream_passes_environment_and_folder(tmp_path):
    done = stream(
        python("import os; print(os.environ['PLACE'], os.getcwd())"), 60, env={"PLACE": "x"}, cwd=tmp_path
    )
    assert done.tail == f"x {tmp_path.resolve()}"


GRANDCHILD = """
import sys, time
with open(sys.argv[1], "w") as pipe:
    print("begun", flush=True)
    time.sleep(600)
    pipe.write("outlived the cut")
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pass", "pass"),
        ("pass", "while True: print('noise')"),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", "pass"),
    ],
    ids=["quiet", "noisy", "deaf"],
)
def test_stream_cuts_a_child_and_what_it_started(tmp_path, first, then):
    """The pipe's end comes when no process holds it open any more."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    now = [0.0]

    def line(text):
        if "begun" in text:  # the noise of two processes may share a line
            now[0] = 100.0

    code = (
        f"import subprocess, sys\n{first}\n"
        f"child = subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}, {str(pipe)!r}])\n{then}\nchild.wait()"
    )
    done = stream(python(code), 50, line, clock=lambda: now[0])
    assert (done.code, done.state, done.seconds) == (None, "cut", 100)
    os.set_blocking(reading, True)
    with os.fdopen(reading) as rest:
        assert rest.read() == ""


def test_stream_cuts_a_child_that_says_nothing():
    assert stream(python("import time; time.sleep(600)"), 0.1).state == "cut"


# --- the record -------------------------------------------------------------------------------------------------------


def test_record_is_whole_on_disk_after_every_change(tmp_path):
    path = tmp_path / "deep" / "record.json"
    record = Record(path, dry_run=False, budget=570)
    assert json.loads(path.read_text())["steps"] == []
    entry = record.step("build")
    assert json.loads(path.read_text())["steps"] == [{"name": "build", "state": "running"}]
    entry["state"] = "done"
    record.add("linears", {"speedup": 1.23456, "shape": (2, 3)})
    record.leave_out("that", "why")
    data = json.loads(path.read_text())
    assert data["steps"][0]["state"] == "done"
    assert data["linears"] == [{"speedup": 1.235, "shape": [2, 3]}]
    assert data["left_out"] == [{"what": "that", "why": "why"}]
    assert list(path.parent.iterdir()) == [path]


def test_budget_shares_what_is_left():
    now = [100.0]
    budget = Budget(500, lambda: now[0])
    assert budget.share(0.5, 0.6) == 250
    assert budget.share(0.5, 0.4) == 200
    now[0] += 400
    assert (budget.spent(), budget.left()) == (400, 100)
    assert budget.share(0.5, 0.6, reserve=20) == 40
    now[0] += 200
    assert budget.left() == budget.share(0.5, 0.6) == 0


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_card_is_read_from_nvidia_smi():
    card = environment.query_cards(tuple(environment._FIELDS), lambda command: SMI)[0]
    assert (card["name"], card["driver"], card["compute_capability"]) == (
        "NVIDIA H100 80GB HBM3",
        "570.86",
        "9.0",
    )
    assert card["max_memory_clock"] == "2619 MHz"


def test_a_field_that_an_old_driver_lacks_costs_that_field():
    def old(command):
        asked = command[1].removeprefix("--query-gpu=")
        return {"name": "Tesla\nTesla", "driver_version": "1\n1"}.get(asked)

    cards = environment.query_cards(("name", "throttle_reasons", "driver"), old)
    assert cards == [{"name": "Tesla", "driver": "1"}] * 2
    assert environment.query_cards(("name",), lambda command: None) == []
    assert environment.clocks(lambda command: None) == {}


def test_what_is_missing_is_named_with_its_remedy():
    there = {
        "cards": [{"name": "x"}],
        "nvcc": "13.0",
        "cmake": "3.28",
        "packages": dict.fromkeys(environment.NEEDED, "1"),
    }
    assert environment.missing(there, dry_run=False) == []
    assert environment.missing({**there, "cards": [], "nvcc": None}, dry_run=True) == []
    (card,) = environment.missing({**there, "cards": []}, dry_run=False)
    assert "install the driver, or try --dry-run" in card
    (nvcc,) = environment.missing({**there, "nvcc": None}, dry_run=False)
    assert "install the CUDA toolkit" in nvcc
    lacks = environment.missing({**there, "cmake": None, "packages": {"torch": "2"}}, dry_run=True)
    assert lacks[0].startswith("no cmake") and "pip install numpy safetensors pybind11 pytest" in lacks[1]


def test_the_architecture_is_the_cards():
    cards = [{"compute_capability": "9.0"}, {"compute_capability": "8.9"}, {"compute_capability": "9.0"}]
    assert environment.architectures({"cmake": "3.24.0", "cards": cards}) == "native"
    assert environment.architectures({"cmake": "3.22.1", "cards": cards}) == "90-real;89-real"


def test_a_busy_card_is_told():
    assert environment.busy({"utilization": "37 %"}) == 37
    assert environment.busy({"utilization": "[N/A]"}) == environment.busy({}) == 0


def test_clocks_are_read_while_cells_are_measured(tmp_path):
    record = Record(tmp_path / "r.json", dry_run=False, budget=570)
    clocks = iter([{"sm_clock": "1980 MHz"}, {}, {"sm_clock": "1755 MHz"}])
    bench = steps.Benchmarks(record, lambda: next(clocks))
    for index in range(3 * steps.CLOCKS_EVERY):
        bench.line(json.dumps({"kind": "begin", "index": index, "cell": "x"}))
    assert record.data["environment"]["clocks"] == [{"sm_clock": "1980 MHz"}, {"sm_clock": "1755 MHz"}]


def test_look_finds_versions():
    outputs = {
        "nvcc": "Cuda compilation tools, release 13.0, V13.0.48",
        "compute-sanitizer": "NVIDIA (R) Compute Sanitizer\nVersion 2025.3",
        "cmake": "cmake version 3.28.1\n\nCMake suite",
        "nvidia-smi": SMI,
    }
    found = environment.look(lambda command: outputs[command[0]])
    assert (found["nvcc"], found["cmake"], found["compute_sanitizer"]) == ("13.0", "3.28.1", "Version 2025.3")
    assert found["packages"]["torch"] and found["cards"][0]["driver"] == "570.86"
    nothing = environment.look(lambda command: None)
    assert (nothing["cards"], nothing["nvcc"], nothing["cmake"]) == ([], None, None)


# --- build ------------------------------------------------------------------------------------------------------------


def test_build_configures_for_the_card_compiles_installs_and_lays_out(tmp_path):
    commands = []

    def run(command, seconds, *_, **__):
        commands.append((command, seconds))
        return Finished(0, 10.0, "fine")

    done = build.build(tmp_path, "native", "ON", 100, run, jobs=3)
    assert (done.state, done.seconds) == ("done", 30)
    (configure, first), (compile_, second), (install, third) = commands
    assert (first, second, third) == (100, 90, 80)
    assert "-DCMAKE_CUDA_ARCHITECTURES=native" in configure and "-DSPARSEPRUNE_CUDA=ON" in configure
    assert f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'site'}" in configure
    assert compile_[-2:] == ["--parallel", "3"] and install[1] == "--install"
    laid = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*")}
    assert (
        Path("sparseprune/weights/linear.py") in laid
        and Path("sparseprune/pruning/allocation/search.py") in laid
    )
    assert not any(path.suffix == ".so" for path in laid)


@pytest.mark.parametrize("code", [None, 1])
def test_build_stops_at_the_part_that_does_not_end_well(tmp_path, code):
    commands = []

    def run(command, seconds, *_, **__):
        commands.append(command)
        return Finished(0 if len(commands) == 1 else code, 5.0, f"words {len(commands)}")

    done = build.build(tmp_path, "native", "ON", 100, run)
    assert (done.code, done.seconds, done.tail, len(commands)) == (code, 10, "words 2", 2)


def test_a_build_folder_of_another_checkout_is_made_anew(tmp_path):
    tree = tmp_path / "build"
    for source, kept in ((build.ROOT, True), ("/elsewhere", False)):
        tree.mkdir(exist_ok=True)
        (tree / "CMakeCache.txt").write_text(
            f"A:STRING=1\nCMAKE_HOME_DIRECTORY:INTERNAL={source}\nB:STRING=2\n"
        )
        build.forget_other_source(tree)
        assert tree.exists() == kept
    build.forget_other_source(tree)


def test_no_architecture_is_asked_for_without_cuda(tmp_path):
    assert not any("ARCHITECTURES" in it for it in build.configure_command(tmp_path, "native", "OFF"))


def test_a_child_runs_on_the_package_of_the_folder_alone(tmp_path):
    package = build.site(tmp_path) / "sparseprune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "here.py").write_text("import sys\nprint(__name__, sys.argv[1:], __file__)")
    done = stream(build.child(tmp_path, "sparseprune.here", "a", "b"), 60)
    assert done.tail == f"__main__ ['a', 'b'] {package / 'here.py'}"
    (package / "__init__.py").unlink()
    package.joinpath("here.py").unlink()
    package.rmdir()
    refused = stream(build.child(tmp_path, "json.tool"), 60)
    assert refused.state == "failed" and "sparseprune" in refused.tail


# --- tests and sanitizer ----------------------------------------------------------------------------------------------


def test_outcomes_of_pytest_are_counted_line_by_line(tmp_path):
    text = """
collected 3000 items / 2880 deselected / 120 selected
tests/test_linear.py::test_exact[cuda-bf16-2:4] PASSED [  1%]
tests/test_linear.py::test_exact[cuda-f16 x] FAILED [  2%]
tests/test_ops.py::test_masks[cuda] SKIPPED (why) [  3%]
tests/test_ops.py::test_masks[cuda-x] ERROR [  3%]
FAILED tests/test_linear.py::test_exact[cuda-f16 x] - AssertionError: PASSED
"""

    packages = {"hypothesis": "6", "expecttest": "1"}

    def run(command, seconds, on_line, env, cwd):
        assert command[:4] == [*build.child(tmp_path, "pytest")]
        assert (
            command[command.index("-k") + 1] == checks.SELECT
            and command[command.index("-m", 5) + 1] == "not slow"
        )
        assert env["PYTHONPATH"] == str(build.site(tmp_path))
        for line in text.splitlines():
            on_line(line)
        return Finished(1, 2.0, text)

    done, outcomes = checks.op_tests(tmp_path, packages, 10, run)
    assert done.state == "failed"
    assert outcomes.counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert outcomes.failures == [
        "tests/test_linear.py::test_exact[cuda-f16 x]",
        "tests/test_ops.py::test_masks[cuda-x]",
    ]
    assert outcomes.collected == 120


def test_without_hypothesis_and_expecttest_the_other_tests_run(tmp_path):
    """On a machine that has neither: the stand-in takes the place of the one, the other's tests are not selected."""
    (tmp_path / "test_some.py").write_text(
        "from hypothesis import given, settings\nfrom hypothesis import strategies as st\n"
        "@settings(max_examples=3)\n@given(a=st.integers(0, 3), b=st.sampled_from([1]))\ndef test_random(a, b): assert False\n"
        "def test_plain(): pass\n"
    )
    env = checks.environment_of(tmp_path, {})
    assert env["PYTHONPATH"].split(os.pathsep) == [str(build.site(tmp_path)), str(checks.STANDINS)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rs",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:cacheprovider",
        tmp_path,
    ]
    done = stream(command, 60, env=env)
    assert (
        "test_plain PASSED" in done.tail and "test_random SKIPPED (hypothesis is not installed)" in done.tail
    )
    assert [what for what, _ in checks.without({})] == ["tests on random shapes", "torch.library.opcheck"]
    assert checks.without({"hypothesis": "6", "expecttest": "1"}) == []

    def run(command, *_, **__):
        assert command[command.index("-k") + 1] == f"{checks.SELECT} and not opcheck"
        return Finished(0, 1.0, "")

    checks.op_tests(tmp_path, {}, 10, run)


def test_every_file_with_tests_of_the_card_is_run():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        checks.TWINS,
    ]
    done = processes.run([*command, TESTS])
    files = {
        line.partition("::")[0].rpartition("tests/")[2] for line in done.stdout.splitlines() if "::" in line
    }
    assert files - {str(Path(__file__).relative_to(TESTS))} == set(checks.TESTS), done.stdout[-2000:]


def test_sanitizer_reports_what_it_finds(tmp_path):
    def run(command, seconds, on_line, env, cwd):
        assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        for line in (
            "0 wrong",
            "========= Error: Race reported between ...",
            "========= RACECHECK SUMMARY: 1 hazard",
        ):
            on_line(line)
        return Finished(checks.SANITIZER_ERROR, 5.0, "tail")

    found = checks.sanitize(tmp_path, "racecheck", 10, run)
    assert found["errors"] == ["Error: Race reported between ...", "RACECHECK SUMMARY: 1 hazard"]
    crashed = checks.sanitize(
        tmp_path, "memcheck", 10, lambda *_, **__: Finished(1, 5.0, "wrong: masks\n1 wrong")
    )
    assert crashed["errors"] == ["wrong: masks", "1 wrong"]
    clean = checks.sanitize(tmp_path, "memcheck", 10, lambda *_, **__: Finished(0, 5.0, ""))
    assert clean == {"tool": "memcheck", "state": "done", "seconds": 5.0}


def test_small_part_is_right_here_and_says_what_is_wrong(monkeypatch, capsys):
    assert small_part.main("cpu") == 0
    assert capsys.readouterr().out == "0 wrong\n"
    linear = small_part.ops.linear

    def broken(x, packed, bias):
        out = linear(x, packed, bias)
        out[0, 0] += 1
        return out

    monkeypatch.setattr(small_part.ops, "linear", broken)
    assert small_part.main("cpu") == 1
    assert "wrong: linear 2:4 bfloat16 40x100" in capsys.readouterr().out


def test_small_part_and_the_choice_of_configurations_on_the_emulated_card():
    """What the children run on a card, on the emulated one: all but the timing."""
    with backends.running("emulated"):
        assert small_part.main("cpu") == 0
        bench = measure.Bench("cpu", lambda message: None)
        for form, *how in (
            ("2:4", "sparse24", torch.bfloat16),
            ("bitmap", "bitmap8", torch.bfloat16),
            ("dense int4", "fragments", torch.bfloat16, "int4", 64, torch.float16),
            ("2:4 int8", "fragments24", torch.bfloat16, "int8", 64, torch.float16),
        ):
            found = bench.measure(plan.Cell("choice", "bf16", "small", form, 0.5, 9), 0.0)
            assert {name.partition(",")[0] for name in found["seconds"]} == set(
                cuda.configs(packing_code(*how))
            )
            assert {found["planned"], found["best"]} <= set(found["seconds"])
            assert found["best_over_planned"] >= 1 and not found["errors"]
