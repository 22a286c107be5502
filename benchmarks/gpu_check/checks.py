"""The op tests on the card, and a small part of them under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_check.build import ROOT, child, site
from gpu_check.process import Finished, stream

SELECT = "cuda and not emulat"
"""The tests of the card: tests/helpers/backends.py gives it the name cuda. None that needs the emulator."""

TWINS = "emulated"
"""The same tests on the emulated card."""

STANDINS = Path(__file__).with_name("standins")

TESTS = ("cuda/test_linear_cuda.py", "cuda/test_codes_cuda.py", "cuda/test_cuda.py", "kernels/test_linear.py", "kernels/test_ops.py",
         "weights/test_nn.py", "io/test_checkpoint.py", "kernels/test_bad_input.py", "kernels/test_library.py")  # fmt: skip
"""Those that run on a card where there is one, in the order of their value."""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
"""compute-sanitizer's, in the order of their value."""

SANITIZER_ERROR = 86
_FAILURES_KEPT = 20
_OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_COLLECTED = re.compile(r"(\d+)(?:/\d+)? tests? (?:collected|selected)|(\d+) selected")


def pytest_command(folder: Path, select: str, *options: str) -> list[str]:
    files = [str(ROOT / "tests" / name) for name in TESTS]
    return child(
        folder, "pytest", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow", "-k", select,
        *options, *files,
    )  # fmt: skip


class Outcomes:
    """Counts the outcomes of `pytest -v` while its lines come in."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.collected: int | None = None

    def line(self, text: str) -> None:
        if match := _OUTCOME.match(text):
            self.counts[match[2].lower()] += 1
            if match[2] in ("FAILED", "ERROR") and len(self.failures) < _FAILURES_KEPT:
                self.failures.append(match[1])
        elif match := _COLLECTED.search(text):
            self.collected = int(match[1] or match[2])

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "failures": self.failures, "selected": self.collected}


def without(packages: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """(what of the tests, why) cannot run for want of a package that a machine with a card may lack."""
    lacks = []
    if packages.get("hypothesis") is None:
        lacks.append(("tests on random shapes", "pip install hypothesis"))
    if packages.get("expecttest") is None:
        lacks.append(("torch.library.opcheck", "pip install expecttest"))
    return lacks


def environment_of(folder: Path, packages: Mapping[str, str | None]) -> dict[str, str]:
    path = [str(site(folder))]
    if packages.get("hypothesis") is None:
        path.append(str(STANDINS))
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "COLUMNS": "250"}


def op_tests(
    folder: Path, packages: Mapping[str, str | None], seconds: float, run: Callable[..., Finished] = stream
) -> tuple[Finished, Outcomes]:
    outcomes = Outcomes()
    select = SELECT + (" and not opcheck" if packages.get("expecttest") is None else "")
    env = environment_of(folder, packages)
    done = run(pytest_command(folder, select), seconds, outcomes.line, env=env, cwd=ROOT)
    return done, outcomes


def collect(
    folder: Path, packages: Mapping[str, str | None], seconds: float, run: Callable[..., Finished] = stream
) -> tuple[Finished, Outcomes]:
    """Which tests there are; those of a card are only made where there is one, so their emulated twins are counted."""
    outcomes = Outcomes()
    env = environment_of(folder, packages)
    done = run(
        pytest_command(folder, TWINS, "--collect-only", "-q"), seconds, outcomes.line, env=env, cwd=ROOT
    )
    return done, outcomes


def sanitizer_command(folder: Path, tool: str) -> list[str]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), "--report-api-errors", "no",
        *child(folder, "gpu_check.small_part"),
    ]  # fmt: skip


def sanitize(
    folder: Path, tool: str, seconds: float, run: Callable[..., Finished] = stream
) -> dict[str, Any]:
    """One tool's verdict. `errors` are the lines in which it names what it found."""
    found: list[str] = []

    def line(text: str) -> None:
        if text.startswith("=========") and len(found) < 4 * _FAILURES_KEPT:
            found.append(text.removeprefix("=========").strip())

    # Every tensor its own allocation: the caching allocator would hide an access past the end.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    done = run(sanitizer_command(folder, tool), seconds, line, env=env, cwd=ROOT)
    report = {"tool": tool, "state": done.state, "seconds": done.seconds}
    if done.state == "failed":
        report["errors"] = found if done.code == SANITIZER_ERROR else done.tail.splitlines()[-10:]
    return report


def sanitizer_is_here() -> bool:
    return shutil.which("compute-sanitizer") is not None
