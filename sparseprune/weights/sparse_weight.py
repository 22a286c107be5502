"""Sparse weights independent of the machine: the canonical form that files, state dicts and pickles carry.

A weight `[rows, cols]` is kept as `values` (the kept entries in row-major order) and `mask`
(`uint8 [rows, ceil(cols / 8)]`: bit `c % 8` of byte `c // 8` stands for column `c`, padding bits are zero).
The packed form that the kernels read is made from it by `SparseWeight.pack` and never leaves the process.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprune.kernels import backend, ops

__all__ = ["DTYPES", "SPEC_FIELDS", "Format", "SparseWeight", "detect_nm"]

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes a sparse weight may have; the position is the code in the file."""

SPEC_FIELDS = ("version", "kind", "n", "m", "rows", "cols", "dtype", "encoding", "group_size")
"""What the nine integers of the `spec` tensor mean."""

_VERSION = 1
_KIND_CODES = {"nm": 1, "bitmap": 2, "csr": 3}  # 0 is not a kind: a spec of zeros is refused
_FLOAT_ENCODING = 0  # int8 and int4 values with group scales are to follow
_GROUP_SIZES = (4, 8, 16, 32)
_WASTE = (
    0.05  # of the weights: what N:M may keep in explicit zeros and still be taken for the pattern pruned to
)
_MAX_SIDE = 2**31 - 1  # the kernels count columns in 32 bits


@dataclass(frozen=True)
class Format:
    """How a weight is sparse: `nm` (N of every M columns kept), `bitmap` or `csr` (unstructured)."""

    kind: str
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KIND_CODES:
            raise ValueError(f"format: kind must be one of {', '.join(_KIND_CODES)}, got {self.kind!r}")
        if self.kind == "nm":
            if not 1 <= self.n <= self.m <= 32:
                raise ValueError(
                    f"format: N:M needs 1 <= N <= M <= 32, got {self.n}:{self.m}; 2:4 is the usual one"
                )
        elif self.n or self.m:
            raise ValueError(f"format: {self.kind} takes no N and M, got {self.n}:{self.m}; leave them out")

    @classmethod
    def parse(cls, text: str | Format) -> Format:
        """`"2:4"`, `"4:8"`, `"bitmap"` or `"csr"` to a format (a `Format` is given back as it is)."""
        if isinstance(text, Format):
            return text
        if text in ("bitmap", "csr"):
            return cls(text)
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'format: must be "N:M" such as "2:4", "bitmap" or "csr", got {text!r}')
        return cls("nm", int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "nm" else self.kind

    def misfit(self, weight: Tensor) -> str | None:
        """Why `weight` [rows, cols] cannot be held in this format, and where; None where it can."""
        if self.kind == "nm":
            try:
                ops.dense_to_nm(weight.detach(), self.n, self.m)
            except ValueError as error:
                return str(error)
        return None


def popcounts(mask: Tensor) -> Tensor:
    """Number of 1 bits in each byte: uint8 to uint8, of the same shape."""
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def group_counts(mask: Tensor, cols: int, m: int) -> Tensor:
    """Kept entries in every `m` columns: canonical mask to integers [rows, cols / m]. `m` must divide `cols`."""
    rows = mask.shape[0]
    if m % 8 == 0:
        return popcounts(mask).view(rows, cols // m, m // 8).sum(-1, dtype=torch.int16)
    if 8 % m == 0:  # within a byte: ten times faster than by bools
        parts = [popcounts((mask >> shift) & (2**m - 1)) for shift in range(0, 8, m)]
        return torch.stack(parts, -1).view(rows, mask.shape[1] * len(parts))[:, : cols // m]
    return ops.unpack_mask(mask, cols).view(rows, cols // m, m).sum(-1, dtype=torch.int16)


def detect_nm(weight: Tensor) -> Format | None:
    """The N:M pattern that `weight` [out, in] was pruned to (2:4, 4:8, ...), None if there is none to be seen.

    N is the most that any group of M holds. A pattern that would keep many more zeros than the weight's sparsity asks
    for is a coincidence, and not taken.
    """
    rows, cols = weight.shape
    values, mask = ops.dense_to_bitmap(weight.detach())
    density = values.numel() / max(1, weight.numel())
    for m in _GROUP_SIZES:
        if not rows * cols or cols % m:
            continue
        n = int(group_counts(mask, cols, m).max())
        if 0 < n < m and n / m <= density + _WASTE:
            return Format("nm", n, m)
    return None


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A sparse weight in canonical form (see the module's docstring).

    values: `[nnz]`, float32, bfloat16 or float16; mask: `uint8 [rows, ceil(cols / 8)]`; shape: `(rows, cols)`.
    Nothing is checked at construction; whatever comes from outside goes through `validate` first.
    """

    values: Tensor
    mask: Tensor
    shape: tuple[int, int]
    format: Format

    @classmethod
    def from_dense(cls, weight: Tensor, format: str | Format) -> SparseWeight:
        """Canonical form of `weight` `[rows, cols]`; ValueError says where a weight does not fit the format."""
        form = Format.parse(format)
        if weight.dim() != 2:
            raise ValueError(f"weight: must have 2 dimensions [out, in], got shape {tuple(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"weight: dtype must be float32, bfloat16 or float16, got {weight.dtype}; cast it first"
            )
        weight = weight.detach()
        if form.kind == "nm":
            values, mask = ops.dense_to_nm(weight, form.n, form.m)
        else:
            values, mask = ops.dense_to_bitmap(weight)
        return cls(values, mask, (weight.shape[0], weight.shape[1]), form)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nnz(self) -> int:
        """Entries kept, the explicit zeros that fill an N:M group among them."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Kept entries over all entries; 0 for an empty weight."""
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical form."""
        return self.values.nbytes + self.mask.nbytes

    def dense(self) -> Tensor:
        """The weight `[rows, cols]`."""
        return ops.bitmap_to_dense(self.values, self.mask, self.shape[1])

    def pack(self) -> Tensor:
        """`uint8` blob for the kernels of the device that the weight is on."""
        form = self.format
        layout = backend.of(self.values).layout_for(form.kind, form.n, form.m, self.dtype)
        return ops.pack(self.values, self.mask, self.shape[1], layout)

    @classmethod
    def unpack(cls, blob: Tensor, format: str | Format, shape: tuple[int, int]) -> SparseWeight:
        """Inverse of `pack`; the format and the shape are not read from the blob."""
        values, mask = ops.unpack(blob)
        return cls(values, mask, shape, Format.parse(format))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SparseWeight:
        """The weight with its values cast and both tensors moved; the mask stays although a value may round to 0."""
        values, mask = self.values.to(device=device, dtype=dtype), self.mask.to(device=device)
        return SparseWeight(values, mask, self.shape, self.format)

    @property
    def spec(self) -> Tensor:
        """`int64 [9]`: see `SPEC_FIELDS`."""
        form = self.format
        kind, dtype = _KIND_CODES[form.kind], DTYPES.index(self.dtype)
        return torch.tensor([_VERSION, kind, form.n, form.m, *self.shape, dtype, _FLOAT_ENCODING, 0])

    @classmethod
    def from_tensors(cls, values: Tensor, mask: Tensor, spec: Tensor) -> SparseWeight:
        """A validated weight from the three tensors of a file or a state dict; ValueError says what is wrong."""
        form, shape, dtype = parse_spec(spec)
        weight = cls(values, mask, shape, form)
        if values.dtype != dtype:
            raise ValueError(
                f"values: dtype must be {dtype}, as spec says, got {values.dtype}; save the checkpoint again"
            )
        weight.validate()
        return weight

    def validate(self) -> None:
        """Check all that a kernel relies on; ValueError names the first thing that is wrong."""
        (rows, cols), form = self.shape, self.format
        _require_side("rows", rows)
        _require_side("cols", cols)
        if self.values.dtype not in DTYPES:
            raise ValueError(f"values: dtype must be float32, bfloat16 or float16, got {self.values.dtype}")
        if self.values.dim() != 1:
            raise ValueError(f"values: must have 1 dimension, got shape {tuple(self.values.shape)}")
        if self.mask.dtype != torch.uint8:
            raise ValueError(f"mask: dtype must be uint8, got {self.mask.dtype}")
        if tuple(self.mask.shape) != (rows, -(-cols // 8)):
            raise ValueError(
                f"mask: shape must be ({rows}, {-(-cols // 8)}) for a weight of {rows} x {cols}, "
                f"got {tuple(self.mask.shape)}"
            )
        if self.values.device != self.mask.device:
            raise ValueError(
                f"values: must lie where mask lies ({self.mask.device}), got {self.values.device}"
            )
        if cols % 8 and rows:
            padded = (self.mask[:, -1] >> (cols % 8)) != 0
            if bool(padded.any()):
                row = int(padded.to(torch.uint8).argmax())
                raise ValueError(f"mask: bits past column {cols - 1} must be 0, got a 1 in row {row}")
        if form.kind == "nm" and cols % form.m:
            raise ValueError(f"mask: columns must be a multiple of {form.m} for {form}, got {cols}")
        count = int(popcounts(self.mask).sum())
        if count != self.nnz:
            raise ValueError(
                f"values: their number must be the number of 1 bits in mask ({count}), got {self.nnz}"
            )
        if form.kind == "nm":
            counts = group_counts(self.mask, cols, form.m)
            wrong = (counts != form.n).flatten()
            if bool(wrong.any()):
                row, group = divmod(int(wrong.to(torch.uint8).argmax()), cols // form.m)
                raise ValueError(
                    f"mask: every group of {form.m} columns must keep {form.n} for {form}, "
                    f"got {int(counts[row, group])} in row {row}, group {group}"
                )


def parse_spec(spec: Tensor) -> tuple[Format, tuple[int, int], torch.dtype]:
    """Format, shape and dtype that a `spec` tensor states; ValueError says which field is wrong."""
    if spec.dtype != torch.int64 or tuple(spec.shape) != (len(SPEC_FIELDS),):
        raise ValueError(
            f"spec: must be int64 of shape ({len(SPEC_FIELDS)},), got {spec.dtype} of shape {tuple(spec.shape)}"
        )
    fields = dict(zip(SPEC_FIELDS, spec.tolist(), strict=True))
    _require_field(fields, "version", {_VERSION: None}, "a newer sparseprune may have written it: upgrade")
    kind = _require_field(
        fields, "kind", {code: kind for kind, code in _KIND_CODES.items()}, "upgrade sparseprune"
    )
    _require_field(fields, "encoding", {_FLOAT_ENCODING: None}, "upgrade sparseprune")
    _require_field(fields, "group_size", {0: None}, "float values have no groups")
    dtype = _require_field(fields, "dtype", dict(enumerate(DTYPES)), "upgrade sparseprune")
    for side in ("rows", "cols"):
        _require_side(side, fields[side])
    try:
        form = Format(kind, fields["n"], fields["m"])
    except ValueError as error:
        raise ValueError(f"spec: {error}") from None
    return form, (fields["rows"], fields["cols"]), dtype


def _require_side(name: str, value: int) -> None:
    if not 0 <= value <= _MAX_SIDE:
        raise ValueError(f"spec: {name} must be in [0, {_MAX_SIDE}], got {value}")


def _require_field(fields: dict[str, int], name: str, known: dict[int, Any], remedy: str) -> Any:
    if fields[name] not in known:
        raise ValueError(f"spec: {name} must be one of {sorted(known)}, got {fields[name]}; {remedy}")
    return known[fields[name]]
