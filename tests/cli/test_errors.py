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
