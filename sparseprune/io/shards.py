"""Several safetensors files that are one checkpoint, as an index names them (the Hugging Face layout)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseprune.io.safetensors import CheckpointError

__all__ = [
    "INDEX_FILE",
    "STREAM_FILE",
    "WEIGHTS_FILE",
    "open_sharded",
    "open_whole",
    "read_index",
    "shard_name",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STREAM_FILE = "stream.json"
"""Lies in a folder that is still being written shard by shard."""


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index`, from 0, of `count`."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor name -> file name, metadata) of an index.

    Raises:
        CheckpointError: no JSON, no such map, or a file name that leads out of the folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map, metadata = index["weight_map"], index.get("metadata") or {}
        names = set(weight_map.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: must be an index of safetensors shards, got {error}; copy it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: a shard must be a .safetensors file beside it, got {name!r}")
    return weight_map, metadata if isinstance(metadata, dict) else {}


@contextmanager
def open_whole(path: Path) -> Iterator[Any]:
    """One file, opened with the library.

    Raises:
        CheckpointError: not a whole safetensors file.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: must be a whole safetensors file, got: {error}; it may be truncated: copy or save it again"
        ) from error
    with file:
        yield file


class _Sharded:
    """The files of an index, behind the interface that the library gives one file."""

    def __init__(
        self, path: Path, weight_map: dict[str, str], metadata: dict[str, Any], files: dict[str, Any]
    ) -> None:
        self._files = {key: files[name] for key, name in weight_map.items()}
        found = {key: name for name, file in files.items() for key in file.keys()}  # noqa: SIM118, no mapping
        for key in sorted(set(found) ^ set(weight_map)):
            where = (
                f"{found[key]}, not in the index" if key in found else f"the index, not in {weight_map[key]}"
            )
            raise CheckpointError(f"{path}: {key} is in {where}; shards of two checkpoints are mixed")
        for key, name in weight_map.items():
            if found[key] != name:
                raise CheckpointError(f"{path}: {key} must be in {name}, it is in {found[key]}")
        headers = [file.metadata() or {} for file in files.values()]
        agreed = {
            key: value
            for key, value in headers[0].items()
            if all(header.get(key) == value for header in headers)
        }
        self._metadata = {key: value for key, value in metadata.items() if isinstance(value, str)} | agreed

    def keys(self) -> list[str]:
        return list(self._files)

    def metadata(self) -> dict[str, str]:
        """What all headers agree on, and what the index says of the whole."""
        return self._metadata

    def get_tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def get_slice(self, key: str) -> Any:
        return self._files[key].get_slice(key)


@contextmanager
def open_sharded(path: Path) -> Iterator[_Sharded]:
    """All files of the index `path`.

    Raises:
        CheckpointError: as `read_index`; a shard is missing or damaged, or holds other tensors than the index says.
    """
    weight_map, metadata = read_index(path)
    if not weight_map:
        raise CheckpointError(f"{path}: names no tensor; copy it again")
    with ExitStack() as stack:
        files = {}
        for name in sorted(set(weight_map.values())):
            if not (path.parent / name).is_file():
                raise CheckpointError(f"{path.parent / name}: no such file, though {path.name} names it")
            files[name] = stack.enter_context(open_whole(path.parent / name))
        yield _Sharded(path, weight_map, metadata, files)
