"""What an unfinished stream has done, so that the same command can go on where it was killed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseprune.io.shards import INDEX_FILE, STREAM_FILE, WEIGHTS_FILE

__all__ = ["State", "replace_file"]

_VERSION = 1


@dataclass
class State:
    """`settings` are all that the result depends on; `done` blocks are written, and their `layers` reported.

    `weight_map`: tensor name -> shard, of the shards that are written, `nbytes` in all; `formats`: format ->
    why -> how many layers; `notes`: what they were pruned to (`sparseprune.models.notes`). `peak_memory`, `seconds`: over all runs so far.
    """

    settings: dict[str, Any]
    done: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    weight_map: dict[str, str] = field(default_factory=dict)
    formats: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    peak_memory: int = 0
    spilled: int = 0
    seconds: float = 0.0
    version: int = _VERSION

    @classmethod
    def find(cls, folder: Path, settings: dict[str, Any]) -> State:
        """The state of the run in `folder` that has these settings; a new one for a folder where nothing is done yet.

        Raises:
            ValueError: `folder` holds a run with other settings, one that cannot be read, or a finished model.
        """
        path = folder / STREAM_FILE
        if not path.is_file():
            for name in (WEIGHTS_FILE, INDEX_FILE):
                if (folder / name).exists():
                    raise ValueError(
                        f"out: {folder} holds a model ({name}); name another folder, or delete it"
                    )
            return cls(settings)
        try:
            state = cls(**json.loads(path.read_text(encoding="utf-8")))
            found = dict(state.settings)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"out: {path} cannot be read ({error}); delete {folder} and start again"
            ) from error
        if state.version != _VERSION:
            raise ValueError(f"out: {folder} was begun by another version of sparseprune; delete it")
        if state.done == 0:
            return cls(settings)
        different = [
            f"{name} was {found.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys((*found, *settings))
            if found.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"out: {folder} holds an unfinished run with other settings: {'; '.join(different)}; go on with the "
                "same settings, name another folder, or delete it"
            )
        return state

    def write(self, folder: Path) -> None:
        replace_file(folder / STREAM_FILE, json.dumps(asdict(self)).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Puts `content` in `path`, which has all of the old content or all of the new, whatever happens."""
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
