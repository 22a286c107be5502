"""Errors of the library in the words of the command line: arguments become options, calls become what to type."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["spoken"]

# Arguments of the library that a command has under another name.
_ALIASES = {
    "directory": "out",
    "folder": "model",
    "path": "model",
    "linears": "include",
}

# Remedies that are calls.
_CALLS = {
    "sparseprune.calibration.windows(text, tokenizer)": "--calibration FILE",
    "sparseprune.models.sites.find_sites(model)": "`sparseprune inspect`",
    "sparseprune.cut": "`sparseprune cut`",
}


def spoken(message: str, command: Any) -> str:
    """`message` as the user of `command` (a click command) would say it: "--minutes: ...", "pass --schedule gradual"."""
    words = {it.name: _word(it) for it in command.params}
    name, colon, rest = message.partition(": ")
    name = _ALIASES.get(name, name)
    if colon and name in words:
        message = f"{words[name]}: {rest}"
    for call, typed in _CALLS.items():
        message = message.replace(call, typed)

    def assignment(match: re.Match[str]) -> str:
        word = words.get(match[1])
        return match[0] if word is None or not word.startswith("--") else f"{word} {match[3]}"

    return re.sub(r"\b(\w+)=([\"']?)([\w.:]+)\2", assignment, message)


def _word(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(max(parameter.opts, key=len))
