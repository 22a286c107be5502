"""llama.cpp's tools, compiled for this CPU from the source package of llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "llama-cpp-python"
_SUFFIX = ".tar.gz"
TARGETS = ("llama-bench", "llama-quantize", "llama-perplexity")

# -march=native, and nothing that is not needed for the three tools.
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "GGML_NATIVE": "ON", "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_SERVER": "OFF", "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF",
}  # fmt: skip


def build(cache: Path) -> Path:
    """The folder of the tools, below `cache`; the first time this downloads 77 MB and compiles for 8 minutes on 2 cores.

    Raises:
        subprocess.CalledProcessError: pip, cmake or ninja (which must be on the PATH) failed; see what it printed.
    """
    tools = cache / "build" / "bin"
    if all((tools / name).is_file() for name in TARGETS):
        return tools
    source = _source(cache)
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    _run("cmake", "-G", "Ninja", "-S", source, "-B", cache / "build", *options)
    _run("ninja", "-C", cache / "build", *TARGETS)
    return tools


def _source(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    if not _archives(cache):
        _run(
            sys.executable, "-m", "pip", "download", "--no-binary", PACKAGE, "--no-deps", "-d", cache, PACKAGE
        )
    file = _archive(cache)
    folder = cache / file.name.removesuffix(_SUFFIX)
    if not folder.is_dir():
        with tarfile.open(file) as archive:
            archive.extractall(cache, filter="data")
    return folder / "vendor" / "llama.cpp"


def _run(*command: object) -> None:
    subprocess.run([str(it) for it in command], check=True)


def version(cache: Path) -> str:
    """Name and version of the package that was built.

    Raises:
        ValueError: there is not exactly one source package in `cache`.
    """
    return _archive(cache).name.removesuffix(_SUFFIX).replace("_", "-")


def _archives(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"{PACKAGE.replace('-', '_')}-*{_SUFFIX}"))


def _archive(cache: Path) -> Path:
    found = _archives(cache)
    if len(found) != 1:
        names = ", ".join(it.name for it in found) or "none"
        raise ValueError(
            f"cache: must hold one source package of {PACKAGE}, which its tools are built from, {cache} has {names}; "
            "name another folder"
        )
    return found[0]
