"""Safetensors files part by part, so that their tensors never have to exist all at once.

The library's own writer wants the whole file in memory, and its reader maps the whole file, which counts against a limit
on address space (`ulimit -v`). Here tensors are written as they are made, and read by position. Whole models are read
with the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

__all__ = [
    "DTYPE_NAMES",
    "CheckpointError",
    "Reader",
    "TensorInfo",
    "TensorSource",
    "as_bytes",
    "file_size",
    "read_into",
    "write",
]

_MAX_HEADER = 100_000_000  # the library's own limit
_CHUNK = 16 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not what the model needs; the message names file, tensor and remedy."""


DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSource:
    """Tensors that are made together, at the moment they are written: `make()` gives one for each of `infos`.

    In place of a tensor `make()` may give its parts, flat tensors that follow each other.
    """

    infos: Sequence[TensorInfo]
    make: Callable[[], Sequence[Tensor | Iterable[Tensor]]]


def write(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file and flush it to the disk; `progress` is told the bytes written since the last call.

    OSError (a full disk) leaves a part of the file at `path`: write aside and rename.
    """
    text, offsets = _header([info for source in sources for info in source.infos], metadata)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for source in sources:
            for info, made in zip(source.infos, source.make(), strict=True):
                if isinstance(made, Tensor) and tuple(made.shape) != info.shape:
                    raise RuntimeError(f"{info.name}: changed while it was saved, {info} became {made.shape}")
                file.seek(start + offsets[info.name])
                written = 0
                for part in (made,) if isinstance(made, Tensor) else made:
                    if part.dtype != info.dtype:
                        raise RuntimeError(
                            f"{info.name}: changed while it was saved, {info} became {part.dtype}"
                        )
                    written += file.write(as_bytes(part.detach().cpu().contiguous()))
                if written != info.nbytes:
                    raise RuntimeError(f"{info.name}: {written} bytes were made for {info}")
                if progress is not None:
                    progress(info.nbytes)
        file.flush()
        os.fsync(file.fileno())


def file_size(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> int:
    """Bytes of a file with such tensors."""
    return 8 + len(_header(infos, metadata)[0]) + sum(info.nbytes for info in infos)


def _header(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """(the header, where each tensor begins behind it)"""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    # Wide dtypes first keeps every tensor aligned to its own dtype, which a memory map needs.
    for info in sorted(infos, key=lambda info: -info.dtype.itemsize):
        offsets[info.name], end = end, end + info.nbytes
        header[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[info.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offsets


def read_into(tensor: Tensor, file: IO[bytes], offset: int) -> bool:
    """Fills `tensor` with the file's bytes from `offset` on; False if it ends before."""
    buffer = as_bytes(tensor)
    while len(buffer):
        count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            return False
        buffer, offset = buffer[count:], offset + count
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; writing to it changes the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Reader:
    """A safetensors file, its header checked against its size, its tensors read by position.

    Raises:
        CheckpointError: no such file, a header that is not a safetensors header, or a file shorter or longer than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed by __exit__
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; copy the shard again"
            ) from error
        try:
            self.metadata, self.infos, self._offsets = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self._read_into(tensor, self._offsets[name], name)
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """[len(rows), ...]: those rows of the tensor, which are all that is read."""
        info = self.infos[name]
        tensor = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
        width = info.nbytes // max(1, info.shape[0])
        for index, row in enumerate(rows):
            if not 0 <= row < info.shape[0]:
                raise IndexError(f"{self.path}: {name} has {info.shape[0]} rows, row {row} was asked for")
            self._read_into(tensor[index], self._offsets[name] + row * width, name)
        return tensor

    def head(self, name: str) -> bytes:
        """The first bytes of the tensor, at most 256."""
        return os.pread(self._file.fileno(), min(256, self.infos[name].nbytes), self._offsets[name])

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor, flat, in parts of at most 16 MiB."""
        info = self.infos[name]
        step = _CHUNK // info.dtype.itemsize
        count = math.prod(info.shape)
        for start in range(0, count, step):
            part = torch.empty(min(step, count - start), dtype=info.dtype)
            self._read_into(part, self._offsets[name] + start * info.dtype.itemsize, name)
            yield part

    def _read_into(self, tensor: Tensor, offset: int, name: str) -> None:
        if not read_into(tensor, self._file, offset):
            raise CheckpointError(f"{self.path}: ends within {name}; it changed while it was read")

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            self._refuse(f"a header of {length:,} bytes in a file of {size:,}")
        try:
            header: Any = json.loads(self._file.read(length))
        except ValueError as error:
            self._refuse(f"a header that is not JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        infos, offsets, end = {}, {}, 0
        for name, entry in header.items():
            try:
                dtype = _DTYPES[entry["dtype"]]
                info = TensorInfo(name, dtype, tuple(int(side) for side in entry["shape"]))
                first, last = (int(offset) for offset in entry["data_offsets"])
            except (LookupError, TypeError, ValueError):
                self._refuse(f"{name} described as {entry}")
            if min(info.shape, default=0) < 0 or first < 0 or last - first != info.nbytes:
                self._refuse(f"{name} described as {entry}")
            infos[name], offsets[name], end = info, 8 + length + first, max(end, last)
        if size != 8 + length + end:
            self._refuse(f"{size:,} bytes where the header says {8 + length + end:,}")
        return (metadata if isinstance(metadata, dict) else {}), infos, offsets

    def _refuse(self, found: str) -> Any:
        raise CheckpointError(
            f"{self.path}: must be a whole safetensors file, got {found}; it may be truncated: copy it again"
        )
