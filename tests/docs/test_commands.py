"""Every line in a shell's fence of the pages: run on a tiny model, or where that takes a network, hours or a machine's tools, held against what reads it."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from helpers import tiny
from helpers.fences import PAGES, ROOT, fences
from helpers.words import TEXT, tiny_tokenizer
from typer.main import get_command
from typer.testing import CliRunner

from sparseprune.cli import app

SMALLER = {
    r"--samples \d+": "--samples 4",
    r"--length \d+": "--length 16",
    r"--minutes [\d.]+": "--minutes 0.02",
    r"--text held_out.txt": "--text held_out.txt --window 32",
    r"bench OUT": "bench OUT --seconds 0.1",
}
DENSE = ("MODEL", "DENSE", "BIG_FOLDER")
SPARSE = {"docs/guide/evaluating.md": ["OUT"], "docs/guide/recovery.md": ["PRUNED"]}
"""What a page has from elsewhere; all other folders its own commands have to make."""
PARSED = {"demo": "minutes, and the model of a package", "--tasks": "questions from a network"}
"""Commands and options that are not run here, and why: the command's own parser reads the line."""


def lines(path: str) -> list[str]:
    found = [line for fence in fences(path, "bash") for line in fence.replace("\\\n", " ").splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in found) if line]


PAGES_WITH_COMMANDS = [path for path in PAGES if lines(path)]


def test_pages_with_commands_are_found():
    assert "README.md" in PAGES_WITH_COMMANDS and len(PAGES_WITH_COMMANDS) > 3


def parse(words: list[str]) -> None:
    """By the parser of the command that the line names; it raises what is wrong."""
    root = get_command(app)
    with root.make_context("sparseprune", words) as context:
        name, command, rest = root.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader stands: with dense models and texts."""
    monkeypatch.chdir(tmp_path)
    for name in DENSE:
        tiny.llama(max_position_embeddings=1024).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "corpus.txt").write_text(TEXT * 60)
    (tmp_path / "held_out.txt").write_text(TEXT)
    return tmp_path


def run(line: str) -> None:
    for pattern, replacement in SMALLER.items():
        line = re.sub(pattern, replacement, line)
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}{result.stderr}"


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS)
def test_commands_run_in_sequence(path, folder):
    for name in SPARSE.get(path, []):
        run(f"sparseprune prune DENSE {name}")
    for line in lines(path):
        words = shlex.split(line)
        if words[0] != "sparseprune":
            continue
        if PARSED.keys() & words:
            parse(words[1:])
        else:
            run(line)


def targets() -> set[str]:
    rules = re.findall(r"^([\w-][\w -]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


def options_of(script: Path) -> set[str]:
    """The options that a script takes: of typer those are its `main`'s arguments, argparse is told them there or beside it."""
    texts = {file.name: file.read_text() for file in script.parent.glob("*.py")}
    told = {option for text in texts.values() for option in re.findall(r"\"(--[\w-]+)\"", text)}
    functions = [it for it in ast.walk(ast.parse(texts[script.name])) if isinstance(it, ast.FunctionDef)]
    return told | {
        f"--{it.arg.replace('_', '-')}" for main in functions if main.name == "main" for it in main.args.args
    }


def installs(words: list[str]) -> None:
    """Files and extras that `pip install` names."""
    extras = set(
        re.findall(
            r"^(\w+) = \[",
            (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1],
            re.MULTILINE,
        )
    )
    for before, word in zip(words, words[1:], strict=False):
        if before == "-r":
            assert (ROOT / word).is_file(), word
        if named := re.search(r"\[(.*)\]", word):
            assert set(named[1].split(",")) <= extras, word


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS)
def test_other_commands_name_what_is_there(path):
    for line in lines(path):
        words = shlex.split(line)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets(), line
        elif words[0] == "python":
            script = ROOT / words[1]
            assert script.is_file(), line
            assert {word for word in words if word.startswith("--")} <= options_of(script), line
        elif words[0] == "pytest":
            assert (ROOT / words[1]).is_dir(), line
        elif words[:2] == ["pip", "install"]:
            installs(words)
        else:
            assert words[0] == "sparseprune", f"{path} has a command that no test knows: {line}"


@pytest.mark.parametrize("path", PAGES)
def test_commands_within_a_line_are_read(path):
    """In running text: `sparseprune prune --flag`; words in capitals may be left out there."""
    known = get_command(app).commands
    for span in re.findall(
        r"`sparseprune ([^`\n]*)`",
        re.sub(r"^```.*?^```", "", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL),
    ):
        for name in span.split()[0].split("|"):
            if not name.startswith("--"):
                assert name in known, span
                assert set(re.findall(r"--[\w-]+", span)) <= {
                    it for option in known[name].params for it in option.opts
                }


def test_targets_of_make_are_there():
    for path in PAGES:
        assert set(re.findall(r"`make ([\w-]+)", (ROOT / path).read_text())) <= targets(), path


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("prune MODEL OUT --nonsense", "No such option"),
        ("nonsense MODEL", "No such command"),
        ("eval", "Missing parameter"),
        ("prune MODEL OUT --samples many", "valid integer"),
    ],
)
def test_the_parser_refuses_what_is_wrong(line, fault):
    with pytest.raises(Exception, match=fault):
        parse(line.split())
