"""Puts what the scripts of this folder measured into docs/quality.md, between the comments that name the tables.

python benchmarks/quality/page.py docs
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from methods import METHODS, PATTERNS

Results = Mapping[str, Any]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods_table(results: Results) -> str:
    """One row per method: perplexity (ratio to dense), minutes, for each pattern."""
    dense = results["dense"]["dense"]["perplexity"]
    rows = []
    for method in METHODS:
        cells = [results.get(pattern, {}).get(method) for pattern in PATTERNS]
        if not any(cells):
            continue
        texts = [
            ""
            if it is None
            else f"{_number(it['perplexity'])} ({it['perplexity'] / dense:.3g}x), {_minutes(it['seconds'])}"
            for it in cells
        ]
        memory = [it["memory"] for it in cells if it and "memory" in it]
        rows.append([method, *texts, f"{max(memory) / 1e9:.1f} GB" if memory else ""])
    header = ["method", *PATTERNS, "peak memory"]
    return f"Dense: {dense:.2f}. {results['protocol']}.\n\n{markdown(header, rows)}"


def recovery_table(results: Results) -> str:
    rows = []
    for pattern, found in results.items():
        if pattern not in PATTERNS:
            continue
        time = _minutes(found["prune_seconds"])
        rows.append([pattern, "auto, one-shot", f"{found['pruned']:.2f}", time, "", "", ""])
        for arm, it in found.items():
            if isinstance(it, dict):
                distance = [f"{it['kl']:.3f}", f"{it['agreement']:.1%}"] if "kl" in it else ["", ""]
                time = _minutes(it["seconds"])
                rows.append([pattern, arm, f"{it['perplexity']:.2f}", time, str(it["steps"]), *distance])
    header = ["pattern", "what", "perplexity", "time", "steps", "KL to the dense model", "top-1 agreement"]
    return markdown(header, rows)


def structured_table(results: Results) -> str:
    dense = results["dense"]
    header = [
        "cut out",
        "perplexity",
        "recovered",
        "parameters",
        "decoding, tokens/s",
        "prompt of 512, tokens/s",
    ]
    rows = []
    for name, it in results.items():
        if not isinstance(it, dict):
            continue
        size = f"{it['parameters'] / 1e6:.1f} M ({it['parameters'] / dense['parameters']:.2f}x)"
        before, after = (it["perplexity"], None) if name == "dense" else (it["pruned"], it["perplexity"])
        rows.append(
            [
                name, _number(before), "" if after is None else f"{after:.2f}", size,
                f"{it['decode']:.1f}", f"{it['prompt']:.0f}",
            ]
        )  # fmt: skip
    return f"{results['minutes of recovery']:g} minutes of distillation each.\n\n{markdown(header, rows)}"


def search_table(results: Results) -> str:
    rows = []
    for sparsity, methods in results.items():
        for method, cells in methods.items():
            uniform = cells["uniform"]["perplexity"]
            for allocation, it in cells.items():
                rows.append(
                    [
                        f"{method}, {sparsity}, {allocation}", f"{it['perplexity']:.2f}",
                        f"{it['perplexity'] / uniform - 1:+.1%}", f"{it['bytes'] / 2**20:.1f} MiB", _minutes(it["seconds"]),
                    ]
                )  # fmt: skip
    return markdown(["allocation", "perplexity", "against uniform", "linears packed", "time"], rows)


def schedules_table(results: Results) -> str:
    parts = []
    if "language model" in results:
        rows = [[name, f"{value:.2f}"] for name, value in results["language model"].items()]
        parts.append(markdown(["magnitude, 40 % zeros", "perplexity"], rows))
    lottery = results["lottery"]
    rows = [["dense", "0 %", f"{lottery['dense']:.1%}"]]
    rows += [["ticket", f"{zeros:.0%}", f"{accuracy:.1%}"] for zeros, accuracy in lottery["tickets"]]
    rows.append(
        ["the last ticket's mask on new weights", "90 %", f"{lottery['the last mask on new weights']:.1%}"]
    )
    parts.append(
        "An LSTM classifier trained from scratch to tell the two texts apart by windows of 32 tokens; accuracy on "
        f"{lottery['test windows']} other windows.\n\n{markdown(['classifier', 'zeros', 'accuracy'], rows)}"
    )
    return "\n\n".join(parts)


def draw(results: Results, dense: float, path: Path) -> None:
    """Perplexity over minutes of recovery, one panel per pattern."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    patterns = [it for it in results if it in PATTERNS]
    figure, axes = pyplot.subplots(1, len(patterns), figsize=(5.2 * len(patterns), 3.8), squeeze=False)
    for axis, pattern in zip(axes[0], patterns, strict=True):
        for name, arm in results[pattern].items():
            if isinstance(arm, dict):
                minutes = [seconds / 60 for seconds, _, _ in arm["curve"]]
                axis.plot(minutes, [value for *_, value in arm["curve"]], marker=".", label=name)
        axis.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense, 16 windows")
        axis.set_title(f"{pattern}, SmolLM2-135M-Instruct")
        axis.set_xlabel("minutes of recovery, 2 cores")
        axis.set_ylabel("perplexity, 4 windows, bfloat16")
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


TABLES: dict[str, Callable[[Results], str]] = {
    "methods": methods_table,
    "recovery": recovery_table,
    "structured": structured_table,
    "search": search_table,
    "schedules": schedules_table,
}


def main(docs: Path) -> None:
    page = docs / "quality.md"
    text = page.read_text(encoding="utf-8")
    found = {
        it: json.loads((docs / f"quality-{it}.json").read_text())
        for it in TABLES
        if (docs / f"quality-{it}.json").exists()
    }
    for pattern, run in found.get("recovery", {}).items():
        # the runs that recovery started from are `auto`'s where that table has none of its own
        if pattern in PATTERNS and "methods" in found:
            cell = {"perplexity": run["pruned"], "seconds": run["prune_seconds"]}
            found["methods"].setdefault(pattern, {}).setdefault("auto", cell)
    for name, results in found.items():
        section = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not section.search(text):
            sys.exit(f"{page} has no section {name}")
        table = TABLES[name](results)
        text = section.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")
    if "recovery" in found and "methods" in found:
        draw(
            found["recovery"], found["methods"]["dense"]["dense"]["perplexity"], docs / "quality-recovery.png"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
