"""`sparseprune recover`: a sparse folder in, a better sparse folder out."""

import json

import pytest
from test_cli import TEXT, run, run_json, tiny_llama, tiny_tokenizer

from sparseprune.io.checkpoint import load
from sparseprune.weights.linear import SparseLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("recover")
    model = tiny_llama()
    for parameter in model.parameters():  # predictions far from uniform: there is something to recover
        if parameter.ndim == 2:
            parameter.data.mul_(5.0)
    model.save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    (root / "text.txt").write_text(TEXT)
    run("prune", root / "dense", root / "sparse", "--policy", "always")
    return root


def test_a_sparse_folder_learns_from_the_dense_model(folders, tmp_path):
    arguments = [
        "recover", folders / "sparse", tmp_path / "out", "--teacher", folders / "dense", "--text",
        folders / "text.txt", "--steps", 30, "--length", 32, "--windows", 4, "--learning-rate", 5e-3, "--hidden", 0.1,
        "--dev", folders / "text.txt", "--checkpoint", tmp_path / "run", "--policy", "always",
    ]  # fmt: skip
    result = run_json(*arguments)
    losses = [step["terms"]["logits"] for step in result["recovered"]["losses"]]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert result["recovered"]["zeros_after"] == result["recovered"]["zeros_before"] > 0
    assert [it["step"] for it in result["recovered"]["evaluations"]] == [0, 30]
    assert result["converted"]["swapped"] == 14
    before, after = load(folders / "sparse"), load(tmp_path / "out")
    for name, module in after.named_modules():
        if isinstance(module, SparseLinear):
            old, new = before.get_submodule(name).weight, module.weight
            assert str(module.format) == "2:4" and not new.equal(old)
            assert not new[old == 0].any()
    assert run_json(*arguments)["recovered"]["resumed_at"] == 30


def test_recovery_from_the_text_alone_prints_a_table(folders, tmp_path):
    result = run(
        "recover", folders / "sparse", tmp_path / "out", "--text", folders / "text.txt", "--steps", 2, "--length", 16,
    )  # fmt: skip
    assert "2 steps" in result.stdout and "cross-entropy" in result.stdout and "saved in" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "steps, minutes: one of the two must be given"),
        (["--steps", 1, "--temperature", 0], "temperature: must be above 0"),
        (["--steps", 1, "--hidden", 1], "teacher"),
        (["--steps", 1, "--length", 100000], None),
        (["--steps", 1, "--optimizer", "lion"], "optimizer: must be one of"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, options, message):
    result = run(
        "recover", folders / "sparse", tmp_path / "out", "--text", folders / "text.txt", *options,
        code=0 if message is None else 2,
    )  # fmt: skip
    if message is not None:
        assert message in result.stderr and not (tmp_path / "out").exists()


def test_json_of_the_report_is_json(folders, tmp_path):
    result = run(
        "recover", folders / "sparse", tmp_path / "out", "--text", folders / "text.txt", "--minutes", 0.01, "--length",
        16, "--lora", 2, "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["recovered"]["settings"]["lora"] == 2
