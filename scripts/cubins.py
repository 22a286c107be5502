"""Reads what NVIDIA's disassembler prints of a library: resources and instructions of every kernel and architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What the kernels are built on, and what must not be in them. An instruction is its name and the suffixes that matter.
INSTRUCTIONS = {
    "HMMA.SP": r"HMMA\.SP\.",  # sparse tensor cores
    "HMMA": r"HMMA\.(?!SP\.)",
    "LDGSTS.128": r"LDGSTS\..*\b128\b",  # asynchronous copies of 16 bytes
    "LDSM": r"LDSM\.",  # ldmatrix
    "LDG.128": r"LDG\..*\b128\b",
    "STG.128": r"STG\..*\b128\b",
    "local": r"(LDL|STL)\b",  # local memory: spills, arrays indexed at run time
}


@dataclass
class Kernel:
    """One kernel for one architecture. Bytes; `stack` and `local` are of a thread, `shared` is what is declared statically."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: Counter[str] = field(default_factory=Counter)


def _by_architecture(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^arch = sm_(\w+)$", text, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def parse_resources(text: str) -> dict[tuple[str, str], Kernel]:
    """{(architecture, mangled name): kernel} from `cuobjdump -res-usage`."""
    found = {}
    for arch, part in _by_architecture(text):
        for name, usage in re.findall(r"^ *Function (\S+):\n *(REG:.*)$", part, flags=re.MULTILINE):
            number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            found[arch, name] = Kernel(number["REG"], number["STACK"], number["SHARED"], number["LOCAL"])
    return found


def parse_instructions(text: str) -> dict[tuple[str, str], Counter[str]]:
    """{(architecture, mangled name): how many of each of INSTRUCTIONS} from `cuobjdump -sass`."""
    patterns = {name: re.compile(pattern) for name, pattern in INSTRUCTIONS.items()}
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for arch, part in _by_architecture(text):
        function = ""
        for line in part.splitlines():
            if match := re.match(r"\s*Function : (\S+)", line):
                function = match[1]
                found[arch, function]["all"] = 0
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
                counts = found[arch, function]
                counts["all"] += 1
                counts.update(name for name, pattern in patterns.items() if pattern.match(match[1]))
    return dict(found)


def tool(name: str, folders: list[Path]) -> Path:
    """A CUDA binary utility, from NVIDIA's packages in this Python, next to nvcc, or on the PATH.

    Raises:
        FileNotFoundError: where it is in none of them.
    """
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    found = shutil.which(name)
    if not found:
        raise FileNotFoundError(
            f"{name}: must be installed; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return Path(found)


def read_kernels(library: Path, cuobjdump: Path, path: str) -> dict[tuple[str, str], Kernel]:
    """Every kernel of the library; `path` must hold nvdisasm."""

    def run(flag: str) -> str:
        done = subprocess.run(
            [cuobjdump, flag, library], env={"PATH": path}, capture_output=True, text=True, check=True
        )
        return done.stdout

    kernels = parse_resources(run("-res-usage"))
    for key, counts in parse_instructions(run("-sass")).items():
        kernels[key].instructions = counts
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """{mangled: readable}, without namespaces, parameters and what nvcc adds to make anonymous namespaces unique."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: shorten(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def shorten(function: str) -> str:
    """`void sparseprune::cuda::(anonymous namespace)::name<T>(...)` to `name<T>`."""
    text = re.sub(r"_GLOBAL__N__\w+", "(anonymous namespace)", function)
    text = re.sub(r"\(anonymous namespace\)::", "", text)
    text = re.sub(r"\b(sparseprune|cuda|simt)::", "", text)
    text = re.sub(r"\((?:int|unsigned int|bool|unsigned)\)(?=\d)", "", text)
    depth = 0
    for i, char in enumerate(text):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0:
            text = text[:i]
            break
    return text.removeprefix("void ").strip()
