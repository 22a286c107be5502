"""The emulated GPU of tests/simt: built when it is first asked for, from the sources as they are, and loaded."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from helpers import processes

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc/core", "csrc/cuda", "csrc/bindings", "tests/simt")


def fingerprint() -> str:
    """A hash of everything that a build depends on."""
    seen = hashlib.sha256(f"{sys.implementation.cache_tag} {sys.executable}".encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file():
                seen.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return seen.hexdigest()


def build(target: str) -> Path:
    """Builds `_simt` (the Python module) or `test_simt` (its own tests) where it is out of date; gives the folder.

    SPARSEPRUNE_SIMT_BUILD names another folder than build/simt; CMAKE_BUILD_PARALLEL_LEVEL limits the compilers.
    """
    folder = Path(os.environ.get("SPARSEPRUNE_SIMT_BUILD", ROOT / "build" / "simt"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests may share the folder
        stamp, current = folder / f".{target}.built", fingerprint()
        if not stamp.exists() or stamp.read_text() != current:
            stamp.unlink(missing_ok=True)
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            cmake = shutil.which("cmake", path=path)
            assert cmake, "these tests need cmake: pip install cmake"
            _call(cmake, "-S", ROOT / "tests" / "simt", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}")
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
            _call(cmake, "--build", folder, "--parallel", jobs, "--target", target)
            stamp.write_text(current)
    return folder


def _call(*command: str | Path) -> None:
    done = processes.run(command)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@functools.cache
def module() -> ModuleType:
    """The module `_simt`, built if need be; or the one that SPARSEPRUNE_SIMT_LIBRARY names, as it is."""
    given = os.environ.get("SPARSEPRUNE_SIMT_LIBRARY")
    (library,) = [Path(given)] if given else build("_simt").glob("_simt*.so")
    spec = importlib.util.spec_from_file_location("_simt", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
