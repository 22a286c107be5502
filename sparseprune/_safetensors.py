"""Writing a safetensors file tensor by tensor, so that the tensors never have to exist all at once.

The library's own writer wants the whole file in memory. Reading is left to the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DTYPE_NAMES", "TensorInfo", "TensorSource", "write"]

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
    """Tensors that are made together, at the moment they are written: `make()` gives one for each of `infos`."""

    infos: Sequence[TensorInfo]
    make: Callable[[], Sequence[Tensor]]


def write(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file and flush it to the disk; `progress` is told the bytes written since the last call.

    OSError (a full disk) leaves a part of the file at `path`: write aside and rename.
    """
    infos = [info for source in sources for info in source.infos]
    # Wide dtypes first keeps every tensor aligned to its own dtype, which a memory map needs.
    infos.sort(key=lambda info: -info.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for info in infos:
        offsets[info.name], end = end, end + info.nbytes
        header[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[info.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for source in sources:
            for info, tensor in zip(source.infos, source.make(), strict=True):
                if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
                    raise RuntimeError(
                        f"{info.name}: changed while it was saved, {info} became {tensor.dtype}, {tensor.shape}"
                    )
                file.seek(start + offsets[info.name])
                file.write(_bytes(tensor))
                if progress is not None:
                    progress(info.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
