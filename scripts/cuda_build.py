"""A build with CUDA: where it lies, how long it took, and what its launchers ask of CUDA."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")


@dataclass(frozen=True)
class Launch:
    """A launcher's request, as scripts/launches.cpp recorded it."""

    op: str
    dtype: str
    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int
    shared: int
    rows: int
    cols: int
    batch: int = 0
    config: str = ""
    splits: int = 1
    multiprocessors: int = 0  # on the card it was planned for; 0: asked for, not planned


@dataclass(frozen=True)
class Build:
    """A build folder, and what CMake found out about nvcc."""

    folder: Path
    library: Path
    objects: list[Path]
    nvcc: Path
    version: str
    include: list[Path]


def find_build(folder: Path | None) -> Build:
    """The newest build with CUDA under build/, or the one in `folder`.

    Raises:
        FileNotFoundError: where there is none.
    """
    builds = []
    for path in [folder] if folder else [cache.parent for cache in ROOT.glob("build/*/CMakeCache.txt")]:
        objects = sorted(path.glob("CMakeFiles/sparseprune_cuda.dir/csrc/cuda/**/*.o"))
        libraries = list(path.glob("_core*.so"))
        if objects and libraries:
            text = next(path.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")).read_text()
            found = dict(re.findall(r'set\(CMAKE_CUDA_(\w+) "(.*)"\)', text))
            include = [Path(part) for part in found["TOOLKIT_INCLUDE_DIRECTORIES"].split(";")]
            nvcc = Path(found["COMPILER"])
            builds.append(Build(path, libraries[0], objects, nvcc, found["COMPILER_VERSION"], include))
    if not builds:
        raise FileNotFoundError(
            f"build: must hold the extension with CUDA, found none in {folder or 'build/'}; run `make test`"
        )
    return max(builds, key=lambda build: build.library.stat().st_mtime)


def compile_seconds(log: str) -> dict[str, float]:
    """{object: seconds} of the last compilation of each, from ninja's log."""
    found = {}
    for line in log.splitlines()[1:]:
        begin, end, _, output, _ = line.split("\t")
        if output.endswith(".o"):
            found[output] = (int(end) - int(begin)) / 1000
    return found


def record_launches(build: Build) -> list[Launch]:
    """Every launcher called, on a CUDA runtime that launches nothing (scripts/launches.cpp)."""
    objects = [path for path in build.objects if path.name != "device.cpp.o"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launches"
        include = ["-I", ROOT / "csrc", *(part for path in build.include for part in ("-isystem", path))]
        sources = [ROOT / "scripts/launches.cpp", ROOT / "csrc/core/header.cpp", *objects]
        subprocess.run(["g++", *CXX_FLAGS, *include, *sources, "-o", program], check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return [Launch(**{**fields, "grid": tuple(fields["grid"])}) for fields in map(json.loads, lines)]


def worst(launches: list[Launch], mangled: str) -> tuple[int, int]:
    """(threads, shared bytes) of the largest launch of a kernel."""
    mine = [launch for launch in launches if launch.kernel == mangled]
    return max(launch.threads for launch in mine), max(launch.shared for launch in mine)


def labels(launches: list[Launch], names: dict[str, str]) -> dict[str, str]:
    """{mangled: what a kernel is called in tables}: a linear's by configuration and dtype, others as they stand in the code."""
    found = dict(names)
    for launch in launches:
        if launch.config and launch.op in names[launch.kernel]:
            found[launch.kernel] = f"{launch.op} {launch.config} {launch.dtype}"
    return found
