"""The demo on a tiny model, and in the minutes that it is given on machines of any speed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.words import TEXT, tiny_tokenizer
from typer.testing import CliRunner

from sparseprune import demo
from sparseprune.cli import app

PROTOCOL = demo.Protocol(
    calibration_windows=32, calibration_length=32, evaluation_windows=6, evaluation_length=48, prompt_length=32,
    new_tokens=4, rounds=3, sentence_tokens=3,
)  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo of a tiny model, on texts of a few words."""
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "demo_model_path", lambda: source)
    monkeypatch.setattr(
        demo, "load_dense", lambda path, dtype: (tiny.llama(hidden_size=48).to(dtype), tiny_tokenizer())
    )
    monkeypatch.setattr(demo, "demo_texts", lambda: (TEXT * 2, TEXT))
    monkeypatch.setattr(demo, "QUESTION", "the cat sat")


@pytest.fixture
def machine(ticks, monkeypatch):
    """How fast a machine is: the seconds that a block takes for a token, how many times as many `after` so many
    seconds, and what each file takes to load or to save. Nothing else takes long on it.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    real = LlamaDecoderLayer.forward
    speed = {"seconds": 0.0, "after": math.inf, "times": 1.0, "files": 0.0}

    def forward(self, hidden_states, *args, **kwargs):
        times = speed["times"] if ticks.seconds > speed["after"] else 1.0
        ticks.seconds += speed["seconds"] * times * hidden_states.shape[:-1].numel()
        return real(self, hidden_states, *args, **kwargs)

    def slowly(function):
        def run(*args, **kwargs):
            ticks.seconds += speed["files"]
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    for name in ("load_dense", "load", "save"):
        monkeypatch.setattr(demo, name, slowly(getattr(demo, name)))
    return speed


def test_every_column_and_file_is_there(small, tmp_path):
    said = []
    report = demo.run(tmp_path / "keep", protocol=replace(PROTOCOL, calibration_windows=2), say=said.append)
    dense, *sparse = report.columns
    assert dense.zeros == dense.sparse_layers == 0
    assert len(sparse) == len(demo.RECIPES)
    for column, conversion in zip(sparse, report.conversions, strict=True):
        assert column.zeros == pytest.approx(0.5, abs=0.02)
        assert column.sparse_layers == conversion.swapped
        assert column.perplexity > 1
        assert column.decode > 0
        assert column.prompt > 0
    folders = [path for path in (tmp_path / "keep").iterdir() if (path / "model.safetensors").exists()]
    assert len(folders) == 1 + len(sparse)
    text = str(report)
    assert "weights in memory" in text
    assert "Asked: the cat sat" in text
    assert "windows of 48" in text
    assert json.loads(json.dumps(report.to_dict()))["columns"][0]["name"] == "dense"
    assert any("Saving and loading again" in line for line in said)


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_it_runs_in_what_the_cpu_is_fast_at(small, machine, monkeypatch, fast, dtype):
    monkeypatch.setattr(demo, "fast_bfloat16", lambda device: fast)
    said = []
    report = demo.run(protocol=replace(PROTOCOL, calibration_windows=1), say=said.append)
    assert said[0].endswith(f"in {dtype}")
    assert dtype in report.machine and report.protocol.endswith(dtype)


def test_a_fast_machine_reads_and_measures_all(small, machine):
    machine["seconds"] = 1e-5
    report = demo.run(minutes=5, protocol=replace(PROTOCOL, calibration_windows=4))
    assert report.seconds < 60
    assert [note.split(": ")[1] for note in report.notes] == ["auto"] * len(demo.RECIPES), "nothing was cut"
    assert "medians of 3 rounds" in str(report) and "in 6 windows" in str(report)


@pytest.mark.parametrize(("seconds", "minutes"), [(0.01, 3), (0.02, 5), (0.05, 5)])
def test_a_slow_machine_cuts_what_does_not_fit_and_says_so(small, machine, seconds, minutes):
    machine["seconds"] = seconds
    report = demo.run(minutes=minutes, protocol=PROTOCOL)
    assert 0.7 * 60 * minutes < report.seconds < 1.02 * 60 * minutes
    for recipe in demo.RECIPES:
        assert any(note.startswith(f"{recipe.name}: calibrated on") for note in report.notes)
    assert all(note in str(report) for note in report.notes)
    assert f"of {60 * minutes} s" in str(report)


@pytest.mark.parametrize(
    ("minutes", "seconds", "after"),
    [(3, 0.04, 0.0), (3, 0.04, 0.3), (3, 0.04, 0.8), (3, 0.02, 0.95), (5, 0.04, 0.6), (8, 0.04, 0.9)],
)
def test_a_machine_that_gets_busy_on_the_way_ends_in_time(small, machine, seconds, minutes, after):
    """With half of its speed from then on; a real model has more blocks to make up for it in."""
    machine.update(seconds=seconds, after=after * 60 * minutes, times=2.0, files=2.0)
    report = demo.run(minutes=minutes, protocol=PROTOCOL)
    assert report.seconds < 1.1 * 60 * minutes


def test_slow_files_are_reckoned_with(small, machine):
    machine.update(seconds=0.03, files=20.0)
    report = demo.run(minutes=3, protocol=PROTOCOL)
    assert report.seconds < 1.02 * 60 * 3


@pytest.mark.parametrize(("times", "threads"), [(1.0, 4), (0.7, 4), (1.5, 1), (5.0, 1)])
def test_fewer_threads_run_where_they_hold_each_other_up(small, machine, monkeypatch, times, threads):
    """`times` as slow with each doubling of the threads."""
    in_force = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: in_force[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: in_force.__setitem__(0, number))
    real = demo.decode_speed

    def decode_speed(model, **options):
        machine["seconds"] = 0.001 * times ** math.log2(in_force[0])
        return real(model, **options)

    monkeypatch.setattr(demo, "decode_speed", decode_speed)
    report = demo.run(protocol=replace(PROTOCOL, calibration_windows=1), recipes=demo.RECIPES[:1])
    assert f" {threads} threads" in report.machine
    assert in_force == [4], "afterwards as before"


def test_the_least_of_the_measuring_is_kept_free(small, machine):
    """A machine on which one window and one round as they stand would take more than is kept for all measuring."""
    machine.update(seconds=0.1)
    report = demo.run(minutes=3, protocol=PROTOCOL)
    assert report.seconds < 1.02 * 60 * 3
    assert any("1 of 6 windows and" in note for note in report.notes), report.notes
    assert re.search(r"in 1 windows of (24|12|6),", str(report))


def test_a_machine_on_which_no_window_of_calibration_fits_reads_shorter_ones(small, machine, monkeypatch):
    monkeypatch.setattr(demo, "_SHORTEST_WINDOW", 8)
    machine.update(seconds=0.3)
    report = demo.run(minutes=3, protocol=PROTOCOL)
    assert report.seconds < 1.1 * 60 * 3
    for recipe in demo.RECIPES:
        short = rf"{re.escape(recipe.name)}: calibration windows of (8|16) of 32 tokens"
        assert any(re.match(short, note) for note in report.notes), report.notes
    assert re.search(r"reading a prompt of (4|8|16) ", str(report))


def test_measuring_is_cut_where_it_would_take_a_quarter(small, machine):
    machine["seconds"] = 0.05
    report = demo.run(minutes=3, protocol=PROTOCOL)
    assert any(note.startswith("perplexity: ") for note in report.notes)
    assert any(note.startswith("speed: ") for note in report.notes)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_are_looked_at_before_anything_is_loaded(monkeypatch, minutes):
    def load(*arguments):
        raise AssertionError("loaded")

    monkeypatch.setattr(demo, "demo_model_path", load)
    with pytest.raises(ValueError, match="minutes: must be positive, got"):
        demo.run(minutes=minutes)
    result = CliRunner().invoke(app, ["demo", "--minutes", str(minutes)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --minutes: must be positive")


def test_demo_texts_are_apart_and_long_enough():
    calibration, evaluation = demo.demo_texts()
    shared = set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert not shared
    assert len(calibration) > 100_000
    assert len(evaluation) > 80_000
