"""The tables of a run, for the terminal and for the results page, from its JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from targets import BATCHES

from sparseprune.report import Column, Table

Run = Mapping[str, Any]


def _mark(reached: bool | None) -> str | None:
    return None if reached is None else ("yes" if reached else "NO")


def summary(run: Run, model: str) -> Table:
    """One row per case and batch size: the speed-up of each shape beside the target."""
    records = [it for it in run["linears"] if it["model"] == model]
    layers = list(dict.fromkeys(it["layer"] for it in records))
    columns: list[Column | str] = ["case", "B"]
    columns += [Column(f"{layer} {'x'.join(map(str, _shape(records, layer)))}", ".2f") for layer in layers]
    columns += [Column("target", ".1f"), "also", "reached"]
    rows = []
    for case in dict.fromkeys(it["case"] for it in records):
        for batch in BATCHES:
            cells = {it["layer"]: it for it in records if (it["case"], it["batch"]) == (case, batch)}
            if not cells:
                continue
            some = next(iter(cells.values()))
            rows.append(
                [
                    case, batch, *(cells[layer]["speedup"] if layer in cells else None for layer in layers),
                    some.get("targets", {}).get("speedup"), _also(list(cells.values())), _reached(list(cells.values())),
                ]
            )  # fmt: skip
    return Table(f"{model}: times as fast as torch dense of the same dtype", columns, rows)


def _shape(records: list[dict[str, Any]], layer: str) -> list[int]:
    return next(it["shape"] for it in records if it["layer"] == layer)


def _also(cells: list[dict[str, Any]]) -> str | None:
    """What else a row has to reach, and does at its worst."""
    targets = cells[0].get("targets", {})
    parts = []
    if "read_share" in targets:
        worst = min(it["read_share"] for it in cells)
        parts.append(f"{worst:.0%} of read bandwidth (target {targets['read_share']:.0%})")
    if "over_torch_csr" in targets:
        for name in cells[0]["torch_csr_seconds"]:
            ratios = [
                it["torch_csr_seconds"][name]["median"] / it["sparse_seconds"]["median"] for it in cells
            ]
            parts.append(f"{min(ratios):.1f}x {name} (target {targets['over_torch_csr']:.0f}x)")
    return ", ".join(parts) or None


def _reached(cells: list[dict[str, Any]]) -> str | None:
    marks = [it["reached"] for it in cells if "reached" in it]
    if not marks:
        return None
    return "yes" if all(marks) else f"{sum(marks)} of {len(marks)}" if any(marks) else "NO"


def details(run: Run, model: str) -> Table:
    """One row per measurement."""
    columns: list[Column | str] = [
        "case", "shape", "B", Column("dense ms", ".3f"), Column("ours ms", ".3f"), Column("speed-up", ".2f"),
        Column("target", ".1f"), "reached", Column("cap by reading", ".2f"), Column("GB/s", ".1f"),
        Column("of read", ".0%"), Column("dense of read", ".0%"), Column("GFLOP/s", ".0f"), Column("dense-eq. GFLOP/s", ".0f"),
        Column("dense GFLOP/s", ".0f"), Column("over torch.sparse", ".2f"), "strategy",
    ]  # fmt: skip
    rows = []
    for it in run["linears"]:
        if it["model"] != model:
            continue
        rows.append(
            (
                it["case"], tuple(it["shape"]), it["batch"], it["dense_seconds"]["median"] * 1e3,
                it["sparse_seconds"]["median"] * 1e3, it["speedup"], it.get("targets", {}).get("speedup"),
                _mark(it.get("reached")), it["read_cap"], it["gb_s"], it["read_share"], it["dense_read_share"], it["gflop_s"],
                it["dense_equivalent_gflop_s"], it["dense_gflop_s"], it.get("over_torch_csr"),
                it["strategy"],
            )
        )  # fmt: skip
    return Table(f"{model}: every measurement (medians)", columns, rows)


def losses(run: Run) -> Table:
    """Where torch dense or torch.sparse CSR wins, worst first."""
    columns: list[Column | str] = [
        "case", "model", "layer", "shape", "B", Column("over dense", ".2f"), Column("over torch.sparse", ".2f"),
        "strategy",
    ]  # fmt: skip
    worst = {id(it): min(it["speedup"], it.get("over_torch_csr", math.inf)) for it in run["linears"]}
    rows = [
        (
            it["case"], it["model"], it["layer"], tuple(it["shape"]), it["batch"], it["speedup"],
            it.get("over_torch_csr"), it["strategy"],
        )
        for it in sorted(run["linears"], key=lambda it: worst[id(it)])
        if worst[id(it)] < 1
    ]  # fmt: skip
    footer = [f"{len(rows)} of {len(run['linears'])} measurements"]
    return Table("Slower than torch dense or torch.sparse", columns, rows, footer)


def masks(run: Run) -> Table:
    names = ("w.mul_(mask)", "mask_apply_", "mask_apply_packed_", "copy_")
    columns: list[Column | str] = ["dtype", "shape", *(Column(f"{name} ms", ".1f") for name in names)]
    columns += [
        Column("bool over mul_", ".2f"), Column("packed over mul_", ".2f"), Column("target", ".1f"),
        Column("packed of copy", ".0%"), Column("target of copy", ".0%"), "reached",
    ]  # fmt: skip
    rows = [
        (
            it["dtype"], tuple(it["shape"]), *(it["seconds"][name]["median"] * 1e3 for name in names),
            it["bool_over_mul"], it["packed_over_mul"], it["targets"]["packed_over_mul"], it["copy_share"],
            it["targets"]["copy_share"], _mark(it["reached"]),
        )
        for it in run["masks"]
    ]  # fmt: skip
    return Table("Mask application in place", columns, rows)


def conversions(run: Run) -> Table:
    columns: list[Column | str] = [
        "dtype", Column("sparsity", ".0%"), "shape", Column("ours ms", ".1f"), Column("over to_sparse_csr", ".1f"),
        Column("over scipy", ".1f"), Column("target", ".0f"), "reached",
    ]  # fmt: skip
    rows = [
        (
            it["dtype"], it["sparsity"], tuple(it["shape"]), it["seconds"]["dense_to_csr"]["median"] * 1e3,
            it["over"]["to_sparse_csr"], it["over"].get("scipy"), it["targets"]["over"], _mark(it["reached"]),
        )
        for it in run["conversions"]
    ]  # fmt: skip
    return Table("Dense to CSR", columns, rows)


def sizes(run: Run) -> Table:
    columns: list[Column | str] = [
        "format", Column("sparsity", ".0%"), "dtype", "shape", Column("in memory", ".3f"), Column("saved", ".3f"),
        Column("target", ".2f"), "reached",
    ]  # fmt: skip
    rows = [
        (
            it["format"], it["sparsity"], it["dtype"], tuple(it["shape"]), it["memory"], it["saved"],
            it.get("targets", {}).get("memory"), _mark(it.get("reached")),
        )
        for it in run["sizes"]
    ]  # fmt: skip
    return Table("Bytes over dense bytes", columns, rows)


def calls(run: Run) -> Table:
    columns: list[Column | str] = [
        "dtype", "shape", "grad mode", Column("nn.Linear us", ".2f"), Column("SparseLinear us", ".2f"),
        Column("of nn.Linear", ".2f"), Column("target", ".1f"), "reached",
    ]  # fmt: skip
    rows = [
        (
            it["dtype"], tuple(it["shape"]), it["grad_mode"], it["seconds"]["nn.Linear"]["median"] * 1e6,
            it["seconds"]["SparseLinear"]["median"] * 1e6, it["of_dense"], it.get("targets", {}).get("of_dense"),
            _mark(it.get("reached")),
        )
        for it in run["calls"]
    ]  # fmt: skip
    return Table("One call of a small layer", columns, rows)


def score(run: Run) -> str:
    """How many targets a run reaches."""
    records = [it for part in ("linears", "masks", "conversions", "sizes", "calls") for it in run[part]]
    marks = [it["reached"] for it in records if "reached" in it]
    return f"{sum(marks)} of {len(marks)} targets reached; rotated weights, calls in turn, medians"


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(table: Table) -> str:
    """The table for a page, which has titles of its own; columns with nothing in them are left out."""
    columns = [it if isinstance(it, Column) else Column(it) for it in table.columns]
    filled = [any(row[index] is not None for row in table.rows) for index in range(len(columns))]
    columns = list(itertools.compress(columns, filled))
    lines = ["| " + " | ".join(it.name for it in columns) + " |", "|" + "---|" * len(columns)]
    for row in table.rows:
        cells = zip(columns, itertools.compress(row, filled), strict=True)
        lines.append("| " + " | ".join(column.text(cell) for column, cell in cells) + " |")
    return "\n".join([*lines, "", *table.footer])
