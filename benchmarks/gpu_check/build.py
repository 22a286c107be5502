"""Builds the extension for the card that is here, and lays a package out around it: an installed one stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gpu_check.process import Finished, stream

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("child.py")


def site(folder: Path) -> Path:
    """Where the package lies that children import."""
    return folder / "site"


def child(folder: Path, module: str, *arguments: str) -> list[str]:
    """The command that runs a module (`pytest`, `gpu_check.measure`) on the package built in `folder`."""
    return [sys.executable, str(CHILD), str(site(folder)), module, *arguments]


def pybind11_folder() -> str:
    return subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()


def configure_command(folder: Path, architectures: str, cuda: str) -> list[str]:
    command = [
        "cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_INSTALL_PREFIX={site(folder)}", f"-DSPARSEPRUNE_CUDA={cuda}", f"-Dpybind11_DIR={pybind11_folder()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    if cuda != "OFF":
        command.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    return command


def build(
    folder: Path,
    architectures: str,
    cuda: str,
    seconds: float,
    run: Callable[..., Finished] = stream,
    jobs: int | None = None,
) -> Finished:
    """Configures, compiles and lays out within `seconds`; the first part that does not end well is the result."""
    forget_other_source(folder / "build")
    spent = 0.0
    commands = [
        configure_command(folder, architectures, cuda),
        ["cmake", "--build", str(folder / "build"), "--parallel", str(jobs or os.cpu_count() or 1)],
        ["cmake", "--install", str(folder / "build")],
    ]
    tail: list[str] = []
    for command in commands:
        done = run(command, seconds - spent)
        spent += done.seconds
        tail.append(done.tail)
        if done.state != "done":
            return Finished(done.code, spent, done.tail)
    lay_out(folder)
    return Finished(0, spent, "\n".join(tail))


def forget_other_source(tree: Path) -> None:
    """CMake refuses a build folder that was another checkout's."""
    cache = tree / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(tree)


def lay_out(folder: Path) -> None:
    """The package's Python files beside the extension that was installed there."""
    target = site(folder) / "sparseprune"
    for path in sorted((ROOT / "sparseprune").rglob("*.py")):
        copy = target / path.relative_to(ROOT / "sparseprune")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
