"""`sparseprune prune` on a checkpoint that is not loaded."""

import json
import re

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import save, weights
from typer.testing import CliRunner

from sparseprune.cli import app
from sparseprune.io.checkpoint import load, load_tokenizer


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """The checkpoint of a model that reads words, and a text for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save(tiny.llama(layers=3), tmp_path_factory.mktemp("words"))
    words = [f"w{number}" for number in range(90)]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, "[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(" ".join(words[number * number % 89] for number in range(3000)))
    return folder, text


def command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in ("prune", *arguments)])
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_the_command_streams(with_tokenizer, tmp_path):
    folder, text = with_tokenizer
    arguments = ("--method", "wanda", "--calibration", text, "--samples", 3, "--length", 100)
    result = command(
        folder, tmp_path / "out", "--stream", "--memory", "4GB", "--spill", tmp_path / "s", *arguments
    )
    assert "windows have 64 tokens instead of 100: the model's positions end there" in result.stderr
    assert re.search(r"peak memory .* [MG]iB of 3.7 GiB allowed", result.stdout)
    assert "3 windows of 64 tokens" in result.stdout
    assert f"saved in {tmp_path / 'out'}" in result.stdout
    assert load_tokenizer(tmp_path / "out")("w3 w5").input_ids == [4, 6]
    data = json.loads(command(folder, tmp_path / "whole", "--policy", "always", "--json", *arguments).stdout)
    in_memory, streamed = weights(load(tmp_path / "whole")), weights(load(tmp_path / "out"))
    assert all(torch.equal(streamed[name], weight) for name, weight in in_memory.items())
    again = json.loads(command(folder, tmp_path / "again", "--memory", "4GB", "--json", *arguments).stdout)
    assert again["pruned"]["layers"] == data["pruned"]["layers"]
    assert again["saved"] == str(tmp_path / "again")


def test_the_command_streams_by_itself_what_takes_half_of_the_memory(with_tokenizer, tmp_path, monkeypatch):
    folder, _ = with_tokenizer
    monkeypatch.setattr("sparseprune.memory.available_memory", lambda: 100_000)
    result = command(folder, tmp_path / "whole", "--no-stream", "--policy", "always")
    assert "streamed" not in result.stderr
    monkeypatch.setattr("sparseprune.streaming.plan.available_memory", lambda: 1 << 30)
    result = command(folder, tmp_path / "out", "--allocation", "*down_proj=dense")
    assert "more than half of the 97.7 KiB available: it is streamed block by block" in result.stderr.replace(
        "\n", ""
    )
    assert "18 layers 2:4: pruned to 2:4" in result.stdout
    assert "3 layers dense: too few zeros (0.0%): no sparse format would be smaller" in result.stdout


def test_the_command_refuses_what_cannot_be_streamed(with_tokenizer, tmp_path):
    folder, text = with_tokenizer
    for arguments, message in (
        (("--lm-head",), "--lm-head: needs the whole model in memory"),
        (("--reconstruct", "--calibration", text), "--reconstruct: needs the whole model in memory"),
        (("--method", "taylor", "--calibration", text), "--method: must do without the whole model"),
        (("--method", "ria+permute", "--calibration", text), "--method: must prune each block by itself"),
        (
            ("--pattern", "unstructured", "--sparsity", "0.5", "--allocation", "owl", "--calibration", text),
            '--allocation: must be "uniform" or',
        ),
        (("--memory", "lots"), "--memory: must be a size such as"),
        (("--memory", "100MB"), "--memory: must be at least"),
    ):
        line = (
            command(folder, tmp_path / "out", "--stream", *arguments, code=2).stderr.strip().splitlines()[-1]
        )
        assert line.startswith(f"error: {message}"), line
    assert (
        "--memory, --spill: go with"
        in command(folder, tmp_path / "out", "--no-stream", "--memory", "1GB", code=2).stderr
    )
    for how in ("--stream", "--no-stream"):  # in shards, so there is no model.safetensors to see
        assert "error: OUT:" in command(folder, folder, how, code=2).stderr
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    error = command(tmp_path / "model.gguf", tmp_path / "out", "--stream", code=2).stderr
    assert "MODEL: must be a Hugging Face folder to be streamed" in error
    assert not (tmp_path / "out").exists()
