"""Puts the tables of a run into docs/benchmarks.md, between the comments that name them.

python benchmarks/page.py docs/benchmarks.json docs/benchmarks.md --llama-cpp docs/benchmarks-llama-cpp.json
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import peers_deepsparse
import peers_llama_cpp
import tables
import typer
from layers import SHAPES, describe
from targets import TARGETED_MODEL

PEERS = ("deepsparse", "llama_cpp")
"""Measured by scripts of their own."""


def main(
    run: Path,
    page: Path,
    deepsparse: Annotated[Path | None, typer.Option(help="JSON of peers_deepsparse.py.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="JSON of peers_llama_cpp.py.")] = None,
) -> None:
    """Fill every section `<!-- begin NAME -->` to `<!-- end NAME -->` of PAGE from RUN; any other text stays.

    Without the JSON of a peer its sections stay as they are.
    """
    record = json.loads(run.read_text())
    (other,) = (it for it in SHAPES if it != TARGETED_MODEL)
    sections: dict[str, Callable[[], str]] = {
        "machine": lambda: (
            f"{describe(record['machine'])}. {record['started']}, {record['minutes']} minutes."
        ),
        "score": lambda: tables.score(record),
        "targets": lambda: tables.markdown(tables.summary(record, TARGETED_MODEL)),
        "small": lambda: tables.markdown(tables.summary(record, other)),
        "losses": lambda: tables.markdown(tables.losses(record)),
        "masks": lambda: tables.markdown(tables.masks(record)),
        "conversions": lambda: tables.markdown(tables.conversions(record)),
        "sizes": lambda: tables.markdown(tables.sizes(record)),
        "calls": lambda: tables.markdown(tables.calls(record)),
        "details": lambda: tables.markdown(tables.details(record, TARGETED_MODEL)),
    }
    if deepsparse is not None:
        peer = json.loads(deepsparse.read_text())
        sections["deepsparse"] = lambda: tables.markdown(peers_deepsparse.table(peer))
    if llama_cpp is not None:
        runs = json.loads(llama_cpp.read_text())
        for name, run_ in runs.items():
            shown = peers_llama_cpp.table(peers_llama_cpp.MODELS[name], run_)
            sections[f"llama_cpp {name}"] = functools.partial(tables.markdown, shown)
    text = page.read_text()
    for name in re.findall(r"<!-- begin ([\w -]+?) -->", text):
        if name.split()[0] in PEERS and name not in sections:
            continue
        if name not in sections:
            raise typer.BadParameter(f"page: sections are {', '.join(sections)}, got {name}")
        fresh = f"<!-- begin {name} -->\n{sections[name]()}\n<!-- end {name} -->"
        text = re.sub(
            rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _, t=fresh: t, text, flags=re.DOTALL
        )
    page.write_text(text)


if __name__ == "__main__":
    typer.run(main)
