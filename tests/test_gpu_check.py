"""benchmarks/gpu_check, each step: what needs a card meets a stand-in for it here."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from helpers import backends

from sparseprune import _cuda

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_check import build, checks, environment, measure, plan, report, small_part, steps, timing
from gpu_check.judge import judge_linear, judge_mask, score
from gpu_check.picture import draw, speedups
from gpu_check.process import Finished, stream
from gpu_check.record import Budget, Record

RUN = build.ROOT / "benchmarks" / "gpu_check" / "run.py"


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


@pytest.mark.parametrize(
    "noise", ["", "while True: print('noise')", "import signal; signal.signal(15, signal.SIG_IGN)"]
)
def test_stream_cuts_a_child_and_what_it_started(noise):
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"print(p.pid, flush=True)\n{noise}\ntime.sleep(100)"
    )
    lines = []
    begin = time.monotonic()
    done = stream(python(code), 2.0, lines.append)
    assert (done.code, done.state) == (None, "cut")
    assert time.monotonic() - begin < 30
    grandchild = int(lines[0])
    for _ in range(100):  # init may take a moment to reap it
        try:
            state = Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(grandchild, signal.SIGKILL)
    raise AssertionError("the grandchild outlived the cut")


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
    assert budget.share(0.5, 300) == 250
    assert budget.share(0.5, 200) == 200
    now[0] += 400
    assert (budget.spent(), budget.left()) == (400, 100)
    assert budget.share(0.5, 300, reserve=20) == 40
    now[0] += 200
    assert budget.left() == budget.share(0.5, 300) == 0


# --- the machine ------------------------------------------------------------------------------------------------------

SMI = "NVIDIA H100 80GB HBM3, 570.86, 9.0, 81559 MiB, 700.00 W, 31, 0 %, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 0x0"


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
    assert Path("sparseprune/nn.py") in laid and Path("sparseprune/pruning/allocation/search.py") in laid
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
    done = subprocess.run([*command, Path(__file__).parent], capture_output=True, text=True, timeout=300)
    files = {line.partition("::")[0].rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line}
    assert files - {Path(__file__).name} == set(checks.TESTS), done.stdout[-2000:]


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

    def broken(x, packed, bias, rows):
        out = linear(x, packed, bias, rows)
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
        for form, layout in (("2:4", "sparse24"), ("bitmap", "bitmap8")):
            found = bench.measure(plan.Cell("choice", "bf16", "small", form, 0.5, 9), 0.0)
            assert {name.partition(",")[0] for name in found["seconds"]} == set(
                _cuda.configs(layout, torch.bfloat16)
            )
            assert {found["planned"], found["best"]} <= set(found["seconds"])
            assert found["best_over_planned"] >= 1 and not found["errors"]


# --- timing -----------------------------------------------------------------------------------------------------------


class FakeCuda:
    """torch.cuda where a call takes the seconds that it says, on a device of its own time."""

    def __init__(self, capture: str = ""):
        self.now, self.capture, self.log = 0.0, capture, []
        self.recording: list | None = None

    def work(self, seconds: float, name: str = ""):
        def call():
            (self.log if self.recording is None else self.recording).append(name)
            if self.recording is None:
                self.now += seconds
            else:
                self.graph_seconds += seconds

        return call

    def synchronize(self):
        assert self.recording is None, "a synchronisation breaks a capture"

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        assert enable_timing
        return Event()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def replay(self):
                cuda.now += self.seconds
                cuda.log.append(f"replay {len(self.calls)}")

        return Graph()

    def graph(self, graph):
        cuda = self

        class Capture:
            def __enter__(self):
                cuda.recording, cuda.graph_seconds = [], 0.0

            def __exit__(self, *_):
                graph.calls, graph.seconds = cuda.recording, cuda.graph_seconds
                cuda.recording = None
                if cuda.capture:
                    raise RuntimeError(cuda.capture)

        return Capture()


def test_a_graph_takes_calls_round_robin_until_they_are_long_enough():
    cuda = FakeCuda()
    clock = timing.CudaClock(cuda=cuda)
    turn = clock.turn("ours", [cuda.work(1e-5, "a"), cuda.work(3e-5, "b")])
    assert (turn.calls, turn.eager) == (2 * math.ceil(timing.TURN_SECONDS / 2e-5 / 2), "")
    assert clock.seconds(turn) == pytest.approx(2e-5)
    assert cuda.log[-1] == f"replay {turn.calls}"
    assert not clock.failed


def test_a_turn_holds_no_more_than_a_launch_queue():
    cuda = FakeCuda()
    turn = timing.CudaClock(cuda=cuda).turn("x", [cuda.work(1e-9)])
    assert turn.calls == timing.MAX_CALLS


def test_what_cannot_be_captured_is_timed_as_it_is():
    cuda = FakeCuda(capture="operation not permitted when stream is capturing\nmore")
    clock = timing.CudaClock(cuda=cuda)
    timings, errors = timing.take_turns({"vendor": [cuda.work(1e-4)]}, 0.0, clock)
    assert timings["vendor"].median == pytest.approx(1e-4) and not errors
    assert timings["vendor"].eager == "capture failed: operation not permitted when stream is capturing"
    assert clock.failed == {"vendor"}
    again = timing.CudaClock(["vendor"], FakeCuda(capture="never tried"))
    turn = again.turn("vendor", [cuda.work(1e-4)])
    assert (turn.eager, again.failed) == ("not captured", set())


def test_candidates_take_turns_and_errors_stay_with_their_candidate():
    cuda = FakeCuda()

    def unsupported():
        raise RuntimeError("cuSPARSELt not supported on your machine.\nmore")

    calls = {"dense": [cuda.work(3e-4)], "vendor": [unsupported], "ours": [cuda.work(1.5e-4)]}
    timings, errors = timing.take_turns(calls, 0.0, timing.CudaClock(cuda=cuda))
    assert errors == {"vendor": "cuSPARSELt not supported on your machine."}
    assert timings["dense"].median / timings["ours"].median == pytest.approx(2)
    assert timings["ours"].rounds == timing.MIN_ROUNDS
    replays = [it for it in cuda.log if it.startswith("replay")]
    assert replays[-4:] == ["replay 4", "replay 7"] * 2


def test_a_lost_device_ends_the_turns():
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing.take_turns({"ours": [lost]}, 0.0, timing.CudaClock(cuda=FakeCuda()))


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_cells_come_in_the_order_of_their_value_and_none_twice():
    cells = plan.cells(list(plan.SHAPES))
    assert len(set(cells)) == len(cells)
    first = cells[: len(plan.SHAPES) * len(plan.FIRST_BATCHES)]
    assert {(it.kind, it.form, it.dtype) for it in first} == {("linear", "2:4", "bf16")}
    assert {it.layer for it in first} == set(plan.SHAPES)
    batches = {it.batch for it in cells if it.form == "2:4" and it.dtype == "bf16" and it.kind == "linear"}
    assert batches == {2**i for i in range(13)}
    kinds = [it.kind for it in cells]
    assert kinds.index("conversion") < len(cells) / 2


def dry(seconds: float = 1.0, **change) -> tuple[int, list[dict]]:
    emitted: list[dict] = []
    bench = measure.Bench("cpu", emitted.append)
    for name, value in change.items():
        setattr(bench, name, value)
    code = measure.run(bench, plan.dry_cells(), change.get("first", 0), seconds)
    return code, emitted


@pytest.fixture(scope="module")
def dry_messages():
    torch.manual_seed(0)
    code, emitted = dry()
    assert code == 0
    return json.loads(json.dumps(emitted))


def test_every_cell_is_measured_and_right(dry_messages):
    kinds = [it["kind"] for it in dry_messages]
    assert kinds[:2] == ["cells", "device"]
    assert kinds[3::2] == ["linear", "linear", "linear", "mask", "conversion"]
    assert [it["index"] for it in dry_messages if it["kind"] == "begin"] == list(range(5))
    for it in dry_messages:
        if it["kind"] in ("linear", "mask", "conversion"):
            assert it["wrong"] is False
            assert all(timing["median"] > 0 for timing in it["seconds"].values())
    linear = dry_messages[3]
    assert (linear["layer"], linear["batch"], linear["format"], linear["dtype"]) == (
        "small",
        1,
        "2:4",
        "bf16",
    )
    assert linear["speedup"] == pytest.approx(
        linear["seconds"]["dense"]["median"] / linear["seconds"]["ours"]["median"]
    )
    assert linear["over_vendor"] is None
    assert 0 < linear["of_dense"] < 1


def test_a_wrong_result_is_told(monkeypatch):
    forward = measure.SparseLinear.forward
    monkeypatch.setattr(measure.SparseLinear, "forward", lambda self, x: forward(self, x) * 1.05)
    _, emitted = dry()
    assert [it["wrong"] for it in emitted if it["kind"] == "linear"] == [True] * 3


def test_what_no_time_is_left_for_is_named():
    emitted: list[dict] = []
    times = iter([0.0, 1.0, 11.0])
    bench = measure.Bench("cpu", emitted.append)
    assert measure.run(bench, plan.dry_cells(), 0, 10.0, lambda: next(times)) == 0
    assert [it["kind"] for it in emitted] == ["cells", "device", "begin", "linear", "left out"]
    assert emitted[-1]["cells"] == [it.name for it in plan.dry_cells()[1:]]


def test_a_cell_that_fails_costs_that_cell():
    def fails(cell, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    code, emitted = dry(mask=fails)
    assert code == 0
    assert [it["kind"] for it in emitted if it["kind"] not in ("begin",)][2:] == [
        "linear", "linear", "linear", "error", "conversion",
    ]  # fmt: skip


def test_what_a_cell_cannot_do_without_is_named(monkeypatch):
    class Fails(timing.HostClock):
        def turn(self, name, calls):
            if name in ("ours", "copy_"):
                raise RuntimeError("no kernel image\nmore")
            return super().turn(name, calls)

    _, emitted = dry(clock=Fails())
    errors = [it["error"] for it in emitted if it["kind"] == "error"]
    assert errors == ["RuntimeError: ours: no kernel image"] * 3 + ["RuntimeError: copy_: no kernel image"]


def test_a_lost_device_and_a_broken_capture_ask_for_a_fresh_process():
    def lost(cell, seconds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    code, emitted = dry(linear=lost)
    assert (code, emitted[-1]["kind"], len(emitted)) == (measure.LOST_EXIT, "error", 4)

    class Broken(timing.HostClock):
        failed = frozenset({"torch cutlass"})

    code, emitted = dry(clock=Broken())
    assert (code, emitted[-1]) == (measure.AGAIN_EXIT, {"kind": "eager", "names": ["torch cutlass"]})
    assert (measure.LOST_EXIT, measure.AGAIN_EXIT) == (steps.LOST_EXIT, steps.AGAIN_EXIT)


def test_pruned_weights_are_what_they_are_called():
    torch.manual_seed(0)
    weight = measure.pruned_weight(32, 64, "2:4", torch.bfloat16, "cpu")
    assert ((weight != 0).view(32, 16, 4).sum(-1) == 2).all()
    weight = measure.pruned_weight(64, 64, "bitmap", torch.float32, "cpu")
    assert 0.4 < float((weight == 0).float().mean()) < 0.6


def test_the_vendors_two_kinds_are_those_of_torch():
    from torch.sparse import SparseSemiStructuredTensor

    kinds = measure.vendor_kinds()
    assert set(kinds) == {"torch cusparselt", "torch cutlass"}
    assert all(
        issubclass(kind, SparseSemiStructuredTensor) and callable(kind.from_dense) for kind in kinds.values()
    )


# --- judging and showing ----------------------------------------------------------------------------------------------


def cell(batch, speedup, gb_s=100.0, over=1.0, wrong=False, form="2:4", dtype="bf16", layer="qkvo"):
    seconds = {"dense": 1e-4, "ours": 1e-4 / speedup} | (
        {} if over is None else {"torch cutlass": over * 1e-4 / speedup}
    )
    timings = {
        name: {"median": it, "low": it, "high": it, "rounds": 5, "calls": 10, "host": 5e-6, "eager": ""}
        for name, it in seconds.items()
    }
    return {
        "layer": layer, "shape": [4096, 4096], "format": form, "dtype": dtype, "batch": batch, "speedup": speedup,
        "gb_s": gb_s, "dense_gb_s": 1.0, "dense_equivalent_tflop_s": 1.0, "dense_tflop_s": 1.0, "over_vendor": over,
        "config": "n8_m32_k8, splits 2", "nbytes": 1, "of_dense": 0.56, "copies": 4, "error": 0.0, "wrong": wrong, "seconds": timings, "errors": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("it", "capability", "reached"),
    [
        (cell(1, 1.5), "9.0", True),
        (cell(16, 1.49, gb_s=799), "9.0", False),
        (cell(16, 1.49, gb_s=800), "9.0", True),
        (cell(17, 0.99), "9.0", False),
        (cell(32, 1.0), "9.0", True),
        (cell(256, 0.99), "8.0", False),
        (cell(512, 1.39, over=2.0), "8.0", False),
        (cell(512, 1.4, over=0.5), "8.9", True),
        (cell(512, 0.9, over=0.95), "9.0", True),
        (cell(4096, 1.9, over=0.94), "12.0", False),
        (cell(4096, 1.9, over=None), "9.0", None),
        (cell(1, 9.0, wrong=True), "9.0", False),
    ],
)
def test_targets_of_linears(it, capability, reached):
    assert judge_linear(it, capability, 1000.0).reached is reached


def test_what_has_no_target_is_not_judged():
    assert judge_linear(cell(1, 1.0, form="bitmap"), "9.0", 1000.0) is None
    assert judge_linear(cell(1, 1.0, dtype="fp32"), "9.0", 1000.0) is None


def test_targets_of_masks():
    shares = dict.fromkeys(("mask_apply_packed_", "mask_apply_", "threshold_mask_"), 0.8)
    assert judge_mask({"copy_shares": {**shares, "w.mul_(mask)": 0.1}, "wrong": False}).reached
    assert not judge_mask({"copy_shares": shares, "wrong": True}).reached
    assert not judge_mask({"copy_shares": {**shares, "mask_apply_": 0.79}, "wrong": False}).reached
    assert not judge_mask({"copy_shares": {}, "wrong": False}).reached


@pytest.fixture
def data(tmp_path, dry_messages):
    """A record with some of everything."""
    record = Record(tmp_path / "r.json", dry_run=False, budget=570)
    found = environment.look(lambda command: SMI if command[0] == "nvidia-smi" else None)
    device = {"name": "NVIDIA H100", "compute_capability": "9.0", "copy_gb_s": 1000.0, "peak_gb_s": 3350.0}
    record.set(
        "environment",
        {**found, "device": device, "clocks": [{"sm_clock": "1755 MHz"}, {"sm_clock": "1980 MHz"}]},
    )
    record.step("benchmarks").update(state="done", seconds=100.0, summary="all")
    for it in (
        cell(1, 1.6),
        cell(64, 0.9),
        cell(4096, 1.5, over=None),
        cell(1, 2.0, wrong=True, layer="gate/up"),
    ):
        record.add("linears", it)
    for it in dry_messages:
        if it["kind"] in ("mask", "conversion"):
            record.add(f"{it['kind']}s", it)
    record.add("choices", {"layer": "qkvo", "format": "2:4", "batch": 1, "planned": "a, splits 1", "best": "b, splits 4",
                           "best_over_planned": 1.25})  # fmt: skip
    record.leave_out("the rest", "no time")
    return record.data


def test_the_score_counts_what_can_be_judged(data):
    assert score({**data, "masks": []}) == (
        "1 of 3 targets reached, 1 cannot be judged (torch's 2:4 does not run here); 1 results are WRONG"
    )


def test_the_page_names_the_card_the_numbers_and_what_is_missing(data):
    text = report.page(data, "r.svg")
    assert text.startswith("# GPU check: NVIDIA H100\n")
    for part in ("driver 570.86", "while measuring 1755 MHz, 1980 MHz (SM)", "copies at 1000 GB/s (peak 3350)", "![", "the rest: no time",
                 "| a, splits 1 | b, splits 4 | 1.25 |"):  # fmt: skip
        assert part in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 |"))
    assert "| 0.90 |" in row and row.endswith("| not slower than dense | NO |")
    assert "| WRONG |" in text and "torch cutlass us" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_page_of_a_dry_run_claims_nothing(data):
    text = report.page({**data, "dry_run": True}, None)
    assert "No kernel ran on a GPU" in text and "targets reached" not in text
    assert "| yes |" not in text and "| NO |" not in text


def test_the_picture_shows_every_panel(data):
    root = xml.etree.ElementTree.fromstring(draw(data))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}g")) == 2
    width, height = (float(root.get(name)) for name in ("width", "height"))
    circles = root.findall(f".//{tag}circle")
    assert len(circles) == 4 + 3
    assert all(0 < float(it.get("cx")) < width and 0 < float(it.get("cy")) < height for it in circles)
    assert speedups(data["linears"][:2])["ours"] == [(1, pytest.approx(1.6)), (64, pytest.approx(0.9))]


# --- the run ----------------------------------------------------------------------------------------------------------


def check(tmp_path, run, dry_run=False, now=None, cards=SMI, nvcc="release 13.0"):
    outputs = {"nvidia-smi": cards, "nvcc": nvcc, "cmake": "cmake version 3.28.1"}
    packages = dict.fromkeys(environment.PACKAGES, "1")
    budget = Budget(570) if now is None else Budget(570, lambda: now[0])
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
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"}, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "no NVIDIA card" in done.stdout and "left out: build: environment: failed" in done.stdout
    record = tmp_path / "gpu-check.json"
    page = record.with_suffix(".md").read_text()
    record.with_suffix(".md").unlink()
    assert subprocess.run([*command, "--render", record], timeout=120).returncode == 0
    assert record.with_suffix(".md").read_text() == page


@pytest.mark.slow
def test_a_dry_run_for_real(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "--dry-run", "--folder", tmp_path], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu-check-dry.json").read_text())
    assert {it["name"]: it["state"] for it in data["steps"]} == {
        "environment": "done", "build": "done", "first call": "done", "op tests": "left out",
        "compute-sanitizer": "left out", "benchmarks": "done",
    }  # fmt: skip
    assert len(data["linears"]) == 3 and data["masks"] and data["conversions"]
