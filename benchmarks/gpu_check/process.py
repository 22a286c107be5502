"""Child processes with a time limit, their output read line by line while they run."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_LINES = 60
_GRACE_SECONDS = 3.0  # between asking a child to end and making it


@dataclass(frozen=True)
class Finished:
    """How a child ended: `code` is None if it was cut at its limit; `tail` the end of its output."""

    code: int | None
    seconds: float
    tail: str

    @property
    def state(self) -> str:
        return {0: "done", None: "cut"}.get(self.code, "failed")


def stream(
    command: Sequence[str | Path],
    seconds: float,
    on_line: Callable[[str], None] = lambda line: None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Finished:
    """Runs `command` for at most `seconds` of `clock`; `on_line` gets every line of its output at once.

    The child has a session of its own and is ended with all that it started, also when this process is interrupted.
    """
    begin = clock()
    child = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
    reader.start()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    cut = False
    try:
        while True:
            try:
                left = begin + seconds - clock()
                if left <= 0:
                    raise queue.Empty
                line = lines.get(timeout=left)
            except queue.Empty:
                cut = True
                break
            if line is None:
                break
            tail.append(line)
            on_line(line)
        if not cut:
            try:
                child.wait(timeout=max(_GRACE_SECONDS, begin + seconds - clock()))
            except subprocess.TimeoutExpired:
                cut = True
    finally:
        _end(child)
    return Finished(None if cut else child.returncode, clock() - begin, "\n".join(tail))


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with child.stdout as output:
        for line in output:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _end(child: subprocess.Popen[str]) -> None:
    """Ends the child's session, if any of it is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        os.killpg(child.pid, number)
        try:
            child.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    child.wait()
