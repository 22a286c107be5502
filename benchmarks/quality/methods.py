"""Every method on every pattern: perplexity, time, peak memory.

python benchmarks/quality/methods.py --calibration TEXT --text OTHER_TEXT --out docs/quality-methods.json
"""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import torch
from protocol import Protocol, arguments, read_results, setup, write_results

import sparseprune as sp
from sparseprune.memory import peak_memory

PATTERNS: dict[str, tuple[str, float | None]] = {
    "50 %": ("unstructured", 0.5),
    "2:4": ("2:4", None),
    "4:8": ("4:8", None),
    "70 %": ("unstructured", 0.7),
}
METHODS = (
    "random", "magnitude", "gradient", "taylor", "wanda", "ria", "ria+permute", "wanda+swaps", "sparsegpt",
    "wanda+swaps+least-squares", "admm", "auto",
)  # fmt: skip
# Calibration windows of 1024 tokens: gradients need a pass backwards of the whole model, `auto` learns from its text.
WINDOWS = {"random": 0, "magnitude": 0, "gradient": 8, "taylor": 8, "auto": 64}


def cell(protocol: Protocol, pattern: str, method: str, minutes: float | None) -> dict[str, Any]:
    model = copy.deepcopy(protocol.model)
    kind, sparsity = PATTERNS[pattern]
    count = WINDOWS.get(method, 32)
    data = protocol.calibration(count) if count else None
    gc.collect()
    reset_peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    limit = minutes if method == "auto" else None
    report = sp.prune(model, kind, method, sparsity=sparsity, calibration=data, minutes=limit, progress=True)
    return {
        "zeros": report.sparsity_after,
        "windows": count,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory": peak_memory(),
        "notes": list(report.notes),
        "perplexity": protocol.perplexity(model),
    }


def reset_peak_memory() -> None:
    """Linux: the high-water mark falls to what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--minutes", type=float, help="for auto")
    options = parser.parse_args()
    protocol = setup(options)
    results = read_results(options.out)
    results["protocol"] = (
        "Calibration: 32 windows of 1024 tokens, seed 0 (gradient and taylor 8, auto 64); weights bfloat16. Perplexity: "
        f"{options.windows} windows of 1024 tokens of other articles, no special tokens, {options.dtype}"
    )
    results.setdefault("dense", {"dense": {"perplexity": protocol.perplexity(protocol.model)}})
    for method in options.methods:
        for pattern in options.patterns:
            if method in results.setdefault(pattern, {}) or (
                method.endswith("+permute") and ":" not in pattern
            ):
                continue
            found = results[pattern][method] = cell(protocol, pattern, method, options.minutes)
            write_results(options.out, results)
            print(
                f"{pattern:6} {method:28} {found['perplexity']:10.2f} {found['seconds']:8.1f} s", flush=True
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
