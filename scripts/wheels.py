#!/usr/bin/env python
"""Builds a wheel and repairs it: `python scripts/wheels.py cpu|cuda`. Prints its size, its time and its architectures.

The wheel is made by the building environment's own tools (no isolation), so that it shares the objects of an editable
build. auditwheel names the oldest Linux that it runs on and bundles nothing: libgomp is the one that torch has loaded, and
a second copy would be a second pool of threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import fatbin

ROOT = Path(__file__).resolve().parent.parent
# Of two wheels of a version installers take the higher tag.
SETTINGS = {
    "cpu": {"cmake.define.SPARSEPRUNE_CUDA": "OFF", "build-dir": "build/cpu", "wheel.build-tag": "0cpu"},
    "cuda": {
        "cmake.define.SPARSEPRUNE_CUDA": "ON",
        "cmake.define.SPARSEPRUNE_WERROR": "ON",
        "build-dir": "build/cuda",
        "wheel.build-tag": "1cuda",
    },
}


def build(kind: str, folder: Path) -> Path:
    settings = [f"-C{key}={value}" for key, value in SETTINGS[kind].items()]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--check-build-dependencies",
    ]
    subprocess.run([*command, *settings, "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def repair(wheel: Path, folder: Path) -> Path:
    """Raises:
    RuntimeError: where a library other than the extension ended up in the wheel.
    """
    before = set(folder.glob("*.whl"))
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--exclude",
        "libgomp.so.1",
        "-w",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True)  # its words are the only ones that say what it refuses
    repaired = next(iter(set(folder.glob("*.whl")) - before))
    names = zipfile.ZipFile(repaired).namelist()
    libraries = [name for name in names if ".so" in Path(name).name]
    if [str(Path(name).parent) for name in libraries] != ["sparseprune/kernels"]:
        raise RuntimeError(f"{repaired.name}: must hold one library, the extension, got {libraries}")
    return repaired


def describe(wheel: Path, seconds: float) -> dict[str, Any]:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".so"))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(archive.extract(name, folder))
        return {
            "wheel": wheel.name,
            "bytes": wheel.stat().st_size,
            "library_bytes": library.stat().st_size,
            "build_seconds": round(seconds, 1),
            "architectures": fatbin.architectures(library),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    folder = args.out / args.kind
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as raw:
        start = time.monotonic()
        wheel = build(args.kind, Path(raw))
        seconds = time.monotonic() - start
        facts = describe(repair(wheel, folder), seconds)
    (folder / "wheel.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{facts['wheel']}: {facts['bytes'] / 1e6:.1f} MB, the library {facts['library_bytes'] / 1e6:.1f} MB, "
        f"built in {seconds:.0f} s, GPU code: {', '.join(facts['architectures']) or 'none'}"
    )


if __name__ == "__main__":
    main()
