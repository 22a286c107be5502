"""The picture of a run: speed-up against batch size, a panel a model and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import geometric_mean

_MARKERS = {"2:4": "o", "bitmap": "s", "csr": "^"}


def draw(run: Mapping[str, Any], path: Path) -> None:
    """One line per case (geometric mean over the model's shapes, their range shaded), its targets dotted, 1x in black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = run["linears"]
    models = list(dict.fromkeys(it["model"] for it in records))
    dtypes = [it for it in ("bf16", "fp16", "fp32") if any(record["dtype"] == it for record in records)]
    figure, axes = pyplot.subplots(
        len(models), len(dtypes), figsize=(4.8 * len(dtypes), 3.9 * len(models)), sharey="row", squeeze=False
    )
    colors = dict(
        zip(dict.fromkeys(it["case"] for it in records), pyplot.get_cmap("tab10").colors, strict=False)
    )
    for row, model in zip(axes, models, strict=True):
        for axis, dtype in zip(row, dtypes, strict=True):
            _panel(axis, [it for it in records if (it["model"], it["dtype"]) == (model, dtype)], colors)
            axis.set_title(f"{model}, {dtype}", fontsize=10)
        speedups = [it["speedup"] for it in records if it["model"] == model]
        row[0].set_ylim(min(1.0, *speedups) / 1.15, max(speedups) * 1.15)
        row[0].set_ylabel("times as fast as torch dense")
    for axis in axes[-1]:
        axis.set_xlabel("batch size (rows of activations)")
    machine = run["machine"]
    figure.suptitle(
        f"{machine['cpu'].split(' [')[0]}, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}; dotted: target, band: range over the shapes",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, records: list[dict[str, Any]], colors: Mapping[str, Any]) -> None:
    batches = sorted({it["batch"] for it in records})
    axis.axhline(1, color="black", linewidth=1)
    for case in dict.fromkeys(it["case"] for it in records):
        by_batch = {b: [it for it in records if (it["case"], it["batch"]) == (case, b)] for b in batches}
        speedups = [[it["speedup"] for it in by_batch[b]] for b in batches]
        style = {"color": colors[case]}
        means = [geometric_mean(it) for it in speedups]
        axis.plot(batches, means, marker=_MARKERS[case.split()[0]], markersize=4, label=case, **style)
        axis.fill_between(
            batches, [min(it) for it in speedups], [max(it) for it in speedups], alpha=0.15, **style
        )
        wanted = [(b, by_batch[b][0]["targets"]["speedup"]) for b in batches if "targets" in by_batch[b][0]]
        if wanted:
            axis.plot(*zip(*wanted, strict=True), linestyle=":", linewidth=1, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.set_yscale("log", base=2)
    ticks = [0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 16]
    axis.set_yticks(ticks, [f"{it:g}x" for it in ticks], minor=False)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
