"""Children of a test. None is given a time that a slow or a busy machine could need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HANGS = 3600.0
"""Seconds after which a child cannot be slow any more, but must have stopped."""


def run(
    command: Sequence[object], env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `command` to its end and keeps what it says; `env` changes this process's, None takes a name out of it."""
    changed = {**os.environ, **(env or {})}
    return subprocess.run(
        list(map(str, command)),
        env={name: value for name, value in changed.items() if value is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def python(
    code: str, env: Mapping[str, str | None] | None = None, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Runs `code` on `arguments` in a Python of its own, which finds the modules that this one finds."""
    path = os.pathsep.join(place for place in sys.path if place)
    return run([sys.executable, "-c", code, *arguments], {"PYTHONPATH": path, **(env or {})})
