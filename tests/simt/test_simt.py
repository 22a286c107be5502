"""The emulator of tests/simt: its own C++ tests under sanitizers, and what it shows to Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import processes, simt
from simt import traffic
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
NAMED_BY_A_FAULT = re.compile(
    r"at csrc/cuda/[\w/]+\.cuh?:\d+; kernel mask_bytes_16, block \(\d+, 0, 0\) of \(\d+, 1, 1\), "
    r"thread \d+ \(warp \d+, lane \d+\); SPARSEPRUNE_SIMT_SEED=(\d+)"
)


@pytest.fixture
def emulator() -> ModuleType:
    module = simt.module()
    module.clear()
    module.clear_report()
    return module


def mask(emulator: ModuleType, x: Tensor, kept: Tensor, out: Tensor, skip: str = "", short: int = 0) -> None:
    """`mask_bytes` with all buffers registered but `skip`, and `out` `short` bytes too short."""
    for name, tensor in {"x": x, "kept": kept, "out": out}.items():
        if name != skip:
            nbytes = tensor.nbytes - (short if name == "out" else 0)
            emulator.register(tensor.data_ptr(), nbytes, name == "out")
    emulator.mask_bytes(0, 0, x.data_ptr(), kept.data_ptr(), out.data_ptr(), x.numel(), 1)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.arange(1, 3001).bfloat16()
    return x, torch.arange(3000) % 3 == 0, torch.empty_like(x)


def test_its_own_tests_under_sanitizers() -> None:
    folder = simt.build("test_simt")
    done = processes.run([folder / "test_simt"], {"SIMT_ROUNDS": "8", "UBSAN_OPTIONS": "print_stacktrace=1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    counts = re.fullmatch(r"(\d+) passed, 0 failed", done.stdout.splitlines()[-1])
    assert counts and int(counts[1]) > 8 * 3800, done.stdout[-4000:]


def test_a_kernel_runs(emulator: ModuleType) -> None:
    x, kept, out = operands()
    mask(emulator, x, kept, out)
    assert torch.equal(out, torch.where(kept, x, 0))
    (report,) = emulator.report()
    assert report["kernel"] == "mask_bytes_16"
    assert report["launches"] == 1
    assert report["blocks"] >= 1
    assert report["threads"] % 32 == 0


@pytest.mark.parametrize(
    ("skip", "short", "says"),
    [
        ("kept", 0, "the address is in no buffer of this launch"),
        ("out", 0, "the address is in no buffer of this launch"),
        ("", 2, "out of bounds, byte 599[0-9] of a buffer of 5998"),
    ],
)
def test_a_fault_names_rule_and_place(emulator: ModuleType, skip: str, short: int, says: str) -> None:
    with pytest.raises(RuntimeError, match=says) as fault:
        mask(emulator, *operands(), skip, short)
    place = NAMED_BY_A_FAULT.search(str(fault.value))
    assert place, fault.value
    assert int(place[1]) == emulator.seed()


def test_an_input_is_not_written(emulator: ModuleType) -> None:
    x, kept, out = operands()
    emulator.register(out.data_ptr(), out.nbytes, False)
    for tensor in (x, kept):
        emulator.register(tensor.data_ptr(), tensor.nbytes, False)
    with pytest.raises(RuntimeError, match="the buffer is an input"):
        emulator.mask_bytes(0, 0, x.data_ptr(), kept.data_ptr(), out.data_ptr(), x.numel(), 1)


def test_a_seed_repeats_a_fault(emulator: ModuleType) -> None:
    def message(seed: int) -> str:
        emulator.set_seed(seed)
        with pytest.raises(RuntimeError) as fault:
            mask(emulator, *operands(), skip="out")
        emulator.clear()
        return str(fault.value).split("; SPARSEPRUNE_SIMT_SEED")[0]

    before = emulator.seed()
    try:
        messages = [message(seed) for seed in range(20)]
        assert messages == [message(seed) for seed in range(20)]
        assert len(set(messages)) > 1  # another seed, another thread is first
    finally:
        emulator.set_seed(before)


def start(seed: str) -> subprocess.CompletedProcess[str]:
    """A process that says which seed it has."""
    code = "from helpers import simt; print(simt.module().seed())"
    return processes.python(code, {"SPARSEPRUNE_SIMT_SEED": seed})


def test_the_seed_comes_from_the_environment() -> None:
    assert start("42").stdout.split() == ["42"]
    refused = start("often")
    assert refused.returncode != 0
    assert "SPARSEPRUNE_SIMT_SEED: must be a whole number, got often" in refused.stderr


def test_plans_are_made_for_the_multiprocessors_that_it_claims(emulator: ModuleType) -> None:
    before = emulator.sm_count(0)
    try:
        emulator.set_sm_count(132)
        assert emulator.sm_count(0) == 132
        with pytest.raises(ValueError, match="sm_count: must be at least 1, got 0"):
            emulator.set_sm_count(0)
    finally:
        emulator.set_sm_count(before)


def test_traffic_is_told_by_line(emulator: ModuleType) -> None:
    # Rows of an odd length go through shared memory.
    x, kept, out = operands()
    mask(emulator, x[1:], kept[1:], out[1:])
    (report,) = emulator.report()
    for space, units in (("shared", "turns"), ("global", "sectors")):
        assert report[space]
        for line, counted in report[space].items():
            assert re.fullmatch(r"csrc/cuda/[\w/]+\.cuh?:\d+", line)
            assert 1 <= counted["requests"] <= counted[units] <= counted["requests"] * counted["worst"]
            assert counted["worst"] <= 32
            assert counted["bytes"] >= counted["requests"]
    emulator.clear_report()
    assert emulator.report() == []


def test_kernels_waste_no_traffic() -> None:
    """No bank conflicts, and whole sectors, where a kernel must run as fast as memory."""
    streams = (
        "linear_sparse24",
        "linear_fragments",
        "linear_bitmap8_bf16",
        "mask_",
        "bits_to_bytes",
        "bytes_to_bits",
    )
    seen = set()
    for use in traffic.measure():
        if use.kernel.startswith(streams):
            seen.add(use.kernel)
            assert use.worst == 1 if use.space == "shared" else use.mean > 0.9, use
    assert len(seen) >= 10, seen


@pytest.mark.slow
def test_kernels_have_no_undefined_behaviour(tmp_path: Path) -> None:
    """Shifts by 32 and overflows, which a GPU and a CPU answer differently: the operations' tests once more, with checks."""
    env = {
        "CXXFLAGS": "-fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all",
        "SPARSEPRUNE_SIMT_BUILD": str(tmp_path),
        "SPARSEPRUNE_SIMT_LIBRARY": "",
    }
    tests = [
        TESTS / name for name in ("kernels/test_ops.py", "kernels/test_linear.py", "cuda/test_codes_cuda.py")
    ]
    done = processes.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "emulated", *tests], env
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    counts = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert counts and int(counts[1]) > 200, done.stdout[-4000:]
