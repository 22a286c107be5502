"""The 4 and 8 bit weights of a GGUF file as codes and scales, bit by bit as they are stored.

Blocks of 32 columns of a row (llama.cpp's `block_q4_0`, `block_q4_1`, `block_q8_0`):

    Q4_0   float16 d, 16 bytes       (c - 8) d      columns 0 to 15 in the low nibbles, 16 to 31 in the high ones
    Q4_1   float16 d, m, 16 bytes    c d + m
    Q8_0   float16 d, 32 int8        c d
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprune.weights.encoding import Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.rounding import Grid
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import DTYPES, WeightSpec

__all__ = ["StoredCodes"]

_BLOCK = 32
_KINDS = {"Q4_0": (18, "int4"), "Q4_1": (20, "int4_minimum"), "Q8_0": (34, "int8")}
"""Bytes of a block, and the encoding."""


@dataclass(frozen=True)
class _Rows:
    """The rows of one tensor. codes `uint8 | int8 [rows, cols]`; scales, minimums float16 `[rows, cols / 32]`."""

    encoding: Encoding
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def weight(self, at: Tensor, dtype: torch.dtype) -> SparseWeight:
        """The rows `at`, int64, as a weight."""
        codes, scales = self.codes[at], self.scales[at]
        minimums = None if self.minimums is None else self.minimums[at]
        spec = WeightSpec((codes.shape[0], codes.shape[1]), dtype, Format("dense"), self.encoding)
        return SparseWeight.from_codes(codes, None, Grid(self.encoding, scales, minimums), spec)


class StoredCodes:
    """The quantized tensors of a GGUF file, to be found by what they stand for.

    A loader may have put the rows of a tensor into another order (llama.cpp's is another for queries and keys), so rows are
    found one by one, by their bytes in the dtype that they were loaded in.
    """

    def __init__(self, path: Path, tensors: list[_Rows]) -> None:
        self.path = path
        self._tensors = tensors
        self._places: dict[torch.dtype, dict[bytes, dict[int, int]]] = {}

    @classmethod
    def read(cls, path: str | Path) -> StoredCodes:
        """
        Raises:
            ImportError: the package gguf is missing.
            ValueError: not a GGUF file, or a damaged one.
        """
        path = Path(path)
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("GGUF files are read with the package gguf; run: pip install gguf")
        import gguf

        try:
            tensors = gguf.GGUFReader(path).tensors
        except Exception as error:
            raise ValueError(
                f"keep: {path} is not a sound GGUF file ({type(error).__name__}: {error})"
            ) from error
        return cls(path, [_rows(it) for it in tensors if it.tensor_type.name in _KINDS and it.data.ndim == 2])

    def find(self, weight: Tensor) -> SparseWeight | None:
        """The codes whose dense weight is `weight` `[rows, cols]`, rounded to its dtype; None where a row is another."""
        if weight.dtype not in DTYPES or not self._tensors or weight.shape[1] % _BLOCK or not weight.numel():
            return None
        places = self._index(weight.dtype)
        found = [places.get(row, {}) for row in _row_bytes(weight)]
        for number in found[0]:  # rows of zeros are in many a tensor
            if all(number in it for it in found):
                at = torch.tensor([it[number] for it in found])
                made = self._tensors[number].weight(at, weight.dtype)
                return made if torch.equal(made.dense(), weight) else None
        return None

    def _index(self, dtype: torch.dtype) -> dict[bytes, dict[int, int]]:
        """Of each row's bytes: in which tensors it is, and which of their rows."""
        if dtype not in self._places:
            places: dict[bytes, dict[int, int]] = {}
            for number, rows in enumerate(self._tensors):
                dense = rows.weight(torch.arange(len(rows.codes)), dtype).dense()
                for at, row in enumerate(_row_bytes(dense)):
                    places.setdefault(row, {})[number] = at
            self._places[dtype] = places
        return self._places[dtype]


def _row_bytes(weight: Tensor) -> list[bytes]:
    words = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in words]


def _rows(tensor: Any) -> _Rows:
    size, kind = _KINDS[tensor.tensor_type.name]
    rows = tensor.data.shape[0]
    raw = torch.from_numpy(tensor.data.copy()).view(rows, -1, size)
    halves = raw[..., : 4 if kind == "int4_minimum" else 2].contiguous().view(torch.float16)
    rest = raw[..., 2 * halves.shape[-1] :]
    codes = rest.contiguous().view(torch.int8) if kind == "int8" else torch.cat([rest & 15, rest >> 4], -1)
    minimums = halves[..., 1].contiguous() if kind == "int4_minimum" else None
    encoding = Encoding(kind, _BLOCK, torch.float16)
    return _Rows(encoding, codes.reshape(rows, -1), halves[..., 0].contiguous(), minimums)
