"""The page of a run, from its record alone: run.py --render RECORD makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check.judge import judge_linear, judge_mask, score
from gpu_check.picture import draw
from gpu_check.record import write_by_rename

Data = Mapping[str, Any]


def write(data: Data, record: Path) -> None:
    """The page and the picture beside the record."""
    picture = record.with_suffix(".svg")
    has_picture = bool(data["linears"])
    if has_picture:
        write_by_rename(picture, draw(data))
    write_by_rename(record.with_suffix(".md"), page(data, picture.name if has_picture else None))


def page(data: Data, picture: str | None) -> str:
    parts = [_heading(data), _steps(data)]
    if data["linears"] or data["masks"] or data["conversions"]:
        if not data["dry_run"]:
            parts.append(
                f"**{score(data)}**; CUDA graphs between events, calls in turn on rotated memory, medians."
            )
        if picture:
            parts.append(f"![times as fast as torch dense, by batch size]({picture})")
        parts += _linears(data)
        parts += _masks(data)
        parts += _conversions(data)
        parts += _choices(data)
    parts += _left_out(data)
    return "\n\n".join(part for part in parts if part) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _heading(data: Data) -> str:
    environment = data["environment"]
    cards, device = environment.get("cards", []), environment.get("device", {})
    name = device.get("name") or (cards[0]["name"] if cards else "no card")
    title = f"# GPU check: {name}"
    if data["dry_run"]:
        title = "# GPU check, dry run\n\nNo kernel ran on a GPU and no number here says anything about one."
    facts = [data["started"]]
    if cards:
        card = cards[0]
        facts.append(f"driver {card.get('driver')}, compute capability {card.get('compute_capability')}")
        facts.append(
            f"clocks up to {card.get('max_sm_clock')} (SM) and {card.get('max_memory_clock')} (memory), "
            f"power limit {card.get('power_limit')}"
        )
    if environment.get("clocks"):
        sm, memory = (
            ", ".join(dict.fromkeys(it[key] for it in environment["clocks"] if key in it))
            for key in ("sm_clock", "memory_clock")
        )
        facts.append(f"while measuring {sm} (SM) and {memory} (memory)")
    if device.get("copy_gb_s"):
        peak = f" (peak {device['peak_gb_s']:.0f})" if device.get("peak_gb_s") else ""
        facts.append(f"copies at {device['copy_gb_s']:.0f} GB/s{peak}")
    packages = environment.get("packages", {})
    facts.append(
        f"nvcc {environment.get('nvcc')}, torch {packages.get('torch')}, Python {environment.get('python')}"
    )
    return f"{title}\n\n{'; '.join(facts)}."


def _steps(data: Data) -> str:
    rows = [
        (it["name"], it["state"], f"{it['seconds']:.1f}" if "seconds" in it else None, it.get("summary", ""))
        for it in data["steps"]
    ]
    return table(("step", "state", "seconds", ""), rows)


def _linears(data: Data) -> list[str]:
    device = data["environment"].get("device", {})
    parts = []
    groups = dict.fromkeys(
        (it["format"], it["dtype"], it["layer"], tuple(it["shape"])) for it in data["linears"]
    )
    for form, dtype, layer, shape in groups:
        cells = [
            it for it in data["linears"] if (it["format"], it["dtype"], it["layer"]) == (form, dtype, layer)
        ]
        rows = []
        for it in sorted(cells, key=lambda it: it["batch"]):
            verdict = None
            if not data["dry_run"]:
                verdict = judge_linear(it, device.get("compute_capability"), device.get("copy_gb_s"))
            seconds = it["seconds"]
            rows.append(
                (
                    it["batch"], _us(seconds["dense"]), _us(seconds["ours"]), f"{it['speedup']:.2f}",
                    *(_us(seconds.get(name)) for name in _vendors(cells)), _ratio(it["over_vendor"]), f"{it['gb_s']:.0f}",
                    f"{it['dense_equivalent_tflop_s']:.1f}", f"{seconds['ours']['host'] * 1e6:.1f}",
                    f"{seconds['dense']['host'] * 1e6:.1f}", it["config"], verdict and verdict.target,
                    "WRONG" if it["wrong"] else _mark(verdict and verdict.reached),
                )
            )  # fmt: skip
        heads = (
            "batch", "dense us", "ours us", "speed-up", *(f"{it} us" for it in _vendors(cells)), "over torch's 2:4", "GB/s",
            "dense-eq. TFLOP/s", "host us, ours", "host us, dense", "kernel", "target", "reached",
        )  # fmt: skip
        parts.append(f"## {layer} {shape[0]}x{shape[1]}, {form} {dtype}\n\n{table(heads, rows)}")
    return parts


def _vendors(cells: Sequence[Data]) -> list[str]:
    return sorted({name for it in cells for name in it["seconds"] if name.startswith("torch ")})


def _masks(data: Data) -> list[str]:
    if not data["masks"]:
        return []
    rows = []
    for it in data["masks"]:
        verdict = judge_mask(it)
        for name, share in it["copy_shares"].items():
            reached = _mark(verdict.reached) if name == "mask_apply_packed_" and not data["dry_run"] else None
            rows.append((it["dtype"], "x".join(map(str, it["shape"])), name, _us(it["seconds"][name]), f"{share:.0%}",
                         "WRONG" if it["wrong"] else reached))  # fmt: skip
    heads = ("dtype", "shape", "", "us", "of the rate of copy_", "all at 80 %")
    return [f"## Masks, in place\n\n{table(heads, rows)}"]


def _conversions(data: Data) -> list[str]:
    if not data["conversions"]:
        return []
    copy = data["environment"].get("device", {}).get("copy_gb_s")
    rows = [
        (
            it["dtype"], f"{it['sparsity']:.0%}", "x".join(map(str, it["shape"])), name, _us(it["seconds"][name]), f"{rate:.0f}",
            f"{rate / copy:.0%}" if copy else None, "WRONG" if it["wrong"] else None,
        )
        for it in data["conversions"]
        for name, rate in it["gb_s"].items()
    ]  # fmt: skip
    heads = ("dtype", "zeros", "shape", "", "us", "GB/s", "of copy", "")
    return [f"## CSR (with the wait for the number of values)\n\n{table(heads, rows)}"]


def _choices(data: Data) -> list[str]:
    if not data["choices"]:
        return []
    rows = [
        (it["layer"], it["format"], it["batch"], it["planned"], it["best"], f"{it['best_over_planned']:.2f}")
        for it in data["choices"]
    ]
    heads = ("layer", "format", "batch", "the plan's", "the fastest", "faster by")
    return [f"## The plan against every configuration\n\n{table(heads, rows)}"]


def _left_out(data: Data) -> list[str]:
    parts = []
    if data["left_out"]:
        lines = [f"- {it['what']}: {it['why']}" for it in data["left_out"]]
        parts.append("## Left out\n\n" + "\n".join(lines))
    notes = [*data["notes"], *_errors(data)]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    return parts


def _errors(data: Data) -> list[str]:
    found = dict.fromkeys(
        f"{name}: {error}" for it in data["linears"] for name, error in it.get("errors", {}).items()
    )
    eager = dict.fromkeys(
        f"{name} is timed without a graph ({timing['eager']})"
        for key in ("linears", "masks")
        for it in data[key]
        for name, timing in it["seconds"].items()
        if timing["eager"]
    )
    return [*found, *eager]


def _us(timing: Data | None) -> str | None:
    return None if timing is None else f"{timing['median'] * 1e6:.1f}"


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _mark(reached: bool | None) -> str | None:
    return None if reached is None else ("yes" if reached else "NO")
