"""The files that a command reads and writes, and the mistakes one can make with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from sparseprune.cli.console import bar
from sparseprune.cli.options import DType

__all__ = ["check_dense", "check_out", "load_any", "load_dense", "text"]


def load_any(path: Path, dtype: DType) -> tuple[Any, Any | None]:
    """(model, tokenizer) from any of the three kinds of MODEL."""
    from sparseprune.io.checkpoint import is_checkpoint, load, load_tokenizer
    from sparseprune.io.skeleton import read_config

    if not is_checkpoint(path):
        return load_dense(path, dtype)
    if dtype is not DType.auto:
        stored = str(read_config(path).dtype).removeprefix("torch.")
        if dtype.value != stored:
            raise ValueError(
                f"--dtype: {path} holds {stored}, got {dtype.value}; prune the dense model in that dtype"
            )
    with bar("loading") as update:
        model = load(path, progress=update)
    return model, load_tokenizer(path)


def load_dense(path: Path, dtype: DType, argument: str = "MODEL") -> tuple[Any, Any | None]:
    """(model, tokenizer) of a model that must be dense; `argument` names it in the error."""
    import torch

    from sparseprune.models import loading

    check_dense(path, argument)
    gguf = path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file())
    kind = torch.bfloat16 if gguf else None
    try:
        return loading.load_dense(path, kind if dtype is DType.auto else getattr(torch, dtype.value))
    except (ValueError, OSError) as error:
        if not str(error).startswith("path: "):
            raise
        raise type(error)(str(error).replace("path", argument, 1)) from error


def check_dense(path: Path | None, argument: str = "MODEL") -> None:
    """A dense model that a command will read, perhaps after another: that there is none is said before."""
    from sparseprune.io.checkpoint import is_checkpoint

    if path is None:
        return
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}: there is no model at {path}; pass a Hugging Face folder or a GGUF file"
        )
    if is_checkpoint(path):
        raise ValueError(
            f"{argument}: must be dense, {path} is sparse already; pass the model it was made from"
        )


def check_out(model: Path, out: Path) -> None:
    """Nothing of the user's may be lost, and better now than after minutes of work."""
    from sparseprune.io.checkpoint import is_checkpoint
    from sparseprune.io.shards import INDEX_FILE, WEIGHTS_FILE

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"OUT: must be a folder, got the file {out}; name another")
    if any((out / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE)) and not is_checkpoint(out):
        raise ValueError(f"OUT: {out} holds a model that is not of sparseprune; name another folder")


@overload
def text(option: str, path: Path) -> str: ...


@overload
def text(option: str, path: Path | None) -> str | None: ...


def text(option: str, path: Path | None) -> str | None:
    """The text of a UTF-8 file, the value of `option`, if it is given; read before any model is loaded."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}; pass a text file, UTF-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: must be UTF-8 text, {path} is not ({error.reason} at byte {error.start})"
        ) from None
