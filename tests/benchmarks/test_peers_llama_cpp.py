"""benchmarks/peers_llama_cpp.py: what it reads from llama.cpp's tools, the file it writes for them, its table and picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from helpers import tiny

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peers_llama_cpp
from llama_cpp import build, ours, picture, shapes, tools

from sparseprune.io.inspection import memory_bytes

MACHINE = {
    "cpu": "Some CPU [model 1]", "isa": "avx512_bf16", "caches": {"L1": "48K"}, "cores": 2, "threads": 2, "torch": "2.13",
    "read_gb_s": 30.0, "copy_gb_s": 25.0, "others_cpu_share": 0.01,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def bench(*tests):
    return json.dumps([{"n_prompt": prompt, "n_gen": new, "avg_ts": speed} for prompt, new, speed in tests])


def test_speeds_of_llama_bench_in_any_order():
    assert tools.read_speeds(bench((512, 0, 443.7), (0, 64, 149.7))) == (149.7, 443.7)
    assert tools.read_speeds(bench((0, 64, 149.7), (512, 0, 443.7))) == (149.7, 443.7)


@pytest.mark.parametrize(
    "tests", [[(512, 0, 1.0)], [(512, 64, 1.0)], [(512, 0, 1.0), (0, 64, 1.0), (0, 128, 1.0)]]
)
def test_other_tests_of_llama_bench_are_refused(tests):
    with pytest.raises(ValueError, match="expected one test of decoding and one of a prompt"):
        tools.read_speeds(bench(*tests))


def test_perplexity_of_llama_perplexity():
    assert tools.read_perplexity("[1]13.1,[2]12.9,\nFinal estimate: PPL = 12.9413 +/- 0.41\n") == 12.9413
    with pytest.raises(ValueError, match="expected a final estimate, got: out of memory"):
        tools.read_perplexity("out of memory")


def test_a_tool_that_fails_says_why(tmp_path):
    failing = tmp_path / "llama-bench"
    failing.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(RuntimeError, match="llama-bench: ended with code 3: no such model"):
        tools.speeds(tmp_path, tmp_path / "model.gguf", threads=1, prompt=1, new=1)


def test_version_is_that_of_the_source_package(tmp_path):
    with pytest.raises(
        ValueError, match="must hold one source package of llama-cpp-python, .* has none; name another"
    ):
        build.version(tmp_path)
    (tmp_path / "llama_cpp_python-0.3.36.tar.gz").touch()
    assert build.version(tmp_path) == "llama-cpp-python-0.3.36"
    (tmp_path / "llama_cpp_python-0.3.9.tar.gz").touch()
    with pytest.raises(
        ValueError, match=r"has llama_cpp_python-0.3.36.tar.gz, llama_cpp_python-0.3.9.tar.gz;"
    ):
        build.version(tmp_path)


def test_the_file_has_the_models_tensors(tmp_path):
    """A GGUF reader finds the shapes of the transformers model, and Q4_0 blocks that stand for finite numbers."""
    file = shapes.write_gguf(tmp_path / "tiny.gguf", SIZES)
    model = shapes.random_model(SIZES)
    found = {it.name: it for it in gguf.GGUFReader(file).tensors}
    assert sorted(tuple(it.shape) for it in found.values()) == sorted(
        tuple(reversed(it.shape)) for it in model.parameters()
    )
    up = found["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == "Q4_0"
    weight = gguf.quants.dequantize(up.data, up.tensor_type)
    assert weight.shape == (96, 64)
    assert 0.01 < abs(weight).max() < 0.1
    assert sum(it.n_bytes for it in found.values()) < file.stat().st_size


def test_forms_of_a_random_model():
    dense = shapes.random_model(SIZES)
    sizes = [memory_bytes(ours.in_form(dense, form)) for form in ours.SHAPE_FORMS]
    assert sizes == sorted(sizes, reverse=True)
    assert next(dense.parameters()).dtype == torch.bfloat16


def test_second_halves_are_what_llama_perplexity_scores():
    """By hand: of windows of 8 tokens those from the sixth on, each given all before it."""
    model = tiny.llama()
    ids = tiny.ids(1, 16)[0]
    losses = []
    for window in ids.split(8):
        logits = model(window[None]).logits[0].detach().log_softmax(-1)
        losses += [-logits[at - 1, window[at]] for at in (5, 6, 7)]
    expected = torch.stack(losses).mean().exp()
    assert ours.second_halves(model, ids, None, 8, 2) == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture
def run():
    records = [
        {"by": "llama.cpp", "form": "Q4_0", "bytes": 91_700_000, "perplexity": 13.2, "decode": 150.0, "prompt": 440.0},
        {"by": "sparseprune", "form": "int4", "bytes": 71_000_000, "decode": 100.0, "compiled": 160.0, "prompt": 1500.0},
    ]  # fmt: skip
    return {"llama_cpp": "llama-cpp-python-0.3.36", "machine": MACHINE, "rounds": 3, "records": records}


def test_table_shows_both_and_leaves_out_what_was_not_measured(run):
    text = peers_llama_cpp.table("SmolLM2", run).render()
    assert [line.split() for line in text.splitlines() if "Q4_0" in line or "int4" in line] == [
        ["llama.cpp", "Q4_0", "92", "13.20", "150.0", "-", "440"],
        ["sparseprune", "int4", "71", "-", "100.0", "160.0", "1500"],
    ]
    assert "llama-cpp-python-0.3.36" in text
    assert "Some CPU" in text


def test_measuring_takes_turns_and_keeps_medians(monkeypatch, run):
    order = []

    class Candidate:
        def generated(self, new):
            order.append("ours")
            return float(len(order))

        def compiled(self, new):
            return 7.0

        def prompt(self, length):
            return 9.0

    def speeds(folder, file, **options):
        order.append("theirs")
        return 10.0 * len(order), 1.0

    monkeypatch.setattr(tools, "speeds", speeds)
    records = [{"by": "llama.cpp", "form": "a"}, {"by": "sparseprune", "form": "b"}]
    peers_llama_cpp._measure(Path(), {"a": Path()}, {"b": Candidate()}, records, 3, 2)
    assert order == ["theirs", "ours"] * 3
    assert (records[0]["decode"], records[0]["decode_range"]) == (30.0, [10.0, 50.0])
    assert (records[1]["decode"], records[1]["compiled"], records[1]["prompt"]) == (4.0, 7.0, 9.0)


def test_points_of_the_picture(run):
    assert picture.points(run, "llama.cpp", "perplexity") == [("Q4_0", 91.7, 13.2)]
    assert picture.points(run, "sparseprune", "compiled") == [("int4", 71.0, 160.0)]
    assert picture.points(run, "sparseprune", "perplexity") == []
