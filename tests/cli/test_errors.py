"""What a user of the command line reads when an argument is wrong: options, not Python, and before a model is loaded."""

import pytest
from test_cli import run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "3:2"], "error: --pattern: "),
        (["--pattern", "neurons"], "are cut out: `sparseprune cut`"),
        (
            ["--method", "wanda"],
            "error: --calibration: method wanda needs a text, got none; pass --calibration FILE",
        ),
        (
            ["--method", "auto", "--calibration", "no/such/file"],
            "error: --calibration: there is no file no/such/file",
        ),
        (["--method", "wonder"], "error: --method: must be one of "),
        (["--minutes", "-5"], "error: --minutes: must be positive, got -5"),
        (
            ["--schedule", "nonsense", "--pattern", "unstructured", "--sparsity", "0.5"],
            "error: --schedule: must be one",
        ),
        (["--allocation", "fair"], "error: --allocation: must be one of uniform, "),
        (["--pattern", "unstructured"], "error: --sparsity: "),
        (["--reconstruct"], "error: --calibration: --reconstruct or --schedule needs a text"),
    ],
)
def test_it_is_said_before_a_model_is_loaded(options, message, monkeypatch):
    from sparseprune.models import loading

    def never(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_dense", never)
    done = run("prune", "no/such/model", "no/such/out", *options, code=2)
    assert message in " ".join(done.stderr.split()), done.stderr
    assert "sparseprune." not in done.stderr and "got None" not in done.stderr


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "cut",
            ["--structure", "tails", "--fraction", "0.5"],
            "error: --structure: must be one of neurons, heads",
        ),
        (
            "cut",
            ["--structure", "heads", "--fraction", "1.5"],
            "error: --fraction: must be in (0, 1), got 1.5",
        ),
        (
            "cut",
            ["--structure", "heads", "--fraction", "0.5", "--criterion", "influence"],
            "error: --criterion: must be one of auto, activation, l1, obs, random, taylor for heads, got influence",
        ),
        (
            "cut",
            ["--structure", "heads", "--fraction", "0.5", "--calibration", "no/such/file"],
            "error: --calibration: there is no file no/such/file",
        ),
        (
            "recover",
            ["--text", "no/such/file", "--steps", "1"],
            "error: --text: there is no file no/such/file",
        ),
        ("recover", ["--text", __file__], "steps"),
        ("recover", ["--text", __file__, "--minutes", "-1"], "error: --minutes: "),
    ],
)
def test_other_commands_say_it_before_a_model_is_loaded_too(command, options, message, monkeypatch):
    from sparseprune.cli import files

    def never(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(files, "load_dense", never)
    monkeypatch.setattr(files, "load_any", never)
    done = run(command, "no/such/model", "no/such/out", *options, code=2)
    assert message in " ".join(done.stderr.split()), done.stderr
