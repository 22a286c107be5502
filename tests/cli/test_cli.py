import json
import re

import pytest
import torch
from helpers.words import TEXT, tiny_tokenizer
from typer.testing import CliRunner

from sparseprune.cli import app
from sparseprune.io.checkpoint import load
from sparseprune.options import Layers
from sparseprune.weights.linear import SparseLinear


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def tiny_llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense Hugging Face folder, a text, and the sparse folder that `prune` makes of them."""
    root = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    (root / "text.txt").write_text(TEXT)
    run("prune", root / "dense", root / "sparse", "--policy", "always")
    return root


def test_prune_wanda_unstructured(folders, tmp_path):
    result = run_json(
        "prune", folders / "dense", tmp_path / "out", "--pattern", "unstructured", "--sparsity", 0.5, "--method",
        "wanda", "--calibration", folders / "text.txt", "--samples", 2, "--length", 32, "--policy", "always",
    )  # fmt: skip
    assert result["pruned"]["sparsity_after"] == 0.5
    assert result["converted"]["swapped"] == 14
    assert {layer["format"] for layer in result["converted"]["layers"]} == {"bitmap"}
    model = load(tmp_path / "out")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 14


def test_prune_passes_on_what_was_asked_for(folders, tmp_path, monkeypatch):
    from sparseprune import pruning
    from sparseprune.pruning.allocation import Search

    asked, original = [], pruning.prune
    monkeypatch.setattr(
        pruning, "prune", lambda *args, **kwargs: asked.append(kwargs) or original(*args, **kwargs)
    )
    arguments = ("prune", folders / "dense", tmp_path / "out", "--pattern", "unstructured", "--sparsity", 0.5)
    run(*arguments, "--policy", "always")
    given = vars(pruning.Recipe("unstructured", sparsity=0.5)) | vars(Layers())
    assert asked.pop() == given | {"calibration": None, "progress": True}
    text = ("--calibration", folders / "text.txt", "--samples", 4, "--length", 32, "--policy", "always")
    run(
        *arguments, *text, "--method", "wanda+swaps", "--allocation", "search", "--minutes", 0.01, "--max-bytes", 10**6,
        "--scope", "layer", "--sequential", "--seed", 3,
    )  # fmt: skip
    kwargs = asked.pop()
    assert kwargs["method"] == "wanda+swaps" and len(kwargs["calibration"].batches) == 4
    assert kwargs["allocation"] == Search(bytes=10**6)
    assert (kwargs["minutes"], kwargs["scope"], kwargs["sequential"], kwargs["seed"]) == (
        0.01,
        "layer",
        True,
        3,
    )
    run(*arguments, "--allocation", "*.q_proj=dense", "--allocation", "*.mlp.*=0.25", "--policy", "always")
    assert asked.pop()["allocation"] == {"*.q_proj": "dense", "*.mlp.*": 0.25}
    run(*arguments, *text, "--method", "admm", "--no-sequential")
    assert asked.pop()["sequential"] is False
    run(*arguments, *text, "--method", "wanda", "--reconstruct", "--minutes", 0.05)
    assert asked.pop()["reconstruction"] is True


@pytest.mark.parametrize(("structure", "parameters"), [("neurons", 0.8), ("heads", 0.9), ("layers", 0.7)])
def test_cut(folders, tmp_path, structure, parameters):
    arguments = ("cut", folders / "dense", tmp_path / "out", "--structure", structure, "--fraction", 0.5)
    pruned = run_json(*arguments)["cut"]
    assert pruned["parameters_after"] < parameters * pruned["parameters_before"]
    model = load(tmp_path / "out")
    assert sum(it.numel() for it in model.parameters()) == pruned["parameters_after"]
    data = run_json(
        "eval", tmp_path / "out", "--text", folders / "text.txt", "--window", 64, "--max-windows", 3
    )
    assert 1 < data["value"] < 200
    output = run(*arguments).stdout
    assert f"of the {structure} by l1" in output
    assert f"saved in {tmp_path / 'out'}" in output


@pytest.mark.parametrize("schedule", ["gradual", "greedy"])
def test_prune_by_schedule(folders, tmp_path, schedule):
    arguments = (
        "prune", folders / "dense", tmp_path / "out", "--pattern", "unstructured", "--sparsity", 0.2, "--schedule",
        schedule, "--calibration", folders / "text.txt", "--length", 32, "--method", "wanda", "--policy", "always",
    )  # fmt: skip
    pruned = run_json(*arguments, "--samples", 2, "--recover-steps", 1)["pruned"]
    assert pruned["sparsity_after"] == pytest.approx(0.2, abs=0.01)
    steps = pruned["schedule"]["steps"]
    assert len(steps) > 3
    assert all(step["loss"] is not None for step in steps)
    assert any(step["loss"] != step["loss_pruned"] for step in steps)  # trained in between


def test_prune_by_mapping(folders, tmp_path):
    result = run_json(
        "prune", folders / "dense", tmp_path / "out", "--allocation", "*.q_proj=dense", "--allocation", "*.mlp.*=4:8",
        "--policy", "always",
    )  # fmt: skip
    zeros = {layer["name"].split(".")[-1]: layer["sparsity_after"] for layer in result["pruned"]["layers"]}
    assert (zeros["q_proj"], zeros["v_proj"], zeros["up_proj"]) == (0, 0.5, 0.5)
    formats = {layer["name"].split(".")[-1]: layer["format"] for layer in result["converted"]["layers"]}
    assert (formats["q_proj"], formats["v_proj"], formats["up_proj"]) == (None, "2:4", "4:8")


def test_prune_prints_what_it_did(folders, tmp_path):
    output = run(
        "prune", folders / "dense", tmp_path / "out", "--policy", "always", "--exclude", "*mlp*"
    ).stdout
    assert "model.layers.*.self_attn.q_proj" in output
    assert "mlp" not in output
    assert "8 of 8 layers are sparse" in output
    assert "pruned by magnitude" in output
    assert f"saved in {tmp_path / 'out'}" in output
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_prune_auto_measures(folders, tmp_path):
    result = run_json("prune", folders / "dense", tmp_path / "out", "--batch", 1, "--batch", 4)
    assert result["converted"]["policy"] == "auto"
    assert all(set(layer["speedups"]) == {"1", "4"} for layer in result["converted"]["layers"])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_eval(folders, kind):
    arguments = ("eval", folders / kind, "--text", folders / "text.txt", "--window", 64, "--max-windows", 3)
    data = run_json(*arguments)
    assert data["windows"] == 3
    assert 1 < data["value"] < 200
    output = run(*arguments).stdout
    assert f"{data['value']:.3f}" in output
    assert data["protocol"] in output


def test_eval_against_the_dense_model(folders):
    arguments = (
        "eval", folders / "sparse", "--text", folders / "text.txt", "--window", 64, "--max-windows", 3, "--reference",
        folders / "dense", "--layers",
    )  # fmt: skip
    data = run_json(*arguments)
    assert data["fidelity"]["kl"] > 0
    assert 0 < data["fidelity"]["agreement"] <= 1
    assert data["fidelity"]["model"]["value"] == data["value"]
    assert {row["kind"] for row in data["layers"]["rows"]} == {"layer", "block"}
    assert all(0 < row["error"] < 2 for row in data["layers"]["rows"])
    output = run(*arguments).stdout
    assert f"{data['fidelity']['kl']:.4f}" in output
    assert data["fidelity"]["protocol"] in output
    assert "model.layers.1" in output


def test_eval_says_where_it_reads_the_calibration_text(folders, tmp_path):
    text = folders / "text.txt"
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(TEXT.split())))
    arguments = ("eval", folders / "dense", "--text", text, "--window", 64, "--max-windows", 3)
    assert "WARNING" not in run(*arguments).stdout
    assert "WARNING" not in run(*arguments, "--calibration", other).stdout
    assert (
        "WARNING: the model was calibrated on 100.0% of this text"
        in run(*arguments, "--calibration", text).stdout
    )


def test_eval_runs_tasks(folders, monkeypatch):
    from sparseprune.measure import tasks

    scores = tasks.TaskScores((tasks.TaskScore("piqa", "acc", 0.5, 0.1, 4),), "protocol of the harness")
    asked = []
    monkeypatch.setattr(tasks, "zero_shot", lambda *args, **kwargs: asked.append((args[2], kwargs)) or scores)
    output = run("eval", folders / "sparse", "--tasks", "piqa", "--tasks", "arc_easy", "--limit", 4).stdout
    assert asked == [(["piqa", "arc_easy"], {"limit": 4, "folder": None})]
    assert "protocol of the harness" in output


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_bench(folders, kind):
    arguments = ("bench", folders / kind, "--batch", 1, "--batch", 2, "--seconds", 0.1, "--no-tokens")
    data = run_json(*arguments)
    assert sum(group["count"] for group in data["kinds"]) == 14
    for group in data["kinds"]:
        assert [timing["batch"] for timing in group["timings"]] == [1, 2]
        assert group["format"] == ("2:4" if kind == "sparse" else None)
    output = run(*arguments).stdout
    assert "speed-up" in output
    assert "tokens/s" not in output


def test_bench_tokens(folders, monkeypatch):
    from sparseprune.measure import benchmark
    from sparseprune.measure.evaluate import SpeedResult

    speed = SpeedResult(12.5, 1.0, 1, 1, 2, "decode, batch 1, float32")
    monkeypatch.setattr(benchmark, "decode_speed", lambda model: speed)
    monkeypatch.setattr(benchmark, "prompt_speed", lambda model, length: speed)
    assert "12.5 tokens/s" in run("bench", folders / "sparse", "--batch", 1, "--seconds", 0.1).stdout


def test_inspect(folders):
    dense, sparse = run_json("inspect", folders / "dense"), run_json("inspect", folders / "sparse")
    assert dense["architecture"] == sparse["architecture"] == "LlamaForCausalLM"
    assert len(dense["layers"]) == len(sparse["layers"]) == 15
    assert {layer["format"] for layer in dense["layers"]} == {None}
    by_format = {layer["name"]: (layer["format"], layer["pattern"]) for layer in sparse["layers"]}
    assert by_format.pop("lm_head") == (None, None)
    assert set(by_format.values()) == {("2:4", "2:4")}
    assert sum(layer["nbytes"] for layer in sparse["layers"]) > 0
    output = run("inspect", folders / "sparse").stdout
    assert "model.layers.*.mlp.down_proj" in output
    assert "14 of 15 linears are sparse" in output


def bad(folders, tmp_path):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (folders / "sparse").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    dense, sparse, text = folders / "dense", folders / "sparse", folders / "text.txt"
    return [
        (("inspect", tmp_path / "nowhere"), "MODEL: there is no model at .*nowhere"),
        (("inspect", damaged), "model.safetensors: must be a whole safetensors file"),
        (("eval", dense, "--text", tmp_path / "nowhere.txt"), "--text: there is no file"),
        (("eval", dense), "--text: must be given, or --tasks"),
        (("eval", dense, "--text", text, "--layers"), "--layers: must come with --reference"),
        (("eval", dense, "--text", text, "--reference", sparse), "--reference: must be dense, .* is sparse"),
        (
            ("eval", dense, "--tasks", "piqa", "--reference", dense),
            "--reference: must come with --text",
        ),
        (("eval", dense, "--text", binary), "--text: must be UTF-8 text"),
        (("eval", dense, "--text", short, "--window", 64), "text: must hold at least one window"),
        (("eval", sparse, "--text", text, "--dtype", "float16"), "--dtype: .* holds float32, got float16"),
        (("prune", sparse, tmp_path / "out"), "MODEL: must be dense, .* is sparse already"),
        (("prune", dense, tmp_path / "out", "--pattern", "5:4"), "--pattern: "),
        (("prune", dense, tmp_path / "out", "--pattern", "unstructured"), "--sparsity: "),
        (("prune", dense, tmp_path / "out", "--method", "wanda"), "--calibration: method wanda needs some"),
        (("prune", tmp_path / "nowhere", tmp_path / "out", "--method", "best"), "--method: must be one of"),
        (
            ("prune", dense, tmp_path / "out", "--allocation", "owl"),
            "--allocation: pattern 2:4 removes the same",
        ),
        (
            ("prune", dense, tmp_path / "out", "--max-ms", 1),
            "--max-bytes, --max-ms: must come",
        ),
        (
            ("prune", dense, tmp_path / "out", "--allocation", "a", "--allocation", "b=1"),
            "--allocation: must be one name",
        ),
        (("prune", dense, tmp_path / "out", "--format", "coo"), "--format: must be"),
        (("prune", dense, dense), "OUT: .* holds a model that is not of sparseprune; name another"),
        (("prune", dense, text), "OUT: must be a folder, got the file"),
        (("bench", dense, "--format", "coo"), "--format: must be"),
        (
            ("prune", dense, tmp_path / "out", "--include", "nothing"),
            "--include: .nothing. matches no linear layer",
        ),
    ]


def test_mistakes_are_one_line_and_exit_code_2(folders, tmp_path):
    for arguments, message in bad(folders, tmp_path):
        result = run(*arguments, code=2)
        line = result.stderr.strip().splitlines()[-1]
        assert re.match(rf"error: .*{message}", line), (arguments, result.stderr)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert (folders / "dense" / "model.safetensors").exists()


def test_a_traceback_on_request(folders, monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["inspect", "/nowhere"])
    assert isinstance(result.exception, FileNotFoundError)


def test_help_and_version_name_everything():
    output = run("--help").output
    for command in ("demo", "prune", "eval", "bench", "inspect"):
        assert command in output
        assert "Usage" in run(command, "--help").output
    assert re.match(r"sparseprune \d+\.\d+\.\d+, \w+ kernels", run("--version").output)
