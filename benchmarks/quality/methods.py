"""Every method on every pattern: perplexity, minutes, peak memory. One process a cell, so that memory is the cell's own.

python benchmarks/quality/methods.py --calibration TEXT --text OTHER_TEXT --out docs/quality-methods.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from protocol import arguments, read_results, setup, write_results

import sparseprune as sp
from sparseprune.memory import peak_memory

PATTERNS: dict[str, tuple[str, float | None]] = {
    "50 %": ("unstructured", 0.5),
    "2:4": ("2:4", None),
    "4:8": ("4:8", None),
    "70 %": ("unstructured", 0.7),
}
METHODS = (
    "random", "magnitude", "gradient", "taylor", "wanda", "ria", "wanda+swaps", "sparsegpt",
    "wanda+swaps+least-squares", "admm", "auto",
)  # fmt: skip
NEEDS_NO_TEXT = ("random", "magnitude")


def cell(options: argparse.Namespace, pattern: str, method: str) -> dict[str, Any]:
    protocol = setup(options)
    if method == "dense":
        return {"perplexity": protocol.perplexity(protocol.model)}
    kind, sparsity = PATTERNS[pattern]
    before = peak_memory()
    begin = time.perf_counter()
    data = None if method in NEEDS_NO_TEXT else protocol.calibration(128 if method == "auto" else 32)
    report = sp.prune(protocol.model, kind, method, sparsity, data, progress=True)
    seconds = time.perf_counter() - begin
    return {
        "method": report.method,
        "zeros": report.sparsity_after,
        "seconds": seconds,
        "memory": peak_memory(),
        "memory_before": before,
        "notes": list(report.notes),
        "perplexity": protocol.perplexity(protocol.model),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="methods; all by default")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--cell", nargs=2, metavar=("PATTERN", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options, *options.cell)))
        return
    wanted = [("dense", "dense")]
    wanted += [(pattern, method) for method in options.only or METHODS for pattern in options.patterns]
    for pattern, method in wanted:
        if method in read_results(options.out).get(pattern, {}):
            continue
        command = [sys.executable, *sys.argv, "--cell", pattern, method]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        results = read_results(options.out)
        results.setdefault(pattern, {})[method] = found
        results["protocol"] = (
            f"calibration: 32 windows of 1024 tokens (auto: 128), seed 0, weights bfloat16; perplexity: "
            f"{options.windows} windows of 1024 tokens of other articles, float32; {torch.get_num_threads()} threads"
        )
        write_results(options.out, results)
        print(
            f"{pattern:6} {method:28} {found['perplexity']:10.2f} {found.get('seconds', 0) / 60:6.1f} min",
            flush=True,
        )


if __name__ == "__main__":
    main()
