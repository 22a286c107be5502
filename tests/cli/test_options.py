"""No option of a command is accepted and ignored, whatever stands beside it.

`COMMANDS` lists the ways in which each command is called, its modes, and `OPTIONS` what is typed for each option. In every
mode every option is typed: it is refused, before a model is loaded, where the mode says so, and changes the outcome in all
other modes. A new option without an entry fails, and so does one that a mode does not read and does not refuse.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from helpers.arguments import described, files
from helpers.clocks import ticking
from test_cli import TEXT, folders, tiny_llama
from typer.main import get_command
from typer.testing import CliRunner

from sparseprune.cli import app
from sparseprune.io import checkpoint
from sparseprune.measure import tasks
from sparseprune.models import loading
from sparseprune.streaming import stream

__all__ = ["folders"]  # a fixture


@dataclass(frozen=True)
class Unseen:
    """An option whose effect no outcome shows (how long is measured, where something is kept): a wrong value is refused."""

    words: str
    wrong: str
    says: str


@dataclass(frozen=True)
class Mode:
    """A way in which a command is called.

    Attributes:
        refused: the options that have no place in it.
        late: those of which only the model can tell.
        instead: what is typed for some options here.
        only: of those that count, the ones looked at; None: all. Another mode shows the others, which the same lines read.
    """

    line: str
    refused: str = ""
    late: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    only: str | None = None

    def looked_at(self, option: str) -> bool:
        named = f"{self.refused} {self.late} {self.only}".split()
        return self.only is None or option in named


HALF = "--pattern unstructured --sparsity 0.5"
FEW = "--calibration TEXT --samples 2 --length 32"
NAMES = {"include": "--include *mlp*", "exclude": "--exclude *mlp*"}
LAYERS = {**NAMES, "lm_head": "--lm-head"}
WINDOWS = {"count": "--samples 3", "length": "--length 16"}
CONVERSION = {
    "format": "--format bitmap",
    "policy": "--policy auto",
    "batch": Unseen("--batch 2", "--batch 0", "--batch: must be"),
    "seconds": Unseen("--seconds 0.1", "--seconds 0", "--seconds: must be above 0"),
}
SHOWN = {"dtype": "--dtype bfloat16", "as_json": "--json"}

OPTIONS = {
    "demo": {
        "keep": Unseen("--keep OUT", "--keep TEXT", "--keep: must be a folder"),
        "minutes": Unseen("--minutes 3", "--minutes -1", "--minutes: must be positive"),
        "as_json": Unseen("--json", "--minutes -1 --json", "--minutes"),
    },
    "prune": {
        "pattern": "--pattern 1:4",
        "method": "--method random",
        "sparsity": "--sparsity 0.6",
        "allocation": "--allocation *.q_proj=dense",
        "scope": "--scope row",
        "sequential": "--sequential",
        "reconstruction": "--reconstruct",
        "schedule": "--schedule gradual",
        "minutes": Unseen("--minutes 5", "--minutes 0", "--minutes: must be above 0"),
        "seed": "--seed 1",
        **WINDOWS,
        **LAYERS,
        **CONVERSION,
        "calibration": "--calibration OTHER",
        "max_bytes": Unseen("--max-bytes 60000", "--max-bytes 1", "--max-bytes: the layers take at least"),
        "max_ms": Unseen("--max-ms 100", "--max-ms 0", "--max-ms|seconds"),
        "recover_steps": "--recover-steps 1",
        "quantize": "--quantize int8",
        "stream": "--stream",
        "memory": "--memory 40GB",
        "spill": Unseen("--spill SPILL", "--spill TEXT", "TEXT|text.txt"),
        **SHOWN,
    },
    "cut": {
        "structure": "--structure neurons",
        "fraction": "--fraction 0.75",
        "criterion": "--criterion random",
        "seed": "--seed 1",
        **WINDOWS,
        **NAMES,
        "calibration": "--calibration OTHER --samples 2 --length 32",
        **SHOWN,
    },
    "quantize": {
        **WINDOWS,
        "encoding": "--encoding int8",
        "method": "--method gptq",
        "group_size": "--group-size 32",
        "scale_dtype": "--scale-dtype bfloat16",
        "keep": Unseen("--keep MODEL.gguf", "--keep NOWHERE", "--keep: there is no file"),
        "embeddings": "--embeddings int8",
        "reconstruction": "--reconstruct",
        "minutes": Unseen("--minutes 5", "--minutes 0", "--minutes: must be above 0"),
        **LAYERS,
        "calibration": "--calibration OTHER",
        "seed": "--seed 1",
        **SHOWN,
    },
    "compress": {
        "budget": "--budget 130KB",
        "minutes": Unseen("--minutes 1", "--minutes 0", "--minutes: must be above 0"),
        "keep": Unseen("--keep MODEL.gguf", "--keep NOWHERE", "--keep: there is no file"),
        **NAMES,
        "calibration": "--calibration OTHER",
        "length": "--length 16",
        "seed": "--seed 1",
        **SHOWN,
    },
    "recover": {
        "steps": "--steps 3",
        "minutes": "--minutes 1",
        "cross_entropy": "--cross-entropy 0.5",
        "logits": "--logits 0.5",
        "temperature": "--temperature 2",
        "hidden": "--hidden 0.5",
        "learning_rate": "--learning-rate 0.01",
        "windows": "--windows 3",
        "accumulate": Unseen("--accumulate 2", "--accumulate 3", "--accumulate: must divide"),
        "warmup": "--warmup 0.9",
        "final": "--final 1",
        "optimizer": "--optimizer sgd",
        "train": "--train all",
        "lora": "--lora 2",
        "compile": Unseen("--compile", "--compile --train all --lora 1", "--train: adapters"),
        **LAYERS,
        **CONVERSION,
        "text": "--text OTHER",
        "teacher": "--teacher DENSE",
        "length": "--length 16",
        "checkpoint": Unseen("--checkpoint RUN", "--checkpoint TEXT", "--checkpoint: must be a folder"),
        "dev": "--dev TEXT",
        "evaluate_every": "--evaluate-every 1",
        "seed": "--seed 1",
        "as_json": "--json",
    },
    "eval": {
        "text": "--text OTHER",
        "reference": "--reference DENSE",
        "layers": "--layers",
        "calibration": "--calibration TEXT",
        "tasks": "--tasks arc_easy",
        "limit": "--limit 3",
        "task_folder": "--task-folder OUT",
        "window": "--window 16",
        "stride": "--stride 8",
        "max_windows": "--max-windows 3",
        **SHOWN,
    },
    "bench": {
        "batch": Unseen("--batch 2", "--batch 0", "--batch"),
        "format": "--format bitmap",
        "seconds": Unseen("--seconds 0.2", "--seconds 0", "--seconds"),
        "tokens": "--tokens",
        **SHOWN,
    },
    "inspect": {"as_json": "--json"},
}  # fmt: skip

BLOCKS, RIA, MAGNITUDE = (
    {"pattern": "--pattern 8x1"}, {"method": "--method ria"}, {"method": "--method magnitude"},
)  # fmt: skip
FIRST = {"include": "--include *layers.0*", "exclude": "--exclude *layers.0*"}
OF_TEXT = "reference layers calibration window stride max_windows"
STREAM = (
    "lm_head reconstruction minutes schedule policy batch seconds quantize max_bytes max_ms recover_steps"
)
COMMANDS = {
    "demo": [],  # takes minutes: tests/test_demo.py runs it on a tiny model
    "prune": [
        Mode("DENSE OUT --policy always",
             "sparsity scope sequential reconstruction schedule minutes seed count length calibration batch seconds max_bytes "
             "max_ms recover_steps spill quantize"),
        Mode(f"DENSE OUT --policy always {HALF} --method random",
             "sequential reconstruction schedule minutes count length calibration batch seconds max_bytes max_ms recover_steps "
             "spill quantize",
             instead={"scope": "--scope layer"} | BLOCKS | MAGNITUDE, only="seed scope sparsity pattern method"),
        Mode(f"DENSE OUT --policy always {HALF} --method wanda {FEW}",
             "minutes batch seconds max_bytes max_ms recover_steps quantize",
             instead={"scope": "--scope layer"} | BLOCKS | RIA),
        Mode(f"DENSE OUT --policy always {HALF} --method sparsegpt --reconstruct {FEW}",
             "batch seconds max_bytes max_ms recover_steps stream memory spill quantize sequential",
             instead={"reconstruction": "--no-reconstruct", "sequential": "--no-sequential"} | BLOCKS | RIA,
             only="method scope reconstruction schedule count length calibration seed"),
        Mode(f"DENSE OUT --policy always {HALF} --schedule gradual --calibration TEXT --length 32",
             "sequential minutes count seed batch seconds max_bytes max_ms stream memory spill quantize",
             instead={"schedule": "--schedule greedy", "method": "--method random"},
             only="method scope sparsity allocation schedule recover_steps length calibration"),
        Mode(f"DENSE OUT --policy always {HALF} --method wanda --allocation search {FEW}",
             "batch seconds recover_steps stream memory spill quantize allocation", only="max_bytes max_ms"),
        Mode("DENSE OUT --stream",
             f"{STREAM} sparsity scope sequential seed count length calibration spill",
             instead={"stream": "--no-stream --policy always"}),
        Mode(f"DENSE OUT --stream {HALF} --method wanda {FEW}", STREAM,
             instead={"scope": "--scope layer", "stream": "--no-stream --policy always"} | BLOCKS | RIA,
             only="pattern method scope sequential calibration count length seed memory spill stream"),
        Mode("DENSE OUT --quantize int4",
             "sparsity scope sequential reconstruction schedule minutes seed count length format policy batch seconds max_bytes "
             "max_ms recover_steps stream memory spill",
             instead={"calibration": FEW}),
        Mode(f"DENSE OUT --quantize int4 {FEW}",
             "sparsity scope sequential schedule minutes format policy batch seconds max_bytes max_ms recover_steps "
             "stream memory spill quantize", only="calibration count length seed"),
    ],
    "cut": [
        Mode("DENSE OUT --structure heads --fraction 0.5", "count length seed", instead=FIRST),
        Mode("DENSE OUT --structure heads --fraction 0.5 --criterion random", "count length calibration",
             instead={"criterion": "--criterion l1"} | FIRST),
        Mode(f"DENSE OUT --structure neurons --fraction 0.5 {FEW}", "criterion",
             instead={"structure": "--structure heads"} | FIRST),
        Mode(f"DENSE OUT --structure layers --fraction 0.5 --exclude *layers.0 {FEW}",
             only="calibration count length seed"),
    ],
    "quantize": [
        Mode("DENSE OUT", "count length seed method reconstruction minutes", instead={"calibration": FEW}),
        Mode("DENSE OUT --method nearest", "count length seed calibration method reconstruction minutes", only="encoding"),
        Mode(f"DENSE OUT {FEW}", "encoding method", instead={"method": "--method nearest"},
             only="calibration count length seed group_size scale_dtype embeddings lm_head reconstruction minutes"),
    ],
    "compress": [Mode("DENSE OUT --budget 140KB --minutes 0.05 --calibration TEXT --length 32")],
    "recover": [
        Mode("SPARSE OUT --text TEXT --steps 2 --length 32 --policy always",
             "minutes logits temperature hidden evaluate_every batch seconds"),
        Mode("SPARSE OUT --text TEXT --steps 2 --length 32 --policy always --teacher DENSE --dev TEXT",
             "minutes batch seconds", instead={"dev": "--dev OTHER", "teacher": "--teacher OTHER_DENSE"},
             only="cross_entropy logits temperature hidden teacher dev evaluate_every seed"),
        Mode("SPARSE OUT --text TEXT --steps 2 --length 32 --policy always --lora 2",
             "minutes logits temperature hidden evaluate_every batch seconds train", instead={"lora": "--lora 3"},
             only="learning_rate optimizer lora include lm_head seed windows"),
    ],
    "eval": [
        Mode("DENSE --text TEXT --window 32 --max-windows 2", "layers limit task_folder"),
        Mode("SPARSE --text TEXT --window 32 --max-windows 2 --reference DENSE", "limit task_folder dtype",
             instead={"reference": "--reference OTHER_DENSE"},
             only="text reference layers calibration window stride max_windows"),
        Mode("DENSE --tasks piqa", OF_TEXT, instead={"text": "--text TEXT --window 32 --max-windows 2"},
             only="text tasks limit task_folder dtype"),
    ],
    "bench": [
        Mode("SPARSE --seconds 0.1 --no-tokens --batch 1", "dtype", late="format"),
        Mode("DENSE --seconds 0.1 --no-tokens --batch 1", only="dtype tokens"),
    ],
    "inspect": [Mode("DENSE")],
}  # fmt: skip

CASES = [
    pytest.param(name, number, option, id=f"{name}-{number}-{option}")
    for name, modes in COMMANDS.items()
    for number in range(len(modes))
    for option in OPTIONS[name]
    if modes[number].looked_at(option)
]


def is_compared(name, number, option):
    """Whether outcomes show that the option counts."""
    mode, entry = COMMANDS[name][number], OPTIONS[name][option]
    return not isinstance(entry, Unseen) and option not in f"{mode.refused} {mode.late}".split()


PARAMETERS = {
    name: {it.name: it for it in command.params} for name, command in get_command(app).commands.items()
}
FILES = {"model", "out"}


def call(name, line, root, out):
    """The command in process; words in capitals are files."""
    places = {
        "NOWHERE": root / "NOWHERE", "DENSE": root / "dense", "OTHER_DENSE": root / "other", "SPARSE": root / "sparse",
        "TEXT": root / "text.txt", "OTHER": root / "other.txt", "OUT": out, "SPILL": root / "spill", "RUN": root / "run",
    }  # fmt: skip
    return CliRunner().invoke(app, [name, *(str(places.get(word, word)) for word in shlex.split(line))])


def outcome(name, line, root, out):
    """What the command prints as JSON, and what it writes."""
    with ticking(0.1) if name == "compress" else nullcontext():
        result = call(name, f"{line} --json", root, out)
    assert result.exit_code == 0, result.output + result.stderr
    shown = described(json.loads(result.stdout.replace(str(out), "OUT"), object_hook=without_echoes))
    return [shown, [it for it in files(out) if not it[0].endswith("recovery.safetensors")]]


def without_echoes(shown):
    """JSON less what repeats the command line: it would change without anything being read."""
    return {key: value for key, value in shown.items() if key not in ("calibration", "settings", "text_name")}


def refusal(name, line, root, out):
    result = call(name, line, root, out)
    assert result.exit_code == 2, f"accepted: {line}\n{result.output}"
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def root(folders):
    words = sorted(set(TEXT.split()))
    for number, name in enumerate(("text.txt", "other.txt")):  # windows of it are unlike
        (folders / name).write_text(" ".join(random.Random(number).choices(words, k=600)))
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folders / "other")
    return folders


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    """The outcome of each mode, with nothing else typed."""
    known = {}

    def of(name, number):
        if (name, number) not in known:
            out = tmp_path_factory.mktemp("plain") / "out"
            known[name, number] = outcome(name, COMMANDS[name][number].line, root, out)
        return known[name, number]

    return of


@pytest.fixture(autouse=True)
def tasks_are_not_run(monkeypatch):
    """lm-eval takes minutes: here the scores tell what they were asked for."""

    def scores(model, tokenizer, names, **options):
        return tasks.TaskScores(
            (tasks.TaskScore(str(names), str(model.dtype), 0.5, None, None),), str(options)
        )

    monkeypatch.setattr(tasks, "zero_shot", scores)


@pytest.fixture
def nothing_loads(monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a model was loaded")

    for place, name in ((loading, "load_dense"), (checkpoint, "load"), (stream, "Source")):
        monkeypatch.setattr(place, name, never)


def test_each_option_has_an_entry():
    assert PARAMETERS.keys() == OPTIONS.keys() == COMMANDS.keys()
    for name, parameters in PARAMETERS.items():
        assert parameters.keys() - FILES == OPTIONS[name].keys(), name
        for mode in COMMANDS[name]:
            named = f"{mode.refused} {mode.late} {mode.only or ''}".split()
            assert {*named, *mode.instead} <= OPTIONS[name].keys(), mode


@pytest.mark.parametrize(("name", "number", "option"), CASES)
def test_it_is_refused_or_it_counts(name, number, option, root, plain, tmp_path, request):
    mode, entry = COMMANDS[name][number], OPTIONS[name][option]
    words = entry.words if isinstance(entry, Unseen) else entry
    words = mode.instead.get(option, words)
    if option in (refused := mode.refused.split()) + mode.late.split():
        if option in refused:
            request.getfixturevalue("nothing_loads")
        flag = max(PARAMETERS[name][option].opts, key=len)
        # itself, or what it does not go with
        named = "|".join([flag, option, *re.findall(r"--[\w-]+", mode.line)])
        assert re.search(
            rf"error: .*({named})\b", refusal(name, f"{mode.line} {words}", root, tmp_path / "out")
        )
    elif isinstance(entry, Unseen):
        error = refusal(name, f"{mode.line} {entry.wrong}", root, tmp_path / "out")
        assert re.search(entry.says, error)
    elif option == "as_json":
        json.loads(call(name, f"{mode.line} --json", root, tmp_path / "out").stdout)
        with pytest.raises(json.JSONDecodeError):
            json.loads(call(name, mode.line, root, tmp_path / "out").stdout)
    else:
        changed = outcome(name, f"{mode.line} {words}", root, tmp_path / "out")
        assert changed != plain(name, number), f"{words} does nothing beside {mode.line}"


@pytest.mark.parametrize(
    ("name", "number"),
    list(dict.fromkeys((it.values[0], it.values[1]) for it in CASES if is_compared(*it.values))),
)
def test_a_mode_gives_the_same_each_time(name, number, root, plain, tmp_path):
    """Or a difference would say nothing."""
    assert outcome(name, COMMANDS[name][number].line, root, tmp_path / "out") == plain(name, number)


@pytest.mark.parametrize("name", [name for name, modes in COMMANDS.items() if modes])
def test_the_files_count(name, root, tmp_path):
    line = COMMANDS[name][0].line
    first = line.split()[0]
    assert "NOWHERE" in refusal(name, line.replace(first, "NOWHERE", 1), root, tmp_path / "out")
    if "out" in PARAMETERS[name]:
        assert "OUT: must be a folder" in refusal(name, line.replace("OUT", "TEXT"), root, tmp_path / "out")


@pytest.mark.parametrize("words", [OPTIONS["demo"]["keep"], OPTIONS["demo"]["minutes"]])
def test_the_demos_options_count(words, root, tmp_path):
    assert re.match(f"error: {words.says}", refusal("demo", words.wrong, root, tmp_path / "out"))


@pytest.mark.parametrize(
    "line",
    [
        "prune DENSE OUT --method wanda --calibration TEXT --samples 2 --policy always",
        "prune DENSE OUT --pattern unstructured --sparsity 0.5 --method wanda --schedule gradual --calibration TEXT --samples 2",
        "cut DENSE OUT --structure neurons --fraction 0.5 --calibration TEXT --samples 2",
        "quantize DENSE OUT --encoding int4 --calibration TEXT --samples 2",
        "compress DENSE OUT --budget 140KB --minutes 0.05 --calibration TEXT",
        "recover SPARSE OUT --text TEXT --steps 1 --policy always",
    ],
)
def test_windows_longer_than_the_model_reads_are_cut_and_it_is_said_once(line, root, tmp_path):
    name, line = line.split(" ", 1)
    with ticking(0.1) if name == "compress" else nullcontext():
        result = call(name, f"{line} --length 100000", root, tmp_path / "out")
    assert result.exit_code == 0, result.output + result.stderr
    said = re.findall(
        r"windows have (\d+) tokens instead of 100000: the model's positions end there", result.stderr
    )
    assert len(said) == 1
