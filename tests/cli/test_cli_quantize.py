"""`sparseprune quantize`, and `prune --quantize`."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny
from typer.testing import CliRunner

import sparseprune as sp
from sparseprune.cli import app


@pytest.fixture
def folder(tmp_path):
    tiny.llama().bfloat16().save_pretrained(tmp_path / "dense")
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(it) for it in arguments])
    return done.exit_code, done.output


def test_quantize_writes_what_load_reads(folder):
    code, text = run("quantize", folder / "dense", folder / "out", "--encoding", "int8", "--json")
    assert code == 0, text
    found = json.loads(text[text.index("{") :])["quantized"]
    assert {it["encoding"] for it in found["layers"]} == {"int8"}
    model = sp.load(folder / "out")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, sp.SparseLinear) and layer.encoding.kind == "int8"
    assert model(tiny.ids()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "form"), [("2:4", "2:4"), ("4:8", "4:8"), ("unstructured", "bitmap")], ids=str
)
def test_prune_and_quantize_in_one_call(folder, pattern, form):
    half = ("--sparsity", "0.5") if pattern == "unstructured" else ()
    code, text = run(
        "prune", folder / "dense", folder / "out", "--pattern", pattern, *half, "--quantize", "int4"
    )
    assert code == 0 and "quantized" in text and form in text, text
    layer = sp.load(folder / "out").model.layers[0].mlp.up_proj
    assert (str(layer.format), layer.encoding.kind) == (form, "int4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "--method", "gptq"), "--calibration: method gptq needs"),
        (("quantize", "--encoding", "int3"), "int3"),
        (("quantize", "--group-size", "48"), "--group-size: must be 32, 64 or 128, got 48"),
        (("quantize", "--keep", "none.gguf"), "--keep: there is no file none.gguf"),
        (("prune", "--quantize", "int4", "--format", "auto"), "--format: is for plain values, --quantize is int4"),
        (("prune", "--quantize", "int4", "--stream"), "--quantize: a streamed pruning writes plain values"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_the_model_is_loaded(tmp_path, arguments, message):
    code, text = run(arguments[0], tmp_path / "no model", tmp_path / "out", *arguments[1:])
    assert code == 2 and message in " ".join(text.split()), text
