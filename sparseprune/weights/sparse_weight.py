"""Sparse weights independent of the machine: the canonical form that files, state dicts and pickles carry.

A weight `[rows, cols]` is kept as named parts: `values` (the kept entries in row-major order), `mask`
(`uint8 [rows, ceil(cols / 8)]`: bit `c % 8` of byte `c // 8` stands for column `c`, padding bits are zero) and `spec`,
which says how to read them (docs/formats.md). Whoever stores a weight asks `SparseWeight.parts` and iterates.
The packed form that the kernels read is made from it by `SparseWeight.pack` and never leaves the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseprune.kernels import backend, ops
from sparseprune.kernels.packing import Packed
from sparseprune.weights.format import Format, group_counts, popcounts
from sparseprune.weights.spec import DTYPES, SPEC, WeightSpec

__all__ = ["SparseWeight"]


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A sparse weight in canonical form (see the module's docstring).

    values: `[nnz]`, float32, bfloat16 or float16; mask: `uint8 [rows, ceil(cols / 8)]`; spec: shape, dtype and format.
    Nothing is checked at construction; whatever comes from outside goes through `validate` first.
    """

    values: Tensor
    mask: Tensor
    spec: WeightSpec

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
        return cls(values, mask, WeightSpec((weight.shape[0], weight.shape[1]), weight.dtype, form))

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def format(self) -> Format:
        return self.spec.format

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
        """Bytes of the canonical form, but for the few of `spec`."""
        return sum(part.nbytes for part in self._tensors().values())

    def dense(self) -> Tensor:
        """The weight `[rows, cols]`."""
        return ops.bitmap_to_dense(self.values, self.mask, self.shape[1])

    def pack(self) -> Packed:
        """For the kernels of the device that the weight is on."""
        form = self.format
        layout = backend.of(self.values).layout_for(form.kind, form.n, form.m, self.dtype)
        return ops.pack(self.values, self.mask, self.shape[1], layout)

    @classmethod
    def unpack(cls, packed: Packed, spec: WeightSpec) -> SparseWeight:
        """Inverse of `pack`; the spec is not read from the blob, which must hold a weight of its shape."""
        return cls(*ops.unpack(packed), spec)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SparseWeight:
        """The weight with its values cast and all parts moved; the mask stays although a value may round to 0."""
        values, mask = self.values.to(device=device, dtype=dtype), self.mask.to(device=device)
        return SparseWeight(values, mask, replace(self.spec, dtype=values.dtype))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.spec.part_names if name != SPEC}

    def parts(self) -> dict[str, Tensor]:
        """The tensors that make up the weight, by the names that files and state dicts have for them."""
        return {**self._tensors(), SPEC: self.spec.to_tensor()}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> SparseWeight:
        """A validated weight from the parts in a file or a state dict; ValueError says what is wrong."""
        if SPEC not in parts:
            raise ValueError(f"{SPEC}: missing; it says what the other parts {sorted(parts)} are")
        spec = WeightSpec.from_tensor(parts[SPEC])
        missing = [name for name in spec.part_names if name not in parts]
        if missing:
            raise ValueError(f"{missing[0]}: missing, though {SPEC} is there; save the weight again")
        weight = cls(spec=spec, **{name: parts[name] for name in spec.part_names if name != SPEC})
        weight.validate()
        return weight

    def validate(self) -> None:
        """Check all that a kernel relies on; ValueError names the first thing that is wrong."""
        spec, (rows, cols), form = self.spec, self.shape, self.format
        spec.check_shape()
        self._check_part("mask", 0)
        if cols % 8 and rows:
            padded = (self.mask[:, -1] >> (cols % 8)) != 0
            if bool(padded.any()):
                row = int(padded.to(torch.uint8).argmax())
                raise ValueError(f"mask: bits past column {cols - 1} must be 0, got a 1 in row {row}")
        if form.kind == "nm" and cols % form.m:
            raise ValueError(f"mask: columns must be a multiple of {form.m} for {form}, got {cols}")
        kept = int(popcounts(self.mask).sum())
        for name in self._tensors():
            self._check_part(name, kept)
        if form.kind == "nm":
            counts = group_counts(self.mask, cols, form.m)
            wrong = (counts != form.n).flatten()
            if bool(wrong.any()):
                row, group = divmod(int(wrong.to(torch.uint8).argmax()), cols // form.m)
                raise ValueError(
                    f"mask: every group of {form.m} columns must keep {form.n} for {form}, "
                    f"got {int(counts[row, group])} in row {row}, group {group}"
                )

    def _check_part(self, name: str, kept: int) -> None:
        tensor, part = getattr(self, name), self.spec.parts(kept)[name]
        rows, cols = self.shape
        if tensor.dtype != part.dtype:
            raise ValueError(
                f"{name}: dtype must be {part.dtype}, as spec says, got {tensor.dtype}; save the weight again"
            )
        if tuple(tensor.shape) != part.shape:
            keeps = "" if name == "mask" else f" whose mask keeps {kept}"
            raise ValueError(
                f"{name}: shape must be {part.shape} for a weight of {rows} x {cols}{keeps}, got {tuple(tensor.shape)}"
            )
        if tensor.device != self.mask.device:
            raise ValueError(f"{name}: must lie where mask lies ({self.mask.device}), got {tensor.device}")
