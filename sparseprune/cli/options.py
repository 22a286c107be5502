"""Arguments and options that several commands share, and how a class of options becomes options of a command."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sparseprune.options import Option

__all__ = [
    "Batches",
    "Calibration",
    "DType",
    "DTypeOption",
    "Json",
    "Model",
    "Out",
    "Typed",
    "flat",
]


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file, or a folder of ours.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made if missing.")]
Calibration = Annotated[Path | None, typer.Option(help="Text file to calibrate on, UTF-8.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DTypeOption = Annotated[
    DType, typer.Option(help="Dtype of the weights; auto: as in the folder, bfloat16 for a GGUF file.")
]
Batches = Annotated[
    list[int],
    typer.Option("--batch", min=1, help="Batch size (rows of activations) that counts (repeatable)."),
]


class Typed(frozenset[str]):
    """Names of the options that stand on the command line, with whatever value, be it the default."""

    def refuse(self, *names: str, rule: str) -> None:
        """Raises ValueError for the first of `names` that was typed: it would do nothing, and `rule` says why."""
        for name in names:
            if name in self:
                raise ValueError(f"{name}: {rule}")


def flat(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` as typer can read it: a parameter whose type is a class of options gives way to its fields' options.

    Help is shown as it is written. The class is made before the command runs, so what is wrong with an option is said
    before any work. Fields of the same name in two classes are one option, and both get its value. A parameter of type
    `Typed` gets the names of the options that were typed.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type] = {}
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = {"context": context}
    for name, parameter in signature.parameters.items():
        if parameter.annotation is Typed:
            continue
        if not is_dataclass(parameter.annotation):
            parameters[name] = _plain(parameter)
            continue
        groups[name] = parameter.annotation  # type: ignore[assignment]
        for field in _options(groups[name]):
            parameters.setdefault(field.name, _parameter(groups[name], field))

    @functools.wraps(command)
    def run(context: typer.Context, **given: Any) -> Any:
        made: dict[str, Any] = {
            name: group(**{it.name: _value(it, given[it.name]) for it in _options(group)})
            for name, group in groups.items()
        }
        made |= {name: _typed(context) for name, it in signature.parameters.items() if it.annotation is Typed}
        return command(**{name: it for name, it in given.items() if name in signature.parameters}, **made)

    del run.__wrapped__  # type: ignore[attr-defined]  # typer would read its signature
    run.__doc__ = _escape(command.__doc__ or "")
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: it.annotation for name, it in parameters.items()}
    return run


def _typed(context: typer.Context) -> Typed:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return Typed(name for name, it in sources.items() if it is not None and it.name == "COMMANDLINE")


def _options(group: type) -> list[Field[Any]]:
    return [it for it in fields(group) if "option" in it.metadata]


def _parameter(group: type, field: Field[Any]) -> inspect.Parameter:
    about: Option = field.metadata["option"]
    kind = about.given or eval(str(field.type), vars(sys.modules[group.__module__]))  # noqa: S307, our own source
    flag = about.flag or "--" + field.name.replace("_", "-")  # given, lest typer adds "--no-..." to a switch
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if about.read is not None or get_origin(kind) is list:
        kind, default = kind | None, None  # several, or none given: the field's default
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[_choices(field.name, kind), typer.Option(flag, help=_escape(about.help))],
    )


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, about = get_args(parameter.annotation)
    about = copy.copy(about)  # `Json`, say, is of several commands
    about.help = _escape(about.help)
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, about])


def _escape(text: str) -> str:
    """Square brackets are what rich takes for markup, and would leave out."""
    return text.replace("[", r"\[")


def _choices(name: str, kind: Any) -> Any:
    """Words to choose from as an `Enum`, the only such type that every typer knows."""
    if get_origin(kind) is Literal:
        return Enum(name, {word: word for word in get_args(kind)}, type=str)
    words = [it for it in get_args(kind) if get_origin(it) is Literal]
    return _choices(name, words[0]) | None if words else kind


def _value(field: Field[Any], given: Any) -> Any:
    read = field.metadata["option"].read
    given = given.value if isinstance(given, Enum) else given
    if given is None or given == []:
        return field.default
    return given if read is None else read(given)
