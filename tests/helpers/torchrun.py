"""A script in several processes that torch.distributed knows of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def torchrun(script: str, folder: str | Path, *arguments: str | Path, processes: int = 2) -> str:
    """Runs the text `script`, kept in `folder`, its first argument, in `processes` processes; gives what they print."""
    path = Path(folder) / "script.py"
    path.write_text(script)
    places = [TESTS, *TESTS.iterdir()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*(str(it) for it in places if it.is_dir()), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(path), str(folder), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
