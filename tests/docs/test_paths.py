"""What the pages name is there: files and folders of the repository, and links."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
ENDINGS = r"\.(?:py|pyi|md|cpp|h|inl|cu|cuh|cmake|toml|txt|json|png|yml)"
BUILT = {".git", "build", "dist", "__pycache__"}
# A reader's own files, and what a saved model's folder holds.
USERS = {"corpus.txt", "held_out.txt", "config.json", "model.safetensors.index.json"}


def files_and_folders(root: Path) -> list[str]:
    """Every file and folder (these end in "/"), but for what was built."""
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = [it for it in inside if it not in BUILT and not it.startswith(".venv")]
        here = Path(folder).relative_to(root)
        found += [str(here / it) for it in files] + [f"{here / it}/" for it in inside]
    return found


def mentioned(text: str, top: set[str]) -> set[str]:
    """What looks like a path of the repository: in backticks, or anywhere if it begins with one of its folders."""
    quoted = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}
    paths = {word for word in quoted if re.fullmatch(rf"[\w.<>*/-]*\w{ENDINGS}", word)}
    paths |= {
        word for word in quoted if word.split("/")[0] in top and re.fullmatch(r"[\w.<>*-]+/[\w.<>*/-]*", word)
    }
    begin = "|".join(sorted(top))
    paths |= set(re.findall(rf"(?<![\w./-])(?:{begin})/[\w.<>*/-]*\w{ENDINGS}", text))
    return paths - USERS


def missing(text: str, known: list[str]) -> list[str]:
    """Those of `mentioned` that are not there; a path may leave out its first folders, and `<name>` stands for any."""
    top = {name.split("/")[0] for name in known if "/" in name}

    def exists(path: str) -> bool:
        pattern = re.sub(r"<\w+>", "*", path)
        wanted = {pattern, f"{pattern.rstrip('/')}/"}
        return any(fnmatchcase(it, f"*/{end}") or fnmatchcase(it, end) for end in wanted for it in known)

    return sorted(path for path in mentioned(text, top) if not exists(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda it: it.name)
def test_paths_exist(page):
    assert missing(page.read_text(), files_and_folders(ROOT)) == []


def test_comments_name_pages_and_files_that_exist():
    """In all sources but these tests, which name files of trees that they make up."""
    known = files_and_folders(ROOT)
    sources = [
        name
        for name in known
        if re.search(r"\.(py|pyi|cpp|h|inl|cu|cuh|cmake|yml)$|Makefile$|CMakeLists", name)
    ]
    named = rf"(?<![\w./-])(?:docs|tests|benchmarks|scripts|csrc)/[\w/-]+{ENDINGS}\b"
    absent = {
        f"{name}: {path}"
        for name in sources
        if not name.startswith(("tests/docs/", "tests/gpu_check/"))
        for path in re.findall(named, (ROOT / name).read_text())
        if path not in known
    }
    assert absent == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda it: it.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", it.lower()).replace(" ", "-") for it in heads], target


@pytest.mark.parametrize(
    "change",
    [
        "A method of pruning", "An allocation", "A recovery term", "An operation", "An instruction set", "A CUDA kernel",
        "A kind of site", "A command", "A format", "An encoding", "A report column",
    ],
)  # fmt: skip
def test_there_is_a_recipe_that_names_its_files(change):
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
    (paragraph,) = re.findall(rf"^\*\*{change}\b.*?(?:\n\n|\Z)", recipes, re.MULTILINE | re.DOTALL)
    assert mentioned(paragraph, {"sparseprune", "csrc", "docs", "tests"})


KNOWN = ["csrc/", "csrc/cpu/", "csrc/cpu/plan.cpp", "docs/", "docs/design.md", "sparseprune/", "sparseprune/io/", "sparseprune/io/shards.py"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("`csrc/cpu/plan.cpp`, `plan.cpp`, `io/shards.py`, `sparseprune/io/`, docs/design.md", []),
        ("`csrc/<level>/plan.cpp` and `sparseprune/<room>/`", []),
        ("`csrc/cuda/`", ["csrc/cuda/"]),
        ("`gone.py` and csrc/cpu/gone.cpp", ["csrc/cpu/gone.cpp", "gone.py"]),
        ("`o/shards.py`", ["o/shards.py"]),
        ("`model.to(dtype)`, `and/or`, `--text corpus.txt`", []),
    ],
)
def test_what_it_finds(text, absent):
    assert missing(text, KNOWN) == absent
