"""How an option is written: once, for Python and for the command line.

The options of a recipe are a frozen dataclass that checks itself when it is made. A field that `option` makes has a line of
help and becomes an option of the commands that take the class (`sparseprune/cli/options.py`); a plain field, a callable
say, is for Python alone. Nothing here imports torch, so that `--help` need not wait for it: a check that has to look
something up imports what it needs when it runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

__all__ = [
    "Layers",
    "Names",
    "Option",
    "Windowing",
    "option",
    "require_above",
    "require_among",
    "require_at_least",
    "require_function",
    "require_made",
    "require_path",
    "require_share",
]


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field beside its name, type and default.

    Attributes:
        help: one sentence for `--help`.
        flag: "--name" where it is not the field's own.
        given: the type of what is typed, where the field's is not one that can be typed.
        read: from what is typed to the field's value.
    """

    help: str
    flag: str | None = None
    given: Any = None
    read: Callable[[Any], Any] | None = None


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    given: Any = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is an option of the command line, too; see `Option`."""
    return field(default=default, metadata={"option": Option(help, flag, given, read)})


def require_at_least(least: int, optional: bool = False, **values: int | None) -> None:
    """Raises ValueError unless each of `values` is a whole number of at least `least`; `optional`: or None."""
    for name, value in values.items():
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}: must be a whole number of at least {least}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")


def require_above(limit: float, remedy: str = "", **values: float | None) -> None:
    """Raises ValueError unless each of `values` is None or a finite number above `limit`."""
    for name, value in values.items():
        if value is not None and not (_is_number(value) and limit < value < math.inf):
            raise ValueError(_sentence(f"{name}: must be above {limit:g}, got {value!r}", remedy))


def require_share(remedy: str = "", whole: bool = False, **values: float | None) -> None:
    """Raises ValueError unless each of `values` is None or in [0, 1); `whole`: or 1."""
    for name, value in values.items():
        if value is not None and not (_is_number(value) and (0 <= value < 1 or (whole and value == 1))):
            bounds = "[0, 1]" if whole else "[0, 1)"
            raise ValueError(_sentence(f"{name}: must be in {bounds}, got {value!r}", remedy))


def require_among(known: Sequence[str], **values: str) -> None:
    """Raises ValueError unless each of `values` is one of `known`."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r}")


def require_function(takes: str, **values: Any) -> None:
    """Raises TypeError unless each of `values` is None or a function; `takes` says of what."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}: must be a function {takes}, got {value!r}")


def require_path(optional: bool = False, **values: Any) -> None:
    """Raises TypeError unless each of `values` is a path, ValueError for an empty one; `optional`: or None."""
    for name, value in values.items():
        if value is None and optional:
            continue
        if not isinstance(value, (str, os.PathLike)):
            short = value is None or isinstance(value, (int, float))
            shown = repr(value) if short else f"a {type(value).__name__}"
            raise TypeError(f"{name}: must be a path, got {shown}; pass a str or a Path")
        if value == "":
            raise ValueError(f'{name}: must be a path, got ""; pass "." for the current folder')


def require_made(kind: type, **values: Any) -> None:
    """Raises TypeError unless each of `values` is a `kind`."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: must be a {kind.__name__}, got {value!r}; pass {kind.__name__}(...)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sentence(rule: str, remedy: str) -> str:
    return f"{rule}; {remedy}" if remedy else rule


@dataclass(frozen=True)
class Names:
    """Some of what has a name.

    Attributes:
        include, exclude: shell patterns over names, one or several; what matches some `include` (None: any) and no
            `exclude` is meant.
    """

    include: str | Sequence[str] | None = option(
        None, "Only layers whose name matches this shell pattern (repeatable).", given=list[str]
    )
    exclude: str | Sequence[str] | None = option(
        None, "Leave out layers that match this shell pattern (repeatable).", given=list[str]
    )

    def __post_init__(self) -> None:
        for argument in ("include", "exclude"):
            given = getattr(self, argument)
            if given is not None and not isinstance(given, Iterable):
                raise TypeError(f"{argument}: must be shell patterns over layer names, got {given!r}")
            for pattern in self.patterns(argument):
                if not isinstance(pattern, str):
                    raise TypeError(f"{argument}: must be shell patterns over layer names, got {pattern!r}")

    def patterns(self, argument: str) -> tuple[str, ...]:
        """One of the two as a tuple; nothing given is empty, be it all or none that is meant."""
        given = getattr(self, argument)
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    def check(self, known: Sequence[str], what: str, see: str = "model.named_modules()") -> None:
        """Raises ValueError unless every pattern matches a name of `known`, a `what` of the model: it would do nothing."""
        for argument in ("include", "exclude"):
            for pattern in self.patterns(argument) if known else ():
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise ValueError(
                        f"{argument}: {pattern!r} matches no {what}; names are such as {known[0]}, see {see}"
                    )


@dataclass(frozen=True)
class Layers(Names):
    """Which of a model's linears.

    Attributes:
        lm_head: the output head, too, and every linear whose weight is an embedding's.
    """

    lm_head: bool = option(False, "The output head, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lm_head, bool):
            raise ValueError(f"lm_head: must be True or False, got {self.lm_head!r}")

    def __str__(self) -> str:
        return f"include={self.include!r}, exclude={self.exclude!r}, lm_head={self.lm_head}"


@dataclass(frozen=True)
class Windowing:
    """How a text is cut into windows to calibrate on, see `sparseprune.calibration.windows`."""

    count: int = option(32, "Calibration windows.", flag="--samples")
    length: int = option(1024, "Tokens in a calibration window.")

    def __post_init__(self) -> None:
        require_at_least(1, count=self.count, length=self.length)
