"""Tensors in a file, some of them in memory too: the hidden states between two blocks of a model that does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from sparseprune.io.safetensors import DTYPE_NAMES, as_bytes, read_into

__all__ = ["Activations"]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Activations(MutableSequence[Tensor]):
    """A list of tensors that lies in the file `path`, its first `memory` bytes of tensors also in memory.

    Every tensor goes to the file, because what is only in memory does not outlive a kill. Read and written by position,
    not mapped: pages of a map count as memory of the process. `seal()` flushes all to the disk; `Activations.open`
    finds it again.

    Raises:
        OSError: the disk of `path` is full, when a tensor is written.
    """

    def __init__(self, path: Path, memory: int) -> None:
        self.path, self.memory = path, memory
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115, closed by close()
        self._entries: list[tuple[torch.dtype, tuple[int, ...], int]] = []
        self._cache: dict[int, Tensor] = {}
        self._end = 0
        self._room = memory

    @classmethod
    def open(cls, path: Path, memory: int) -> Activations:
        """What `seal` left in `path`.

        Raises:
            ValueError: nothing there, or not what was sealed.
        """
        try:
            entries = json.loads(_sidecar(path).read_text(encoding="utf-8"))
            store = cls.__new__(cls)
            store.path, store.memory, store._room, store._cache = path, memory, memory, {}
            store._entries, store._end = [], 0
            for dtype, shape, offset in entries:
                store._entries.append((_DTYPES[dtype], tuple(shape), offset))
                store._end = max(store._end, offset + _nbytes(_DTYPES[dtype], shape))
            store._file = open(path, "r+b", buffering=0)  # noqa: SIM115, as above
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}: the activations to go on with are missing or damaged ({error}); "
                "name the spill folder that the run began with, or delete its output and start again"
            ) from error
        if os.fstat(store._file.fileno()).st_size != store._end:
            store._file.close()
            raise ValueError(
                f"{path}: the activations to go on with must have {store._end:,} bytes; delete the run's output and "
                "start again"
            )
        return store

    @property
    def nbytes(self) -> int:
        return self._end

    @property
    def spilled(self) -> int:
        """Bytes that are on the disk only."""
        return self._end - (self.memory - self._room)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        index = self._position(index)
        if index in self._cache:
            return self._cache[index]
        dtype, shape, offset = self._entries[index]
        tensor = torch.empty(shape, dtype=dtype)
        if not read_into(tensor, self._file, offset):
            raise ValueError(f"{self.path}: was cut short while it was in use")
        self._keep(index, tensor)
        return tensor

    def append(self, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        self._entries.append((value.dtype, tuple(value.shape), self._end))
        self._write(len(self) - 1, value)
        self._end += value.nbytes

    def __setitem__(self, index: Any, value: Any) -> None:
        index = self._position(index)
        value = value.detach().cpu().contiguous()
        if (value.dtype, tuple(value.shape)) != self._entries[index][:2]:
            raise ValueError(
                f"value: must be {self._entries[index][:2]}, as what it replaces, got {value.dtype} {value.shape}"
            )
        self._write(index, value)

    def insert(self, index: int, value: Tensor) -> None:
        if index != len(self):
            raise TypeError("activations: can be appended, not inserted; their order is that of the batches")
        self.append(value)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("activations: go all at once, by delete()")

    def extend(self, values: Iterable[Tensor]) -> None:
        for value in values:
            self.append(value)

    def seal(self) -> None:
        """Flushes everything to the disk, so that `open` finds it after a kill."""
        os.fsync(self._file.fileno())
        entries = [(DTYPE_NAMES[dtype], shape, offset) for dtype, shape, offset in self._entries]
        with open(_sidecar(self.path), "w", encoding="utf-8") as file:
            json.dump(entries, file)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._file.close()
        self._cache.clear()

    def delete(self) -> None:
        """Closes the store and deletes its files."""
        self.close()
        self.path.unlink(missing_ok=True)
        _sidecar(self.path).unlink(missing_ok=True)

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: must be below {len(self)}, got {index}")
        return index % len(self)

    def _write(self, index: int, value: Tensor) -> None:
        offset = self._entries[index][2]
        buffer = as_bytes(value)
        try:
            while len(buffer):
                count = os.pwrite(self._file.fileno(), buffer, offset)
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise OSError(
                error.errno, f"no room for the activations ({error.strerror})", str(self.path)
            ) from error
        self._keep(index, value)

    def _keep(self, index: int, value: Tensor) -> None:
        if index in self._cache:
            self._cache[index] = value
        elif value.nbytes <= self._room:
            self._cache[index] = value
            self._room -= value.nbytes


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count
