"""The Python of every page, run as it stands on a tiny model; only numbers that mean minutes are made small."""

import functools
import re

import pytest
import torch
from helpers import tiny
from helpers.fences import PAGES, fences, languages
from helpers.words import TEXT, tiny_tokenizer
from torch import nn

SMALLER = {
    r"count=\d+": "count=4, length=16",
    r"minutes=\d+": "minutes=0.02",
    r"(?<=held_out.txt\"\)\.read_text\(\))": ", window=32",
    r"TokenStream\(text, tokenizer\)": "TokenStream(text, tokenizer, length=16)",
}


def smaller(code):
    for pattern, replacement in SMALLER.items():
        code = re.sub(pattern, replacement, code)
    return code


def names():
    """What a user has: a model and its dense twin, a tokenizer, a text, a linear that was pruned."""
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight.view(16, 8, 4)[..., :2] = 0
    return {
        "model": tiny.llama(),
        "dense": tiny.llama(),
        "tokenizer": tiny_tokenizer(),
        "text": TEXT * 20,
        "linear": linear,
    }


@pytest.mark.parametrize("path", PAGES)
def test_fences_say_what_they_hold(path):
    """A fence in another language, or in none, would be run by no test; a command's output is "text"."""
    assert set(languages(path)) <= {"python", "bash", "text"}
    for language in ("python", "bash"):
        assert len(fences(path, language)) == languages(path).count(language)


@pytest.mark.parametrize("path", [path for path in PAGES if "python" in languages(path)])
def test_it_runs_in_sequence(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what torch.compile captures is what matters: the C++ compiler would take a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for folder in ("DENSE", "MODEL"):
        tiny.llama().save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    for file in ("corpus.txt", "held_out.txt"):
        (tmp_path / file).write_text(TEXT * 20)
    known = names()
    for code in fences(path, "python"):
        exec(compile(smaller(code), path, "exec"), known)
    assert known["report"] is not None
