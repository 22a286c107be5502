"""A module imports only from its own row of docs/design.md's table and from the rows above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rows(design: str) -> list[list[str]]:
    """The files and folders (these end in "/") of each row; a name without a folder lies beside the one before it."""
    found = []
    for cell in re.findall(r"^\| (`sparseprune/.*?) \|", design, re.MULTILINE):
        row: list[str] = []
        for name in re.findall(r"`([^`]+)`", cell):
            row.append(name if "/" in name.rstrip("/") else f"{row[-1].rpartition('/')[0]}/{name}")
        found.append(row)
    return found


def row_of(path: str, table: list[list[str]]) -> int | None:
    """The row that names `path` itself or else the innermost folder around it."""
    names = [(name, number) for number, row in enumerate(table) for name in row]
    around = [
        (name, number) for name, number in names if path == name or name[-1] == "/" and path.startswith(name)
    ]
    return max(around, key=lambda it: len(it[0]))[1] if around else None


def imports(path: Path, root: Path) -> list[tuple[int, str]]:
    """(line, file of the package) of every import, those inside functions and for type checkers too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: imports here start with sparseprune, not with a dot"
            )
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, file_of(name, root)) for name in names if name.split(".")[0] == "sparseprune"]
    return found


def file_of(name: str, root: Path) -> str:
    """The innermost module that a dotted name goes through."""
    base = name.replace(".", "/")
    found = next((it for it in (f"{base}.py", f"{base}/__init__.py") if (root / it).is_file()), None)
    return found or file_of(name.rpartition(".")[0], root)


def faults(design: str, root: Path) -> list[str]:
    table = rows(design)
    found = [
        f"{name} is in the table and nowhere else"
        for row in table
        for name in row
        if not (root / name).exists()
    ]
    for path in sorted((root / "sparseprune").rglob("*.py")):
        name = str(path.relative_to(root))
        own = row_of(name, table)
        if own is None:
            found.append(f"{name} is in no row of the table")
            continue
        for line, target in imports(path, root):
            other = row_of(target, table)
            if other is not None and other > own:
                found.append(f"{name}:{line} imports {target}, which stands below it in the table")
    return found


def test_imports_follow_the_table_of_design():
    design = (ROOT / "docs" / "design.md").read_text()
    assert len(rows(design)) > 10
    assert faults(design, ROOT) == []


@pytest.fixture
def tree(tmp_path):
    for name, source in {
        "sparseprune/__init__.py": "",
        "sparseprune/low.py": "import torch\n",
        "sparseprune/room/__init__.py": "",
        "sparseprune/room/first.py": "from sparseprune import low\nfrom sparseprune.room.second import thing\n",
        "sparseprune/room/second.py": "def thing(): ...\n",
        "sparseprune/top.py": "from sparseprune.room import first\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


TABLE = "| `sparseprune/low.py` | |\n| `sparseprune/room/` | |\n| `sparseprune/top.py`, `__init__.py` | |\n"


@pytest.mark.parametrize(
    ("path", "source", "table", "fault"),
    [
        ("low.py", "", TABLE, None),
        ("low.py", "import sparseprune.top", TABLE, "low.py:1 imports sparseprune/top.py, which stands below"),
        ("low.py", "def f():\n    from sparseprune.room import first", TABLE, "low.py:2 imports sparseprune/room/first.py"),
        ("low.py", "from sparseprune.room.second import thing", TABLE, "imports sparseprune/room/second.py"),
        ("low.py", "from sparseprune import prune", TABLE, "imports sparseprune/__init__.py"),
        ("room/third.py", "from sparseprune import top", TABLE, "room/third.py:1 imports sparseprune/top.py"),
        ("new.py", "", TABLE, "sparseprune/new.py is in no row"),
        ("low.py", "", TABLE + "| `sparseprune/gone.py` | |\n", "sparseprune/gone.py is in the table and nowhere else"),
        ("low.py", "", "| `sparseprune/room/second.py` | |\n" + TABLE, None),
        ("low.py", "", TABLE + "| `sparseprune/room/second.py` | |\n", "first.py:2 imports sparseprune/room/second.py"),
    ],
)  # fmt: skip
def test_what_it_finds(tree, path, source, table, fault):
    (tree / "sparseprune" / path).write_text(source)
    found = faults(table, tree)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda it: it.name
)
def test_tables_are_whole(path):
    """A blank line inside a table would end it, and leave rows without a head."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = table.splitlines()
        assert len(lines) > 1 and set(lines[1]) <= set("|-: "), f"a table without a head: {lines[0]}"
