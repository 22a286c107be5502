"""Whether an argument does anything: a call in which it is refused, or changes what comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BAR = "━"
MEASURED = ("seconds", "speedups", "tokens_per_second", "peak_memory", "timings", "runs")
"""Keys of reports that no two runs share."""


@dataclass(frozen=True)
class Refused:
    """A value that is refused, by an error that matches `says` (by default: that names the argument)."""

    value: Any
    says: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """A value that makes the outcome another."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shows:
    """A switch that shows something on stderr."""

    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A value that each call gets anew, made from a folder of its own."""

    make: Callable[[Path], Any]


@dataclass(frozen=True)
class Call:
    """A function, arguments with which it works, and for each of its arguments what shows that it counts."""

    run: Callable[..., Any]
    good: Mapping[str, Any]
    shows: Mapping[str, Refused | Changes | Shows]

    def outcome(self, folder: Path, /, **arguments: Any) -> Any:
        """What the call gives, and what it leaves of the model and the folder, comparable."""
        folder.mkdir(parents=True)
        given = {
            name: it.make(folder) if isinstance(it, Made) else it
            for name, it in {**self.good, **arguments}.items()
        }
        result = self.run(**given)
        return [described(result), described(given.get("model")), list(files(folder))]


def check(call: Call, argument: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    entry = call.shows[argument]
    if isinstance(entry, Refused):
        says = rf"\b{re.escape(argument)}\b" if entry.says is None else entry.says
        with pytest.raises((ValueError, TypeError, OSError), match=says):
            call.outcome(folder / "refused", **entry.beside, **{argument: entry.value})
        return
    value = True if isinstance(entry, Shows) else entry.value
    first = call.outcome(folder / "plain", **entry.beside)
    capfd.readouterr()
    again = call.outcome(folder / "again", **entry.beside)
    silent = capfd.readouterr().err
    other = call.outcome(folder / "changed", **entry.beside, **{argument: value})
    loud = capfd.readouterr().err
    assert first == again, "the outcome is another each time: it says nothing"
    if isinstance(entry, Shows):
        assert BAR in loud and BAR not in silent and first == other
    else:
        assert first != other


def described(it: Any) -> Any:
    """A value to compare: tensors by their bytes, reports without what was measured."""
    if isinstance(it, Tensor):
        it = it.detach().cpu().contiguous()
        whole = hashlib.sha256(it.view(torch.uint8).numpy().tobytes() if it.numel() else b"").hexdigest()
        return (str(it.dtype), tuple(it.shape), whole)
    if isinstance(it, nn.Module):
        kinds = {name: type(module).__name__ for name, module in it.named_modules()}
        return [kinds, described(dict(it.state_dict())), it.training]
    if hasattr(it, "to_dict") and not isinstance(it, type):
        return described(it.to_dict())
    if isinstance(it, Mapping):
        return {str(name): described(value) for name, value in it.items() if name not in MEASURED}
    if isinstance(it, (list, tuple)):
        return [described(value) for value in it]
    if dataclasses.is_dataclass(it):
        return described({field.name: getattr(it, field.name) for field in dataclasses.fields(it)})
    return it if isinstance(it, (str, int, float, bool, type(None))) else type(it).__name__


def files(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            name = str(path.relative_to(folder))
            yield name, hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix != ".json" else ""
