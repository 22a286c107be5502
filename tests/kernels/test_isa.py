"""SPARSEPRUNE_ISA and isa(): each level in a process of its own, since the variable is read once.

What a CPU or a build lacks is shown by tests/cpp (test_isa.cpp), where the operating system can refuse AMX and the
build can be of one level; see test_cpp.py.
"""

from __future__ import annotations

import subprocess

import pytest
import torch
from helpers import processes
from helpers.isa import LEVELS, forced

import sparseprune
from sparseprune.kernels import _core

KNOWN = ["scalar", "avx2", "avx512", "avx512_vbmi2", "avx512_bf16", "amx"]


def python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    return processes.python(code, {"SPARSEPRUNE_ISA": isa})


MULTIPLY = """
import os, sys, torch, sparseprune
from sparseprune import ops

def multiply():
    w = (torch.arange(20 * 36) % 5).reshape(20, 36).bfloat16()
    values, bits = ops.dense_to_bitmap(w)
    x = (torch.arange(3 * 36) % 7).reshape(3, 36).bfloat16()
    out = ops.linear(x, ops.pack(values, bits, 36, "tile"), None)
    assert torch.equal(out, (x.double() @ w.double().t()).bfloat16())
    return sparseprune.isa()

for wanted in [*WANTED, None]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        if wanted is not None:
            os.environ["SPARSEPRUNE_ISA"] = wanted
        print(repr(wanted), multiply(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, wanted
"""


@pytest.fixture(scope="module")
def served() -> dict[str, str]:
    """The variable's value -> the level that served: torch is imported once, the variable read in a fork for each."""
    done = python(f"WANTED = {[*LEVELS, '']!r}\n{MULTIPLY}", None)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_forces_a_level(level, served):
    assert served[repr(level)] == level


@pytest.mark.parametrize("isa", [None, ""])
def test_the_best_level_serves_without_it(isa, served):
    assert served[repr(isa)] == LEVELS[-1]


def test_an_unknown_level_is_an_error_that_lists_the_known_ones():
    # An import must not fail: the first kernel does.
    code = (
        "import torch\nfrom sparseprune import isa, ops\n"
        "for call in (isa, lambda: ops.dense_to_bitmap(torch.ones(2, 2)), isa):\n"
        "    try:\n        call()\n    except ValueError as error:\n        print(error)\n"
    )
    done = python(code, "avx1024")
    message = (
        "SPARSEPRUNE_ISA: must be one of scalar, avx2, avx512, avx512_vbmi2, avx512_bf16, amx, got 'avx1024'"
    )
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [message] * 3, "")


def test_names_are_exact():
    for name in ("AVX2", " avx2", "sse2", "avx"):
        with pytest.raises(ValueError, match=f"must be one of .*, got '{name}'"):
            _core.set_isa(name)
    assert sparseprune.isa() in LEVELS


@pytest.mark.parametrize("level", KNOWN)
def test_every_known_level_runs_or_says_what_is_missing(level):
    before = sparseprune.isa()
    if level in LEVELS:
        with forced(level):
            assert sparseprune.isa() == level
    else:
        lacks = "this CPU or its OS lacks" if level in _core.isas_built() else "this build has no kernels for"
        with pytest.raises(ValueError, match=f"SPARSEPRUNE_ISA: {lacks} '{level}'"):
            _core.set_isa(level)
    assert sparseprune.isa() == before


def test_levels_are_what_linux_says_of_the_cpu():
    """The flags of /proc/cpuinfo are the kernel's own reading of CPUID and XCR0."""
    with open("/proc/cpuinfo") as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    needs = {
        "scalar": set(),
        "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "avx512_vbmi2": {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    expected = []
    for level in KNOWN:
        if level not in _core.isas_built() or not needs[level] <= flags:
            break
        expected.append(level)
    assert sparseprune.isas_available() == expected
    assert torch.__version__  # torch is imported first, and its threads are in use
