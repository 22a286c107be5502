"""Errors of the library in the words of the command line: arguments become options, calls become what to type."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["spoken"]

# Arguments of the library that a command has under another name.
_ALIASES = {
    "bytes": "max_bytes",
    "directory": "out",
    "folder": "model",
    "path": "model",
    "linears": "include",
}

# Remedies that are Python.
_CALLS = {
    "sparseprune.calibration.windows(text, tokenizer)": "--calibration FILE",
    "sparseprune.models.sites.find_sites(model)": "`sparseprune inspect`",
    "sparseprune.cut": "`sparseprune cut`",
    'a mapping such as {"*.down_proj": "dense"}': 'LAYERS=VALUE such as "*.down_proj=dense"',
    "a mapping from layers to sparsities, or a function": "or LAYERS=VALUE",
}


def spoken(message: str, command: Any) -> str:
    """`message` as the user of `command` (a click command) would say it: "--minutes: ...", "pass --schedule gradual"."""
    words = {it.name: _word(it) for it in command.params}
    message = message.replace(
        "seconds: the layers take", "max_ms: the layers take"
    )  # not how long to measure
    switches = {it.name: it for it in command.params if getattr(it, "is_flag", False)}
    named = re.match(r"(\w+)(?:\[['\"](.*?)['\"]\])?: ", message)
    name = "" if named is None else _ALIASES.get(named[1], named[1])
    if named is not None and name in words:
        entry = "" if named[2] is None else f" {named[2]}"
        message = f"{words[name]}{entry}: {message[named.end() :]}"
    for call, typed in _CALLS.items():
        message = message.replace(call, typed)

    def assignment(match: re.Match[str]) -> str:
        word = words.get(match[1])
        if match[1] in switches and match[3] in ("True", "False"):
            switch = switches[match[1]]
            opposite = max(switch.secondary_opts, key=len, default=match[0])
            return str(word if match[3] == "True" else opposite)
        return match[0] if word is None or not word.startswith("--") else f"{word} {match[3]}"

    return re.sub(r"\b(\w+)=([\"']?)([\w.:]+)\2", assignment, message)


def _word(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(max(parameter.opts, key=len))
