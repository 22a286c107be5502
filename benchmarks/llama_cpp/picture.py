"""The picture of a run: tokens per second and perplexity over the bytes of the file, llama.cpp's files beside our forms.

python benchmarks/llama_cpp/picture.py docs/benchmarks-llama-cpp.json docs/benchmarks-llama-cpp.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERIES = (
    ("llama.cpp", "decode", "llama.cpp", "tab:orange", "s"),
    ("sparseprune", "decode", "sparseprune, transformers' generate", "tab:blue", "o"),
    ("sparseprune", "compiled", "sparseprune, compiled steps", "tab:green", "^"),
)
"""(by, which speed, label, colour, marker)."""


def draw(run: Mapping[str, Any], path: Path) -> None:
    """Two panels over megabytes of the file: tokens per second (decode, batch 1), and perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "sparseprune"  # the same file for the same numbers
    figure, (speed, quality) = pyplot.subplots(1, 2, figsize=(12, 5.2))
    letters = {(it["by"], it["form"]): chr(ord("a") + index) for index, it in enumerate(run["records"])}
    for by, what, label, color, marker in SERIES:
        style = {"color": color, "marker": marker, "linestyle": "none"}
        panels = ((speed, what), (quality, "perplexity")) if what == "decode" else ((speed, what),)
        for axis, key in panels:
            found = points(run, by, key)
            axis.plot(
                [x for _, x, _ in found],
                [y for _, _, y in found],
                label=label if axis is speed else by,
                **style,
            )
            for form, x, y in found:
                axis.annotate(
                    letters[by, form], (x, y), textcoords="offset points", xytext=(5, 3), color=color
                )
    speed.set_ylabel("tokens per second, decoding at batch 1")
    speed.set_ylim(bottom=0)
    quality.set_ylabel("perplexity (lower is better)")
    quality.set_yscale("log")
    ticks = [10, 12, 14, 16, 20, 25, 30, 40, 50]
    quality.set_yticks(ticks, [str(it) for it in ticks], minor=False)
    for axis in (speed, quality):
        axis.set_xlabel("MB of the file")
        axis.set_xscale("log")
        axis.set_xticks([70, 80, 90, 100, 140, 200, 270], ["70", "80", "90", "100", "140", "200", "270"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    machine = run["machine"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct on {machine['cpu'].split(' [')[0]}, {machine['isa']}, {machine['threads']} threads", fontsize=10
    )  # fmt: skip
    for by, at in (("llama.cpp", 0.09), ("sparseprune", 0.05)):
        key = "    ".join(f"{letter}  {form}" for (of, form), letter in letters.items() if of == by)
        figure.text(0.02, at, f"{by}:    {key}", fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def points(run: Mapping[str, Any], by: str, key: str) -> list[tuple[str, float, float]]:
    """(form, megabytes, value) of each record that has such a value."""
    return [(it["form"], it["bytes"] / 1e6, it[key]) for it in run["records"] if it["by"] == by and key in it]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["SmolLM2"], Path(sys.argv[2]))
