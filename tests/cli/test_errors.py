"""What a user of the command line reads when an argument is wrong: options, not Python, and before a model is loaded."""

import sys

import pytest
from test_cli import run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "3:2"], "error: --pattern: "),
        (["--pattern", "neurons"], "are cut out: `sparseprune cut`"),
        (
            ["--method", "wanda"],
            "error: --calibration: method wanda needs some, got none; pass --calibration FILE",
        ),
        (
            ["--method", "auto", "--calibration", "no/such/file"],
            "error: --calibration: there is no file no/such/file",
        ),
        (["--method", "wonder"], "error: --method: must be one of "),
        (["--minutes", "-5"], "error: --minutes: must be above 0, got -5"),
        (
            ["--schedule", "nonsense", "--pattern", "unstructured", "--sparsity", "0.5"],
            "error: --schedule: must be one",
        ),
        (["--allocation", "fair"], "error: --allocation: must be one of uniform, "),
        (["--pattern", "unstructured"], "error: --sparsity: "),
        (["--scope", "row"], "error: --scope: pattern 2:4 ranks within its groups"),
        (
            ["--minutes", "5"],
            "error: --minutes: bounds what goes block by block, and searches; method magnitude",
        ),
        (["--minutes", "5"], "leave it out, or pass --method auto"),
        (["--sequential"], "error: --sequential: method magnitude looks at weights only"),
        (
            ["--method", "auto", "--no-sequential", "--calibration", __file__],
            "leave it out, or pass --no-reconstruct",
        ),
        (
            ["--calibration", __file__],
            "error: --calibration: method magnitude looks at weights only; leave it out",
        ),
        (
            ["--schedule", "gradual", "--pattern", "unstructured", "--sparsity", "0.5"],
            "error: --calibration: --schedule gradual goes by a loss on text",
        ),
        (["--recover-steps", "3"], "error: --recover-steps: must come with --schedule"),
        (["--max-bytes", "3"], "error: --max-bytes, --max-ms: must come with --allocation search"),
        (["--samples", "0"], "error: --samples: must be at least 1, got 0"),
        (["--allocation", "*.q_proj=2"], "error: --allocation *.q_proj: must be in [0, 1), got 2.0"),
        (
            ["--allocation", "owl"],
            'got \'owl\'; pass "uniform", LAYERS=VALUE such as "*.down_proj=dense", or --pattern unst',
        ),
        (
            ["--reconstruct"],
            "error: --calibration: reconstruction needs some, got none; pass --calibration FILE",
        ),
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
            "error: --fraction: must be in (0, 1) for heads, got 1.5",
        ),
        (
            "cut",
            ["--structure", "heads", "--fraction", "0.5", "--criterion", "influence"],
            "error: --criterion: must be one of auto, activation, l1, obs, random, taylor for heads, got 'influence'",
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
        (
            "cut",
            ["--structure", "heads", "--fraction", "0.5", "--calibration", sys.executable],
            "error: --calibration: must be UTF-8 text",
        ),
        ("recover", ["--text", __file__], "steps"),
        (
            "recover",
            ["--text", __file__, "--steps", "1", "--teacher", "no/such/teacher"],
            "error: --teacher: there is no model at no/such/teacher",
        ),
        (
            "recover",
            ["--text", __file__, "--steps", "1", "--checkpoint", __file__],
            "error: --checkpoint: must be a folder",
        ),
        (
            "eval",
            ["--text", __file__, "--reference", "no/such/model"],
            "error: --reference: there is no model at no/such/model",
        ),
        (
            "eval",
            ["--text", __file__, "--window", "8", "--stride", "9"],
            "error: --stride: must be in [1, window = 8]",
        ),
        ("eval", ["--text", sys.executable], "error: --text: must be UTF-8 text"),
        ("recover", ["--text", __file__, "--minutes", "-1"], "error: --minutes: "),
    ],
)
def test_other_commands_say_it_before_a_model_is_loaded_too(command, options, message, monkeypatch):
    from sparseprune.cli import files

    def never(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(files, "load_dense", never)
    monkeypatch.setattr(files, "load_any", never)
    folders = ["no/such/model"] if command == "eval" else ["no/such/model", "no/such/out"]
    done = run(command, *folders, *options, code=2)
    assert message in " ".join(done.stderr.split()), done.stderr
