"""The picture of a run as SVG, written by hand: a machine with a card need not have a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 380, 300, 48, 56, 44
_COLORS = {"ours": "#1f77b4", "torch cusparselt": "#d62728", "torch cutlass": "#ff7f0e"}
_TICKS = (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8)


def draw(data: Mapping[str, Any]) -> str:
    """Times as fast as torch dense against batch size, a panel for each layer, format and dtype."""
    panels = list(dict.fromkeys((it["layer"], it["format"], it["dtype"]) for it in data["linears"]))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = columns * _WIDTH, rows * _HEIGHT + 40
    device = data["environment"].get("device", {}).get("name", "")
    title = (
        f"{device}: times as fast as torch dense" if not data["dry_run"] else "dry run: no numbers of a GPU"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index, (layer, form, dtype) in enumerate(panels):
        cells = [
            it for it in data["linears"] if (it["layer"], it["format"], it["dtype"]) == (layer, form, dtype)
        ]
        x, y = index % columns * _WIDTH, index // columns * _HEIGHT + 30
        parts.append(f'<g transform="translate({x},{y})">{_panel(cells, f"{layer}, {form} {dtype}")}</g>')
    return "\n".join([*parts, "</svg>\n"])


def speedups(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(batch, times as fast as dense) of each candidate, by batch."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for it in sorted(cells, key=lambda it: it["batch"]):
        for name, timing in it["seconds"].items():
            if name != "dense":
                lines.setdefault(name, []).append(
                    (it["batch"], it["seconds"]["dense"]["median"] / timing["median"])
                )
    return lines


def _panel(cells: Sequence[Mapping[str, Any]], title: str) -> str:
    lines = speedups(cells)
    values = [1.0, *(value for points in lines.values() for _, value in points)]
    low, high = math.log2(min(values)) - 0.2, math.log2(max(values)) + 0.2
    last = max(1.0, math.log2(max(it["batch"] for it in cells)))
    right, bottom = _WIDTH - 12, _HEIGHT - _BOTTOM

    def at(batch: float, value: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * math.log2(batch) / last
        return x, bottom - (bottom - _TOP) * (math.log2(value) - low) / (high - low)

    parts = [f'<text x="{_LEFT}" y="{_TOP - 34}" font-size="12">{escape(title)}</text>']
    for tick in _TICKS:
        if low <= math.log2(tick) <= high:
            y = at(1, tick)[1]
            color = "black" if tick == 1 else "#ddd"
            parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}x</text>')
    for batch in sorted({it["batch"] for it in cells}):
        x = at(batch, 1)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" font-size="9">{batch}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{bottom + 30}" text-anchor="middle">batch</text>')
    for index, (name, points) in enumerate(lines.items()):
        color = _COLORS.get(name, "#555")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            for x, y in (at(*point) for point in points)
        ]
        parts.append(f'<text x="{_LEFT + 110 * index}" y="{_TOP - 18}" fill="{color}">{escape(name)}</text>')
    return "".join(parts)
