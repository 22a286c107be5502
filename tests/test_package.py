"""What is there after `import sparseprune`, and what that costs."""

import subprocess
import sys

import pytest

import sparseprune as sp


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there_and_no_other():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
    assert set(sp.__all__) <= set(dir(sp)) and sp.__all__ == sorted(sp.__all__)
    assert set(sp._PLACES) | {"__version__"} == set(sp.__all__)
    with pytest.raises(AttributeError, match="module 'sparseprune' has no attribute 'nothing'"):
        _ = sp.nothing


def test_one_import_is_enough_for_what_the_guides_use():
    code = "import sparseprune as sp; print(sp.streaming.prune_folder, sp.tasks.zero_shot, sp.CheckpointError, sp.cut)"
    assert "prune_folder" in python(code)
    assert python("import sparseprune; sparseprune.ops; import torch; print(torch.ops.sparseprune.linear)")


def test_help_waits_for_no_torch():
    assert python("import sys, sparseprune.cli; print('torch' in sys.modules)") == "False"


def test_help_shows_asterisks():
    command = [sys.executable, "-c", "from sparseprune.cli import app; app()", "prune", "--help"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"COLUMNS": "300"}
    ).stdout
    assert '"*.down_proj=0.4"' in shown and '"*.q_proj=dense"' in shown
