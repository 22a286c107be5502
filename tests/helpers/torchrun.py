"""A script in several processes that torch.distributed knows of."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers import processes

TESTS = Path(__file__).resolve().parents[1]


def torchrun(script: str, folder: str | Path, *arguments: str | Path) -> str:
    """Runs the text `script`, kept in `folder`, its first argument, in two processes; gives what they print."""
    path = Path(folder) / "script.py"
    path.write_text(script)
    places = [TESTS, *TESTS.iterdir()]
    environment = {
        "PYTHONPATH": os.pathsep.join([*(str(it) for it in places if it.is_dir()), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = processes.run([*command, path, folder, *arguments], environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
