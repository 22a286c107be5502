"""benchmarks/gpu_check: the clock, with a stand-in for a GPU, and the benchmark, on the CPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import gpu_check
from helpers.clocks import Ticks
from helpers.gpu_check import dry

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_check import measure, plan, steps, timing


@pytest.fixture
def dry_messages():
    return gpu_check.dry_messages()


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


def test_every_cell_is_measured_and_right(dry_messages):
    kinds = [it["kind"] for it in dry_messages]
    assert kinds[:2] == ["cells", "device"]
    assert kinds[3::2] == ["linear"] * 4 + ["mask", "conversion"]
    assert [it["index"] for it in dry_messages if it["kind"] == "begin"] == list(range(6))
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
    assert [it["wrong"] for it in emitted if it["kind"] == "linear"] == [True] * 4


def test_what_no_time_is_left_for_is_named():
    now = Ticks()

    def slow(cell, seconds):
        now.seconds += 11
        return {"kind": "linear"}

    code, emitted = dry(10.0, clock=timing.HostClock(now), measure=slow)
    assert code == 0
    assert [it["kind"] for it in emitted] == ["cells", "device", "begin", "linear", "left out"]
    assert emitted[-1]["cells"] == [it.name for it in plan.dry_cells()[1:]]


def test_a_cell_that_fails_costs_that_cell():
    def fails(cell, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    code, emitted = dry(mask=fails)
    assert code == 0
    assert [it["kind"] for it in emitted if it["kind"] not in ("begin",)][2:] == [
        "linear", "linear", "linear", "linear", "error", "conversion",
    ]  # fmt: skip


def test_what_a_cell_cannot_do_without_is_named(monkeypatch):
    class Fails(timing.HostClock):
        def turn(self, name, calls):
            if name in ("ours", "copy_"):
                raise RuntimeError("no kernel image\nmore")
            return super().turn(name, calls)

    _, emitted = dry(clock=Fails(Ticks()))
    errors = [it["error"] for it in emitted if it["kind"] == "error"]
    assert errors == ["RuntimeError: ours: no kernel image"] * 4 + ["RuntimeError: copy_: no kernel image"]


def test_a_lost_device_and_a_broken_capture_ask_for_a_fresh_process():
    def lost(cell, seconds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    code, emitted = dry(linear=lost)
    assert (code, emitted[-1]["kind"], len(emitted)) == (measure.LOST_EXIT, "error", 4)

    class Broken(timing.HostClock):
        failed = frozenset({"torch cutlass"})

    code, emitted = dry(clock=Broken(Ticks()))
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
