"""The command line: `sparseprune demo | prune | cut | quantize | compress | recover | eval | bench | inspect`; a command is a file of this folder.

Tables and JSON go to stdout, progress and errors to stderr. A mistake of the user's (a file that is missing or damaged,
an option out of range) is one line on stderr and exit code 2.

torch and transformers take seconds to import, and `--help` must not wait for them: each command imports its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparseprune.cli.bench import bench
from sparseprune.cli.compress import compress
from sparseprune.cli.cut import cut
from sparseprune.cli.demo import demo
from sparseprune.cli.errors import spoken
from sparseprune.cli.evaluate import evaluate
from sparseprune.cli.inspect import inspect
from sparseprune.cli.options import flat
from sparseprune.cli.prune import prune
from sparseprune.cli.quantize import quantize
from sparseprune.cli.recover import recover

__all__ = ["app"]


class _Group(TyperGroup):
    """Turns the errors that name an argument, a rule and a remedy into one line each."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
            if os.environ.get("SPARSEPRUNE_TRACEBACK"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            if ctx.invoked_subcommand in self.commands:
                text = spoken(text, self.commands[ctx.invoked_subcommand])
            typer.secho(f"error: {text}", fg="red", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune a Transformer, run it on sparse CPU kernels, save it and load it again.\n\n"
    "MODEL is a Hugging Face folder, a GGUF file, or a folder that `sparseprune prune` wrote.",
    epilog="SPARSEPRUNE_ISA forces an instruction set, SPARSEPRUNE_TRACEBACK=1 shows where an error came from.",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prune": prune,
    "cut": cut,
    "quantize": quantize,
    "compress": compress,
    "recover": recover,
    "eval": evaluate,
    "bench": bench,
    "inspect": inspect,
}
for name, command in _COMMANDS.items():
    app.command(name)(flat(command))


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
