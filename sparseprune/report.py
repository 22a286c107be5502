"""Tables for people, JSON for programs: a report says once what it holds, and gives both."""

from __future__ import annotations

import io
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Alike", "Column", "Report", "Table", "alike", "human_bytes", "plain", "track"]

T = TypeVar("T")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def human_bytes(count: float) -> str:
    """Bytes in binary units, three digits: `human_bytes(94371840)` is "90.0 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {unit}"


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return "x".join(str(item) for item in value)
    return str(value)


@dataclass(frozen=True)
class Column:
    """A column's heading, how its values read, and where they come from.

    Attributes:
        format: a format spec (".1%") or a function from value to text. `None` always reads "-".
        value: what it shows of the thing that a row is about, for `Table.of`.
        optional: left out of a table where it has no value in any row.
    """

    name: str
    format: str | Callable[[Any], str] = _plain
    value: Callable[[Any], Any] | None = None
    optional: bool = False

    def text(self, value: Any) -> str:
        if value is None:
            return "-"
        return self.format(value) if callable(self.format) else format(value, self.format)


@dataclass(frozen=True)
class Table:
    """Rows under named columns; a column given as a plain string shows its values as they are.

    `rows` hold raw values (numbers, strings, shapes as tuples, None), so that `to_dict` loses nothing to
    formatting. `footer` lines of text follow the table: totals, the protocol of a measurement.
    """

    title: str
    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]
    footer: Sequence[str] = ()

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows: each row needs one value per column ({len(self.columns)}), row {index} has "
                    f"{len(row)}"
                )

    @classmethod
    def of(
        cls, title: str, columns: Iterable[Column], things: Iterable[Any], footer: Sequence[str] = ()
    ) -> Table:
        """A row for each of `things`, which every column takes its value of."""
        things = list(things)
        found = []
        for column in columns:
            if column.value is None:
                raise ValueError(f"columns: {column.name} must say what its value is, it has none")
            values = [column.value(thing) for thing in things]
            if not column.optional or any(value is not None for value in values):
                found.append((column, values))
        rows = [tuple(values[index] for _, values in found) for index in range(len(things))]
        return cls(title, [column for column, _ in found], rows, footer)

    def render(self, color: bool | None = None) -> str:
        """The table as text, wide enough for every cell. `color` defaults to whether stdout is a terminal."""
        from rich import box
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table as RichTable
        from rich.text import Text

        color = sys.stdout.isatty() if color is None else color
        columns = [column if isinstance(column, Column) else Column(column) for column in self.columns]
        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            numbers = [row[index] for row in self.rows if row[index] is not None]
            numeric = bool(numbers) and all(isinstance(value, (int, float)) for value in numbers)
            table.add_column(Text(column.name), justify="right" if numeric else "left", no_wrap=True)
        for row in self.rows:
            # Text, not str: a value such as "[out, in]" is not markup
            table.add_row(*(Text(column.text(value)) for column, value in zip(columns, row, strict=True)))
        # A console cuts cells that do not fit; a table for a file or a pipe must not lose any.
        unlimited = Console(file=io.StringIO(), width=1_000_000)
        width = Measurement.get(unlimited, unlimited.options, table).maximum
        stream = io.StringIO()
        console = Console(
            file=stream,
            width=max(width, len(self.title), *(len(line) for line in self.footer), 1),
            force_terminal=color,
            color_system="standard" if color else None,
        )
        console.print(table)
        for line in self.footer:
            console.print(Text(line))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines() if line.strip())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `{"title", "columns", "rows": [{column: value}], "footer"}`, the values unformatted."""
        names = [column.name if isinstance(column, Column) else column for column in self.columns]
        rows = [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in zip(names, row, strict=True)
            }
            for row in self.rows
        ]
        return {"title": self.title, "columns": names, "rows": rows, "footer": list(self.footer)}

    def __str__(self) -> str:
        return self.render()


class Report(ABC):
    """A dataclass that prints as a table, and is JSON by its fields and properties."""

    @abstractmethod
    def table(self) -> Table:
        """What people read."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every field and property, those of what it holds too."""
        return dict(plain(self))

    def __str__(self) -> str:
        return self.table().render()


def plain(value: Any) -> Any:
    """`value` with its dataclasses as dicts of their fields and public properties, its tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        properties = [
            name
            for base in reversed(kind.__mro__)
            for name, it in vars(base).items()
            if isinstance(it, property) and not name.startswith("_")
        ]
        names = dict.fromkeys([*(it.name for it in fields(value)), *properties])
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Alike(Generic[T]):
    """Things that a table shows in one row; `name` has a * for the numbers in which their names differ."""

    name: str
    members: Sequence[T]

    @property
    def first(self) -> T:
        return self.members[0]

    def total(self, value: Callable[[T], float]) -> float:
        return sum(value(it) for it in self.members)

    def mean(self, value: Callable[[T], float | None]) -> float | None:
        """Over those that have one."""
        known = [found for it in self.members if (found := value(it)) is not None]
        return sum(known) / len(known) if known else None


def alike(things: Iterable[N], key: Callable[[N], Hashable], full: bool = False) -> list[Alike[N]]:
    """Things whose names differ in numbers only, and whose keys are equal, together; `full`: each by itself."""
    groups: dict[Any, list[N]] = {}
    for thing in things:
        pattern = thing.name if full else re.sub(r"\d+", "*", thing.name)
        groups.setdefault((pattern, key(thing)), []).append(thing)
    return [
        Alike(pattern if len(group) > 1 else group[0].name, group) for (pattern, _), group in groups.items()
    ]


def track(
    items: Iterable[T], description: str, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Yields `items` behind a progress bar on stderr; no bar at all unless `enabled`."""
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    total = len(items) if total is None and isinstance(items, Sequence) else total
    yield from rich_track(items, description, total=total, console=Console(stderr=True))
