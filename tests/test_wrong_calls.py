"""Arguments of the wrong kind: an error that names the argument, before anything is done, whatever the function."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, tiny
from helpers.recovery import peaked, pruned_pair, stream
from helpers.words import TEXT, tiny_tokenizer
from torch import nn

import sparseprune as sp

HALF = {"pattern": "unstructured", "sparsity": 0.5}
WANDA = {"method": "wanda"}
STEPWISE = {**HALF, "schedule": "greedy"}
PAIR = (nn.Linear(2, 2), None)
"""What `load_dense` gives."""

MODELS = [
    ("str", "MODEL", "must be a torch.nn.Module, got a str"),
    ("None", None, "must be a torch.nn.Module, got a NoneType"),
    ("pair", PAIR, "the first of the pair that load_dense gives"),
]
FUNCTIONS = {
    "prune": sp.prune,
    "sparsify": sp.sparsify,
    "quantize": sp.quantize,
    "recover": lambda model: sp.recover(model, stream(), steps=1),
    "to_dense": sp.recovery.to_dense,
    "cut": lambda model: sp.cut(model, "heads", 0.5),
    "cut layers": lambda model: sp.cut(model, "layers", 0.5),
    "save": lambda model: sp.save(model, "out"),
    "perplexity": lambda model: sp.perplexity(model, tiny_tokenizer(), TEXT),
    "find_sites": sp.models.find_sites,
    "find_blocks": sp.models.find_blocks,
}

WRONG = [
    ("prune", {**HALF, "sparsity": "0.5"}, "sparsity"),
    ("prune", {"include": 3}, "include"),
    ("prune", {"include": [None]}, "include"),
    ("prune", {"seed": None}, "seed"),
    ("prune", {**HALF, "allocation": [0.5]}, "allocation"),
    ("prune", {**WANDA, "calibration": [TEXT]}, "batches: .* batch 0 is a str"),
    ("prune", {**WANDA, "calibration": [torch.rand(2, 8)]}, "batches: token ids .* torch.float32"),
    ("prune", {**WANDA, "calibration": [torch.full((1, 8), 10**6)]}, "batches: token ids .* 1000000"),
    ("prune", {**WANDA, "calibration": [torch.full((1, 8), -1)]}, "batches: token ids .* -1"),
    ("prune", {**STEPWISE, "evaluate": lambda model: None}, "evaluate: must give one number, got a NoneType"),
    ("prune", {**STEPWISE, "evaluate": lambda model: torch.ones(2)}, "evaluate: must give one number, got a Tensor"),
    ("quantize", {"keep": 3}, "keep"),
    ("recover", {"data": None}, "data"),
    ("recover", {"data": {"a": "text"}}, "data"),
    ("recover", {"teacher": "DENSE"}, "teacher"),
    ("recover", {"teacher": PAIR}, "teacher"),
    ("recover", {"seed": None}, "seed"),
    ("recover", {"evaluate": lambda model: "x"}, "evaluate"),
    ("recover", {"evaluate": "x"}, "evaluate"),
    ("recover", {"checkpoint": 3}, "checkpoint"),
    ("cut", {"calibration": [TEXT]}, "batches"),
    ("cut", {"criterion": "taylor", "calibration": [tiny.ids()], "loss": "x"}, "loss"),
    ("cut", {"include": 3}, "include"),
    ("cut", {"seed": None}, "seed"),
    ("save", {"directory": None}, "directory: must be a path, got None"),
    ("save", {"directory": ""}, 'directory: must be a path, got "'),
    ("save", {"directory": tiny.llama()}, "directory: must be a path, got a LlamaForCausalLM"),
    ("save", {"tokenizer": "gpt2"}, "tokenizer"),
    ("save", {"progress": True}, "progress"),
    ("load", {"directory": None}, "directory"),
    ("load", {"directory": ""}, "directory"),
    ("load", {"model": "cpu"}, "model"),
    ("load", {"model": type(tiny.llama())}, "model"),
    ("load", {"progress": True}, "progress"),
    ("prune_folder", {"folder": None}, "folder"),
    ("prune_folder", {"out": None}, "out"),
    ("prune_folder", {"dtype": "bfloat16"}, "dtype"),
    ("prune_folder", {"dtype": torch.int8}, "dtype"),
    ("prune_folder", {"memory": "1GB"}, "memory"),
    ("prune_folder", {"memory": -1}, "memory"),
    ("prune_folder", {"tokenizer": "gpt2"}, "tokenizer"),
    ("prune_folder", {"spill": "spill"}, "spill: is for hidden states"),
    ("prune_folder", {**WANDA, "calibration": [tiny.ids()], "spill": 3}, "spill"),
    ("perplexity", {"window": "8"}, "window"),
    ("perplexity", {"text": None}, "text"),
    ("perplexity", {"text": Path("text.txt")}, "text: .* read the file first"),
    ("load_dense", {"path": None}, "path"),
    ("load_dense", {"dtype": "bfloat16"}, "dtype"),
    ("TokenStream", {"text": None}, "text"),
    ("TokenStream", {"length": "8"}, "length"),
    ("Distillation", {"logits": "1"}, "logits"),
]  # fmt: skip


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """name -> (function, arguments with which it works)."""
    monkeypatch.chdir(tmp_path)
    return {
        "prune": (sp.prune, {"model": tiny.llama()}),
        "quantize": (sp.quantize, {"model": tiny.llama()}),
        "recover": (
            sp.recover,
            {"model": pruned_pair()[0], "data": stream(), "teacher": peaked(), "steps": 1},
        ),
        "cut": (sp.cut, {"model": tiny.llama(), "structure": "heads", "fraction": 0.5}),
        "save": (sp.save, {"model": tiny.llama(), "directory": tmp_path / "out"}),
        "load": (sp.load, {"directory": sp.save(tiny.llama(), tmp_path / "saved")}),
        "prune_folder": (
            sp.streaming.prune_folder,
            {"folder": checkpoints.save(tiny.llama(), tmp_path / "dense"), "out": tmp_path / "streamed"},
        ),
        "perplexity": (
            sp.perplexity,
            {
                "model": tiny.llama(),
                "tokenizer": tiny_tokenizer(),
                "text": TEXT,
                "window": 32,
                "max_windows": 1,
            },
        ),
        "load_dense": (sp.models.load_dense, {"path": tmp_path / "dense"}),
        "TokenStream": (sp.recovery.TokenStream, {"text": TEXT, "tokenizer": tiny_tokenizer(), "length": 8}),
        "Distillation": (sp.recovery.Distillation, {}),
    }


@pytest.mark.parametrize(("kind", "model", "says"), MODELS, ids=[it[0] for it in MODELS])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_a_model(name, kind, model, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"^model: .*{says}"):
        FUNCTIONS[name](model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "wrong", "says"), WRONG, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(WRONG)]
)
def test_what_is_of_another_kind(name, wrong, says, calls):
    function, good = calls[name]
    with pytest.raises((TypeError, ValueError)) as error:
        function(**{**good, **wrong})
    assert re.match(f"({says})", str(error.value)), error.value


def test_what_is_right_is_taken(calls):
    for function, good in calls.values():
        function(**good)
