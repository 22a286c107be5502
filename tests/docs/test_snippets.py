"""The Python of README and guides, run as it stands on a tiny model; only numbers that mean minutes are made small."""

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.words import TEXT, tiny_tokenizer
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
SMALLER = {
    r"count=\d+": "count=4, length=16",
    r"minutes=\d+": "minutes=0.02",
    r"TokenStream\(text, tokenizer\)": "TokenStream(text, tokenizer, length=16)",
}


def snippets(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


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


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        *(str(it.relative_to(ROOT)) for it in sorted((ROOT / "docs" / "guide").glob("*.md")) if snippets(it)),
    ],
)
def test_it_runs_in_sequence(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained(tmp_path / "DENSE")
    tiny_tokenizer().save_pretrained(tmp_path / "DENSE")
    known = names()
    found = snippets(path)
    assert found
    for code in found:
        exec(compile(smaller(code), path, "exec"), known)
    assert known["report"] is not None
