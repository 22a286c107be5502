"""What a command shows: results on stdout, all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

__all__ = ["bar", "out", "say"]


def out(data: dict[str, Any], text: Callable[[], str], as_json: bool) -> None:
    """The command's result, as JSON or as text."""
    typer.echo(json.dumps(data, indent=2) if as_json else text())


def say(text: str) -> None:
    """A line about what happens now."""
    typer.secho(text, err=True, dim=True)


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, moved by calls with what is done and the total."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
