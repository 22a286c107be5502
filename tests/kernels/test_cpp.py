"""The C++ tests of tests/cpp, built and run: a machine that builds the extension has a compiler, so nothing is skipped."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import processes

from sparseprune.kernels import _core

SOURCE = Path(__file__).resolve().parents[1] / "cpp"


def call(*command: str | Path, **env: str) -> str:
    done = processes.run(command, env)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def build(folder: Path, *targets: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "these tests need cmake: pip install cmake"
    call(cmake, "-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=None")
    call(cmake, "--build", folder, "--parallel", str(os.cpu_count()), "--target", *targets)


def passed(output: str) -> int:
    counts = re.fullmatch(r"(\d+) passed, 0 failed", output.splitlines()[-1])
    assert counts, output
    return int(counts[1])


def test_levels_that_a_build_or_a_cpu_lacks(tmp_path):
    build(tmp_path, "test_isa_refused", "test_isa_scalar_build")
    env = {"SPARSEPRUNE_ISA": ""}
    refused = call(tmp_path / "test_isa_refused", **env)
    assert passed(refused) >= 6
    if "avx2" in _core.isas_built():
        assert "this CPU or its OS lacks 'amx' (AMX-TILE, AMX-BF16); available here: scalar" in refused
    scalar = call(tmp_path / "test_isa_scalar_build", **env)
    assert passed(scalar) == 21
    assert "this build has no kernels for 'avx512' (it needs x86-64); built: scalar" in scalar


def test_levels_share_no_function(tmp_path):
    # Unoptimised, so that nothing is inlined away: of a function two levels' units define, the linker keeps one copy,
    # perhaps the one with instructions that this CPU lacks.
    build(tmp_path, "test_isa_refused")
    units = [path for path in tmp_path.rglob("table.cpp.o") if path.parent.name in _core.isas_built()]
    assert len(units) == len(_core.isas_built())
    for unit in units:
        visible = re.findall(r" [TWi] (.*)", call("nm", "-C", unit))
        assert visible == [f"sparseprune::{unit.parent.name}::install(sparseprune::KernelTable&)"]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "least"), [("test_kernels", 20000), ("test_codes", 2000)])
def test_every_kernel_under_sanitizers(tmp_path, program, least):
    build(tmp_path, program)
    output = call(tmp_path / program, OMP_NUM_THREADS="2", UBSAN_OPTIONS="print_stacktrace=1")
    assert passed(output) > least * len(_core.isas_available())
    for level in _core.isas_available():
        assert re.search(rf"^{level}: \d+ checks$", output, re.MULTILINE), output
