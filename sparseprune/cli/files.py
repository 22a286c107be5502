"""The files that a command reads and writes, and the mistakes one can make with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseprune.cli.console import bar
from sparseprune.cli.options import DType

__all__ = ["check_out", "check_text", "load_any", "load_dense", "read_text"]


def load_any(path: Path, dtype: DType) -> tuple[Any, Any | None]:
    """(model, tokenizer) from any of the three kinds of MODEL."""
    from sparseprune.io.checkpoint import is_checkpoint, load, load_tokenizer

    if not is_checkpoint(path):
        return load_dense(path, dtype)
    with bar("loading") as update:
        model = load(path, progress=update)
    stored = str(model.dtype).removeprefix("torch.")
    if dtype is not DType.auto and dtype.value != stored:
        raise ValueError(
            f"--dtype: {path} holds {stored}, got {dtype.value}; prune the dense model in that dtype"
        )
    return model, load_tokenizer(path)


def load_dense(path: Path, dtype: DType, argument: str = "MODEL") -> tuple[Any, Any | None]:
    """(model, tokenizer) of a model that must be dense; `argument` names it in the error."""
    import torch

    from sparseprune.io.checkpoint import is_checkpoint
    from sparseprune.models import loading

    if is_checkpoint(path):
        raise ValueError(
            f"{argument}: must be dense, {path} is sparse already; pass the model it was made from"
        )
    if dtype is not DType.auto:
        return loading.load_dense(path, getattr(torch, dtype.value))
    gguf = path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file())
    return loading.load_dense(path, torch.bfloat16 if gguf else None)


def check_out(model: Path, out: Path) -> None:
    """Nothing of the user's may be lost, and better now than after minutes of work."""
    from sparseprune.io.checkpoint import is_checkpoint
    from sparseprune.io.shards import INDEX_FILE, WEIGHTS_FILE

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"OUT: must be a folder, got the file {out}; name another")
    if any((out / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE)) and not is_checkpoint(out):
        raise ValueError(f"OUT: {out} holds a model that is not of sparseprune; name another folder")


def check_text(option: str, path: Path | None) -> None:
    """A text that a command will read after its model: that it is missing is said before."""
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}; pass a text file, UTF-8")


def read_text(option: str, path: Path) -> str:
    """The text of a UTF-8 file, the value of `option`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: must be UTF-8 text, {path} is not ({error.reason} at byte {error.start})"
        ) from None
