"""llama.cpp's tools, compiled for this CPU from the source package of llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "llama-cpp-python"
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
    name = PACKAGE.replace("-", "_")
    archives = sorted(cache.glob(f"{name}-*.tar.gz"))
    if not archives:
        _run(
            sys.executable, "-m", "pip", "download", "--no-binary", PACKAGE, "--no-deps", "-d", cache, PACKAGE
        )
        archives = sorted(cache.glob(f"{name}-*.tar.gz"))
    folder = cache / archives[-1].name.removesuffix(".tar.gz")
    if not folder.is_dir():
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(cache, filter="data")
    return folder / "vendor" / "llama.cpp"


def _run(*command: object) -> None:
    subprocess.run([str(it) for it in command], check=True)


def version(cache: Path) -> str:
    """Of the package that was built."""
    return _newest(it.name for it in cache.glob(f"{PACKAGE.replace('-', '_')}-*.tar.gz"))


def _newest(names: Iterable[str]) -> str:
    return max(names, default="").removesuffix(".tar.gz").replace("_", "-")
