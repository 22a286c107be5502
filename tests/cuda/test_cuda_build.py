"""cmake/cuda.cmake: CUDA is found where it works, left out with a line that says why, or an error that says what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers import processes

CMAKE = Path(__file__).resolve().parents[2] / "cmake" / "cuda.cmake"
PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(probe LANGUAGES CXX)
include({CMAKE})
sparseprune_find_cuda()
message(STATUS "has CUDA: ${{SPARSEPRUNE_HAS_CUDA}}")
"""


def toolkit(folder: Path, words: str) -> Path:
    """A toolkit whose nvcc says `words` and fails; the folder that holds bin/."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{words}' >&2\necho 'and more' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return folder


def configure(
    tmp_path: Path, *options: str, python: str = sys.executable, cards: str = ""
) -> tuple[int, str]:
    """Exit status and output, on one line: CMake breaks the lines of errors. `cards`: what nvidia-smi says."""
    smi = tmp_path / "path" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\nprintf '{cards}'\n")
    smi.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(PROJECT)
    path = os.pathsep.join([str(smi.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"CUDACXX": None, "CUDA_HOME": None, "CUDA_PATH": None, "PATH": path}
    command = ["cmake", "-S", str(source), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={python}"]
    done = processes.run([*command, *options], env)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_off_needs_nothing(tmp_path):
    code, output = configure(tmp_path, "-DSPARSEPRUNE_CUDA=OFF")
    assert code == 0
    assert "sparseprune: CUDA left out, the build is for CPUs: SPARSEPRUNE_CUDA=OFF" in output
    assert "has CUDA: OFF" in output


def test_auto_builds_for_no_card_that_is_not_there(tmp_path):
    root = toolkit(tmp_path / "toolkit", "nvcc was called")
    code, output = configure(tmp_path, f"-DSPARSEPRUNE_CUDA_ROOT={root}")
    assert code == 0 and "has CUDA: OFF" in output and "nvcc was called" not in output
    assert "this machine has no NVIDIA card (SPARSEPRUNE_CUDA=ON builds for every card" in output


def test_auto_asks_nvcc_where_there_is_a_card(tmp_path):
    root = toolkit(tmp_path / "toolkit", "nvcc was called")
    code, output = configure(tmp_path, f"-DSPARSEPRUNE_CUDA_ROOT={root}", cards="9.0\\n8.6\\n9.0\\n")
    assert code == 0 and "nvcc was called" in output and "no NVIDIA card" not in output


def test_auto_leaves_out_a_toolkit_that_does_not_work_and_says_why(tmp_path):
    root = toolkit(tmp_path / "toolkit", "unsupported GNU version")
    code, output = configure(tmp_path, f"-DSPARSEPRUNE_CUDA_ROOT={root}", cards="9.0\\n")
    assert code == 0
    expected = (
        f"CUDA left out, the build is for CPUs: {root}/bin/nvcc unsupported GNU version (SPARSEPRUNE_CUDA=ON"
    )
    assert expected in output
    assert "has CUDA: OFF" in output


def test_on_makes_it_an_error_with_all_that_nvcc_said(tmp_path):
    root = toolkit(tmp_path / "toolkit", "unsupported GNU version")
    code, output = configure(tmp_path, "-DSPARSEPRUNE_CUDA=ON", f"-DSPARSEPRUNE_CUDA_ROOT={root}")
    assert code != 0
    assert (
        f"SPARSEPRUNE_CUDA=ON: no CUDA toolkit works here. {root}/bin/nvcc unsupported GNU version and more"
        in output
    )
    assert "pip install -r cmake/nvcc-requirements.txt" in output and "-DSPARSEPRUNE_CUDA=OFF" in output


@pytest.mark.parametrize("wish", ["AUTO", "ON"])
def test_a_named_toolkit_must_be_one(tmp_path, wish):
    code, output = configure(tmp_path, f"-DSPARSEPRUNE_CUDA={wish}", f"-DSPARSEPRUNE_CUDA_ROOT={tmp_path}")
    assert code != 0
    assert f"SPARSEPRUNE_CUDA_ROOT: must hold bin/nvcc, got '{tmp_path}'" in output


def test_the_python_environment_comes_before_the_system(tmp_path):
    root = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "from the environment")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site-packages"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    code, output = configure(tmp_path, python=str(python), cards="8.6\\n")
    assert code == 0
    assert f"{root}/bin/nvcc from the environment" in output
