"""Builds, tests, checks and times the CUDA kernels on the card of this machine, in less than ten minutes, without a network.

python benchmarks/gpu_check/run.py             # needs a card, nvcc, cmake, and torch, pybind11, pytest for this Python
python benchmarks/gpu_check/run.py --dry-run   # as far as a machine without a card goes; says what it left out and why
python benchmarks/gpu_check/run.py --render build/gpu-check/gpu-check.json   # the page of a run that was killed

The record (JSON), the page (Markdown) and the picture (SVG) are written as the run goes: a cut loses what was to come.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_check import report
from gpu_check.build import ROOT
from gpu_check.record import Budget, Record
from gpu_check.steps import Check, clear

SECONDS = 570.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build, test and time the CUDA kernels on this machine's card."
    )
    parser.add_argument("--dry-run", action="store_true", help="as far as a machine without a card goes")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one a core)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-check", help="of the build")
    parser.add_argument("--out", type=Path, help="the record, .json (default: FOLDER/gpu-check.json)")
    parser.add_argument(
        "--render", type=Path, help="only write the page and the picture of this record again"
    )
    options = parser.parse_args(arguments)
    if options.render is not None:
        report.write(json.loads(options.render.read_text()), options.render)
        return 0
    name = "gpu-check-dry.json" if options.dry_run else "gpu-check.json"
    path = (options.folder / name if options.out is None else options.out).resolve()
    budget = Budget(options.seconds)
    clear(options.folder)
    check = Check(
        options.folder.resolve(),
        Record(path, options.dry_run, options.seconds),
        budget,
        options.dry_run,
        options.jobs,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        well = check.all()
    except KeyboardInterrupt:
        check.interrupted()
        well = False
    for item in check.record.data["left_out"]:
        print(f"left out: {item['what']}: {item['why']}")
    print(f"{path.with_suffix('.md')}, after {budget.spent():.0f} s")
    return 0 if well else 1


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
