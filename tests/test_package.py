"""What is there after `import sparseprune`, and what that costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparseprune as sp


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "package", [sp, sp.pruning, sp.quantization, sp.recovery, sp.surgery], ids=lambda it: it.__name__
)
def test_every_public_name_is_there_and_no_other(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    assert set(package._PLACES) == set(package.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    "package", [sp, sp.pruning, sp.quantization, sp.recovery, sp.surgery], ids=lambda it: it.__name__
)
def test_type_checkers_find_each_name_where_it_is(package):
    """What a type checker imports is what runs: the module that `_PLACES` names."""
    told = {}
    for node in ast.walk(ast.parse(Path(package.__file__).read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
            for line in node.body:
                told |= {it.name: line.module for it in line.names}
    found = {
        name: f"{package.__name__}.{path.rstrip(':').rpartition('.')[0] if path.endswith(':') else path}".rstrip(
            "."
        )
        for name, path in package._PLACES.items()
    }
    assert told == found


def test_one_import_is_enough_for_what_the_guides_use():
    code = "import sparseprune as sp; print(sp.streaming.prune_folder, sp.tasks.zero_shot, sp.CheckpointError, sp.cut)"
    assert "prune_folder" in python(code)
    assert python("import sparseprune; sparseprune.ops; import torch; print(torch.ops.sparseprune.linear)")


def test_help_waits_for_no_torch():
    assert python("import sys, sparseprune.cli; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune", ['"*.down_proj=0.4"', '"*.q_proj=dense"', "hidden states [default: in OUT]"]),
        ("recover", ["[default: 0 with a teacher, else 1]", "[default: learn from the text alone]"]),
        ("demo", ['pip install "sparseprune[demo]"']),
    ],
)
def test_help_is_shown_as_it_is_written(command, words):
    command = [sys.executable, "-c", "from sparseprune.cli import app; app()", command, "--help"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"COLUMNS": "300"}
    ).stdout
    for word in words:
        assert word in shown
