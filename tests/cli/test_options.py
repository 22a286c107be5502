"""No option of a command is accepted and ignored: for each there is a command line that shows it counts."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
from helpers.arguments import described, files
from helpers.clocks import ticking
from test_cli import TEXT, folders
from typer.main import get_command
from typer.testing import CliRunner

from sparseprune.cli import app

__all__ = ["folders"]  # a fixture

COMMANDS = get_command(app).commands


@dataclass(frozen=True)
class Refused:
    """Options behind the command's own ones, and what the error says."""

    options: str
    says: str
    alone: bool = False
    """Whether they stand without the command's own ones."""


@dataclass(frozen=True)
class Changes:
    """Options that make the outcome another, and others that stand beside them either way."""

    options: str
    beside: str = ""


# What each command is called with beside the option that is looked at.
USUAL = {
    "demo": "",
    "prune": "DENSE OUT --policy always",
    "cut": "DENSE OUT --structure heads --fraction 0.5",
    "quantize": "DENSE OUT --method nearest",
    "compress": "DENSE OUT --budget 40KB --minutes 0.05 --calibration TEXT --length 32",
    "recover": "SPARSE OUT --text TEXT --steps 2 --length 32 --policy always",
    "eval": "DENSE --text TEXT --window 32 --max-windows 2",
    "bench": "SPARSE --seconds 0.1 --no-tokens --batch 1",
    "inspect": "DENSE",
}
HALF = "--pattern unstructured --sparsity 0.5"
FEW = "--calibration TEXT --samples 2 --length 32"
MODEL = Refused("NOWHERE OUT", "NOWHERE", alone=True)
OUT = Refused("DENSE TEXT", "OUT: must be a folder")
NOTHING = {
    "include": Refused("--include nothing", "--include: 'nothing' matches no"),
    "exclude": Refused("--exclude nothing", "--exclude: 'nothing' matches no"),
}
WINDOWS = {
    "count": Refused("--samples 0", "--samples: must be at least 1"),
    "length": Refused("--length 0", "--length: must be at least 1"),
}
CONVERSION = {
    "format": Refused("--format 3-4", "--format: must be"),
    "policy": Refused("--policy never", "--policy"),
    "batch": Refused("--batch 8", "--batch: nothing is measured"),
    "seconds": Refused("--seconds 8", "--seconds: nothing is measured"),
}
JSON = {"as_json": Changes("--json")}
DTYPE = {"dtype": Changes("--dtype bfloat16")}

TABLES = {
    "demo": {
        "keep": Refused("--keep TEXT", "--keep: must be a folder"),
        "minutes": Refused("--minutes -1", "--minutes: must be"),
    },
    "prune": {
        "model": MODEL,
        "out": OUT,
        "pattern": Changes("--pattern 1:4"),
        "method": Changes("--method random"),
        "sparsity": Changes("--sparsity 0.6", "--pattern unstructured --sparsity 0.5"),
        "allocation": Changes("--allocation *.q_proj=dense"),
        "scope": Changes("--scope row", HALF),
        "sequential": Changes("--sequential", f"--method wanda {FEW}"),
        "reconstruction": Changes("--reconstruct", f"--method wanda {FEW}"),
        "schedule": Changes("--schedule gradual", f"{HALF} --method wanda {FEW}"),
        "minutes": Refused("--minutes 5", "--minutes: bounds"),
        "seed": Changes("--seed 1", "--method random"),
        **WINDOWS,
        **NOTHING,
        "lm_head": Changes("--lm-head"),
        **CONVERSION,
        "calibration": Refused("--calibration TEXT", "--calibration: method magnitude looks at weights only"),
        "max_bytes": Refused("--max-bytes 1000", "--max-bytes, --max-ms: must come with"),
        "max_ms": Refused("--max-ms 1", "--max-bytes, --max-ms: must come with"),
        "recover_steps": Changes("--recover-steps 1", f"{HALF} --method wanda {FEW} --schedule gradual"),
        "quantize": Refused("--quantize int4", "--quantize is int4"),
        **DTYPE,
        "stream": Changes("--stream"),
        "memory": Refused("--memory lots", "--memory: must be a size"),
        "spill": Refused("--no-stream --spill OUT", "--memory, --spill: go with"),
        **JSON,
    },
    "cut": {
        "model": Refused("NOWHERE OUT --structure heads --fraction 0.5", "NOWHERE", alone=True),
        "out": OUT,
        "structure": Changes("--structure neurons"),
        "fraction": Refused("--fraction 1.5", "--fraction: must be in"),
        "criterion": Changes("--criterion random"),
        "seed": Changes("--seed 1", "--criterion random"),
        **WINDOWS,
        **NOTHING,
        "calibration": Changes(FEW),
        **DTYPE,
        **JSON,
    },
    "quantize": {
        "model": MODEL,
        "out": OUT,
        **WINDOWS,
        "encoding": Changes("--encoding int8"),
        "method": Refused("--method gptq", "--calibration: method gptq needs some"),
        "group_size": Refused("--group-size 17", "--group-size: must be"),
        "scale_dtype": Changes("--scale-dtype bfloat16"),
        "keep": Refused("--keep NOWHERE", "--keep: there is no file"),
        "embeddings": Changes("--embeddings int8"),
        "reconstruction": Refused("--reconstruct", "--calibration: reconstruction needs some"),
        "minutes": Refused("--minutes 1", "--minutes: bounds what is solved"),
        **NOTHING,
        "lm_head": Changes("--lm-head"),
        "calibration": Refused(FEW, "--calibration: method nearest looks at weights only"),
        "seed": Changes("--seed 1", "--method gptq --calibration TEXT --samples 1 --length 7"),
        **DTYPE,
        **JSON,
    },
    "compress": {
        "model": Refused("NOWHERE OUT --budget 40KB --calibration TEXT", "NOWHERE", alone=True),
        "out": Refused("DENSE TEXT --budget 40KB --calibration TEXT", "OUT: must be a folder", alone=True),
        "budget": Refused("--budget much", "--budget: must be a size"),
        "minutes": Refused("--minutes 0", "--minutes: must be above 0"),
        "keep": Refused("--keep NOWHERE", "--keep: there is no file"),
        **NOTHING,
        "calibration": Refused("--calibration NOWHERE", "--calibration: there is no file"),
        "length": Changes("--length 16"),
        "seed": Changes("--seed 1"),
        **DTYPE,
        **JSON,
    },
    "recover": {
        "model": Refused("NOWHERE OUT --text TEXT --steps 1", "NOWHERE", alone=True),
        "out": Refused("SPARSE TEXT --text TEXT --steps 1", "OUT: must be a folder", alone=True),
        "steps": Changes("--steps 3"),
        "minutes": Refused("--minutes 1", "steps, minutes: one of the two"),
        "cross_entropy": Changes("--cross-entropy 0.5", "--teacher DENSE"),
        "logits": Changes("--logits 0.5", "--teacher DENSE"),
        "temperature": Changes("--temperature 2", "--teacher DENSE"),
        "hidden": Changes("--hidden 0.5", "--teacher DENSE"),
        "learning_rate": Changes("--learning-rate 0.01"),
        "windows": Changes("--windows 3"),
        "accumulate": Refused("--accumulate 3", "--accumulate: must divide"),
        "warmup": Changes("--warmup 0.9"),
        "final": Changes("--final 1", "--steps 3"),
        "optimizer": Changes("--optimizer sgd"),
        "train": Changes("--train all"),
        "lora": Changes("--lora 2"),
        "compile": Refused("--compile --train all --lora 1", "--train: adapters"),
        **NOTHING,
        "lm_head": Changes("--lm-head"),
        **CONVERSION,
        "text": Refused("--text NOWHERE", "--text: there is no file"),
        "teacher": Changes("--teacher DENSE"),
        "length": Changes("--length 16"),
        "checkpoint": Refused("--checkpoint TEXT", "--checkpoint: must be a folder"),
        "dev": Changes("--dev TEXT"),
        "evaluate_every": Changes("--evaluate-every 1", "--dev TEXT"),
        "seed": Changes("--seed 1"),
        **JSON,
    },
    "eval": {
        "model": Refused("NOWHERE --text TEXT", "NOWHERE", alone=True),
        "text": Refused("--text NOWHERE", "--text: there is no file"),
        "reference": Changes("--reference DENSE"),
        "layers": Refused("--layers", "--layers: must come with --reference"),
        "calibration": Changes("--calibration TEXT"),
        "tasks": Refused("DENSE --tasks no_such_task", "tasks are run by|is not a task", alone=True),
        "limit": Refused("--limit 3", "--limit, --task-folder: must come with --tasks"),
        "task_folder": Refused("--task-folder OUT", "--limit, --task-folder: must come with --tasks"),
        "window": Changes("--window 16"),
        "stride": Changes("--stride 8"),
        "max_windows": Changes("--max-windows 3"),
        **DTYPE,
        **JSON,
    },
    "bench": {
        "model": Refused("NOWHERE", "NOWHERE", alone=True),
        "batch": Refused("--batch 0", "--batch"),
        "format": Refused("--format 3-4", "--format: must be"),
        "seconds": Refused("--seconds 0", "--seconds"),
        "tokens": Changes("--tokens"),
        "dtype": Refused("--dtype bfloat16", "--dtype: .* holds float32"),
        **JSON,
    },
    "inspect": {"model": Refused("NOWHERE", "NOWHERE", alone=True), **JSON},
}


def test_each_option_has_an_entry():
    assert TABLES.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        has = {it.name for it in command.params}
        assert has - ({"as_json"} if name == "demo" else set()) == TABLES[name].keys(), name


def call(name, options, root, out):
    """The command in process; words in capitals are files."""
    places = {
        "NOWHERE": root / "NOWHERE", "DENSE": root / "dense", "SPARSE": root / "sparse", "TEXT": root / "text.txt", "OUT": out,
    }  # fmt: skip
    words = [str(places.get(word, word)) for word in shlex.split(options)]
    return CliRunner().invoke(app, [name, *words])


def outcome(name, options, root, out):
    with ticking(0.02) if name == "compress" else nullcontext():
        result = call(name, options, root, out)
    assert result.exit_code == 0, result.output + result.stderr
    shown = result.stdout.replace(str(out), "OUT")
    try:
        shown = described(json.loads(shown))
    except json.JSONDecodeError:
        shown = re.sub(
            r"\d[\d.,]*( s| ms|x)?|[ ─━]+", "", shown
        )  # as a table: what it has, not how fast it was
    return [shown, [it for it in files(out) if not it[0].endswith("recovery.safetensors")]]


@pytest.fixture(scope="module")
def root(folders):
    (folders / "text.txt").write_text(TEXT * 3)
    return folders


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, table in TABLES.items() for option in table]
)
def test_it_counts(name, option, root, tmp_path):
    entry = TABLES[name][option]
    if isinstance(entry, Refused):
        line = entry.options if entry.alone else f"{USUAL[name]} {entry.options}"
        if option == "out":
            line = re.sub(r"\bOUT\b", "TEXT", USUAL[name]) if not entry.alone else entry.options
        result = call(name, line, root, tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert re.search(entry.says, " ".join((result.stderr + result.output).split())), result.stderr
        return
    plain = f"{USUAL[name]} {entry.beside}" + ("" if option == "as_json" else " --json")
    first = outcome(name, plain, root, tmp_path / "plain")
    assert first == outcome(name, plain, root, tmp_path / "again"), "the outcome is another each time"
    assert first != outcome(name, f"{plain} {entry.options}", root, tmp_path / "changed")
