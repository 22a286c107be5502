"""benchmarks/gpu_check: the targets, the page and the picture of a record."""

from __future__ import annotations

import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from helpers import gpu_check
from helpers.gpu_check import SMI

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_check import environment, report
from gpu_check.judge import judge_linear, judge_mask, score
from gpu_check.picture import draw, speedups
from gpu_check.record import Record


@pytest.fixture
def dry_messages():
    return gpu_check.dry_messages()


def cell(batch, speedup, gb_s=100.0, over=1.0, wrong=False, form="2:4", dtype="bf16", layer="qkvo"):
    seconds = {"dense": 1e-4, "ours": 1e-4 / speedup} | (
        {} if over is None else {"torch cutlass": over * 1e-4 / speedup}
    )
    timings = {
        name: {"median": it, "low": it, "high": it, "rounds": 5, "calls": 10, "host": 5e-6, "eager": ""}
        for name, it in seconds.items()
    }
    return {
        "layer": layer, "shape": [4096, 4096], "format": form, "dtype": dtype, "batch": batch, "speedup": speedup,
        "gb_s": gb_s, "dense_gb_s": 1.0, "dense_equivalent_tflop_s": 1.0, "dense_tflop_s": 1.0, "over_vendor": over,
        "config": "n8_m32_k8, splits 2", "nbytes": 1, "of_dense": 0.56, "copies": 4, "error": 0.0, "wrong": wrong, "seconds": timings, "errors": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("it", "capability", "reached"),
    [
        (cell(1, 1.5), "9.0", True),
        (cell(16, 1.49, gb_s=799), "9.0", False),
        (cell(16, 1.49, gb_s=800), "9.0", True),
        (cell(17, 0.99), "9.0", False),
        (cell(32, 1.0), "9.0", True),
        (cell(256, 0.99), "8.0", False),
        (cell(512, 1.39, over=2.0), "8.0", False),
        (cell(512, 1.4, over=0.5), "8.9", True),
        (cell(512, 0.9, over=0.95), "9.0", True),
        (cell(4096, 1.9, over=0.94), "12.0", False),
        (cell(4096, 1.9, over=None), "9.0", None),
        (cell(1, 9.0, wrong=True), "9.0", False),
        (cell(1, 2.0, form="dense int4"), "9.0", True),
        (cell(16, 1.99, form="2:4 int4"), "8.0", False),
        (cell(16, 1.4, form="2:4 int8"), "8.0", True),
        (cell(1, 9.0, form="dense int4", wrong=True), "9.0", False),
    ],
)
def test_targets_of_linears(it, capability, reached):
    assert judge_linear(it, capability, 1000.0).reached is reached


def test_what_has_no_target_is_not_judged():
    assert judge_linear(cell(1, 1.0, form="bitmap"), "9.0", 1000.0) is None
    assert judge_linear(cell(1, 1.0, dtype="fp32"), "9.0", 1000.0) is None
    assert judge_linear(cell(64, 1.0, form="dense int4"), "9.0", 1000.0) is None


def test_targets_of_masks():
    shares = dict.fromkeys(("mask_apply_packed_", "mask_apply_", "threshold_mask_"), 0.8)
    assert judge_mask({"copy_shares": {**shares, "w.mul_(mask)": 0.1}, "wrong": False}).reached
    assert not judge_mask({"copy_shares": shares, "wrong": True}).reached
    assert not judge_mask({"copy_shares": {**shares, "mask_apply_": 0.79}, "wrong": False}).reached
    assert not judge_mask({"copy_shares": {}, "wrong": False}).reached


@pytest.fixture
def data(tmp_path, dry_messages):
    """A record with some of everything."""
    record = Record(tmp_path / "r.json", dry_run=False, budget=570)
    found = environment.look(lambda command: SMI if command[0] == "nvidia-smi" else None)
    device = {"name": "NVIDIA H100", "compute_capability": "9.0", "copy_gb_s": 1000.0, "peak_gb_s": 3350.0}
    record.set(
        "environment",
        {**found, "device": device, "clocks": [{"sm_clock": "1755 MHz"}, {"sm_clock": "1980 MHz"}]},
    )
    record.step("benchmarks").update(state="done", seconds=100.0, summary="all")
    for it in (
        cell(1, 1.6),
        cell(64, 0.9),
        cell(4096, 1.5, over=None),
        cell(1, 2.0, wrong=True, layer="gate/up"),
    ):
        record.add("linears", it)
    for it in dry_messages:
        if it["kind"] in ("mask", "conversion"):
            record.add(f"{it['kind']}s", it)
    record.add("choices", {"layer": "qkvo", "format": "2:4", "batch": 1, "planned": "a, splits 1", "best": "b, splits 4",
                           "best_over_planned": 1.25})  # fmt: skip
    record.leave_out("the rest", "no time")
    return record.data


def test_the_score_counts_what_can_be_judged(data):
    assert score({**data, "masks": []}) == (
        "1 of 3 targets reached, 1 cannot be judged (torch's 2:4 does not run here); 1 results are WRONG"
    )


def test_the_page_names_the_card_the_numbers_and_what_is_missing(data):
    text = report.page(data, "r.svg")
    assert text.startswith("# GPU check: NVIDIA H100\n")
    for part in ("driver 570.86", "while measuring 1755 MHz, 1980 MHz (SM)", "copies at 1000 GB/s (peak 3350)", "![", "the rest: no time",
                 "| a, splits 1 | b, splits 4 | 1.25 |"):  # fmt: skip
        assert part in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 |"))
    assert "| 0.90 |" in row and row.endswith("| not slower than dense | NO |")
    assert "| WRONG |" in text and "torch cutlass us" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_page_of_a_dry_run_claims_nothing(data):
    text = report.page({**data, "dry_run": True}, None)
    assert "No kernel ran on a GPU" in text and "targets reached" not in text
    assert "| yes |" not in text and "| NO |" not in text


def test_the_picture_shows_every_panel(data):
    root = xml.etree.ElementTree.fromstring(draw(data))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}g")) == 2
    width, height = (float(root.get(name)) for name in ("width", "height"))
    circles = root.findall(f".//{tag}circle")
    assert len(circles) == 4 + 3
    assert all(0 < float(it.get("cx")) < width and 0 < float(it.get("cy")) < height for it in circles)
    assert speedups(data["linears"][:2])["ours"] == [(1, pytest.approx(1.6)), (64, pytest.approx(0.9))]
