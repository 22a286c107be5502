"""Sparse weights independent of the machine: the canonical form that files, state dicts and pickles carry.

A weight `[rows, cols]` is kept as named parts: `values` (the kept entries in row-major order, or their codes, then with
`scales`, perhaps `minimums`), `mask` (`uint8 [rows, ceil(cols / 8)]`: bit `c % 8` of byte `c // 8` stands for column `c`,
padding bits are zero; none if all are kept) and `spec`, which says how to read them (docs/formats.md). Whoever stores a weight asks `SparseWeight.parts` and iterates.
The packed form that the kernels read is made from it by `SparseWeight.pack` and never leaves the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseprune.kernels import backend, ops
from sparseprune.kernels.codes import dequantize, layout_for, pack_codes, unpack_codes
from sparseprune.kernels.packing import Packed, packing_code
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format, group_counts, popcounts
from sparseprune.weights.rounding import Grid, check_scales, rounded, stored_codes
from sparseprune.weights.spec import DTYPES, SPEC, WeightSpec

__all__ = ["SparseWeight"]


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A sparse weight in canonical form (see the module's docstring).

    values: `[nnz]`, float32, bfloat16 or float16, or codes (`kernels/codes.py`) with `scales` and `minimums` `[rows,
    ceil(cols / group_size)]`; mask: `uint8 [rows, ceil(cols / 8)]`, None in the format `dense`; spec: shape, dtype, format
    and encoding. Nothing is checked at construction; whatever comes from outside goes through `validate` first.
    """

    values: Tensor
    mask: Tensor | None
    spec: WeightSpec
    scales: Tensor | None = None
    minimums: Tensor | None = None

    @classmethod
    def from_dense(
        cls, weight: Tensor, format: str | Format, encoding: str | Encoding = PLAIN
    ) -> SparseWeight:
        """Canonical form of `weight` `[rows, cols]`; ValueError says where a weight does not fit the format.

        encoding: "int8", "int4" of any format but CSR, "int4_minimum" of dense ones (groups of 64, float16 scales), or an
            `Encoding`: values are rounded to the nearest code. `sparseprune.quantization` has methods that lose less.
        """
        form, values_as = Format.parse(format), Encoding.parse(encoding)
        if weight.dim() != 2:
            raise ValueError(f"weight: must have 2 dimensions [out, in], got shape {tuple(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"weight: dtype must be float32, bfloat16 or float16, got {weight.dtype}; cast it first"
            )
        weight = weight.detach()
        spec = WeightSpec((weight.shape[0], weight.shape[1]), weight.dtype, form, values_as)
        values: Tensor
        mask: Tensor | None
        if form.kind == "nm":
            values, mask = ops.dense_to_nm(weight, form.n, form.m)
        elif form.kind == "dense":
            values, mask = weight, None
        else:
            values, mask = ops.dense_to_bitmap(weight)
        if values_as == PLAIN:
            return cls(values, mask, spec)
        kept = None if mask is None else ops.unpack_mask(mask, weight.shape[1])
        codes, grid = rounded(weight, values_as, kept)
        check_scales(weight, grid)
        return cls.from_codes(codes, mask, grid, spec)

    @classmethod
    def from_codes(cls, codes: Tensor, mask: Tensor | None, grid: Grid, spec: WeightSpec) -> SparseWeight:
        """From the codes of all entries, `[rows, cols]`; those that the mask leaves out are dropped."""
        if mask is not None:
            codes = codes[ops.unpack_mask(mask, spec.shape[1])]
        return cls(stored_codes(codes.flatten(), spec.encoding), mask, spec, grid.scales, grid.minimums)

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
        count = self.format.count(self.shape)
        if count is not None:
            return count
        if self.mask is None or self.scales is None:
            return self.values.numel()
        return int(popcounts(self.mask).sum())  # a byte of int4 holds one value or two

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
        if self.scales is None:
            assert self.mask is not None  # only codes may be dense
            return ops.bitmap_to_dense(self.values, self.mask, self.shape[1])
        values = self.encoding
        dense = dequantize(
            values.kind, self.values, self.mask, self.scales, self.minimums, self.shape[1], values.group_size
        )
        return dense.to(self.dtype)

    @property
    def encoding(self) -> Encoding:
        return self.spec.encoding

    @property
    def bits_per_weight(self) -> float:
        """Of the canonical form, over all entries."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def pack(self) -> Packed:
        """For the kernels of the device that the weight is on.

        Raises:
            ValueError: the device has no kernels for it (`require_kernels`).
        """
        form, values = self.format, self.encoding
        if self.scales is None:
            assert self.mask is not None
            layout = backend.of(self.values).layout_for(form.kind, form.n, form.m, self.dtype)
            return ops.pack(self.values, self.mask, self.shape[1], layout)
        layout = layout_for(form.kind, form.n, form.m, self.dtype, self.values)
        packing = packing_code(layout, self.dtype, values.kind, values.group_size, values.scale_dtype)
        return pack_codes(self.values, self.mask, self.scales, self.minimums, self.shape[1], packing)

    def require_kernels(self) -> None:
        """ValueError where `pack` would refuse: int8 and int4 values on a GPU that are neither dense nor 2:4, or are to compute
        in float32."""
        if self.scales is not None:
            layout_for(self.format.kind, self.format.n, self.format.m, self.dtype, self.values)

    @classmethod
    def unpack(cls, packed: Packed, spec: WeightSpec) -> SparseWeight:
        """Inverse of `pack`; the spec is not read from the blob, which must hold a weight of its shape."""
        if spec.encoding == PLAIN:
            return cls(*ops.unpack(packed), spec)
        codes, mask, scales, minimums = unpack_codes(packed)
        return cls(codes, mask, spec, scales, minimums)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SparseWeight:
        """The weight with its plain values cast and all parts moved; the mask stays although a value may round to 0.
        Codes and scales are not cast: `dtype` is what the weight computes in."""
        parts = {name: part.to(device=device) for name, part in self._tensors().items()}
        if self.scales is None:
            parts["values"] = parts["values"].to(dtype)
        dtype = self.dtype if dtype is None else dtype
        return self._of(parts, replace(self.spec, dtype=dtype))

    @classmethod
    def _of(cls, parts: Mapping[str, Tensor], spec: WeightSpec) -> SparseWeight:
        return cls(parts["values"], parts.get("mask"), spec, parts.get("scales"), parts.get("minimums"))

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
        tensors = {name: parts[name] for name in spec.part_names if name != SPEC}
        weight = cls._of(tensors, spec)
        weight.validate()
        return weight

    def validate(self) -> None:
        """Check all that a kernel relies on; ValueError names the first thing that is wrong."""
        spec, (rows, cols), form = self.spec, self.shape, self.format
        spec.check_shape()
        mask = self.mask
        if mask is not None:
            self._check_part("mask", 0)
            if cols % 8 and rows:
                padded = (mask[:, -1] >> (cols % 8)) != 0
                if bool(padded.any()):
                    row = int(padded.to(torch.uint8).argmax())
                    raise ValueError(f"mask: bits past column {cols - 1} must be 0, got a 1 in row {row}")
        if form.kind == "nm" and cols % form.m:
            raise ValueError(f"mask: columns must be a multiple of {form.m} for {form}, got {cols}")
        kept = rows * cols if mask is None else int(popcounts(mask).sum())
        for name in self._tensors():
            self._check_part(name, kept)
        if form.kind == "nm" and mask is not None:
            counts = group_counts(mask, cols, form.m)
            wrong = (counts != form.n).flatten()
            if bool(wrong.any()):
                row, group = divmod(int(wrong.to(torch.uint8).argmax()), cols // form.m)
                raise ValueError(
                    f"mask: every group of {form.m} columns must keep {form.n} for {form}, "
                    f"got {int(counts[row, group])} in row {row}, group {group}"
                )
        for name, part in (("scales", self.scales), ("minimums", self.minimums)):
            if part is not None and not bool(torch.isfinite(part).all()):
                row = int((~torch.isfinite(part)).any(1).to(torch.uint8).argmax())
                raise ValueError(
                    f"{name}: must be finite, got NaN or Inf in row {row}; quantize the weight again"
                )
        if (
            self.encoding.code is not None
            and self.encoding.code.bits == 4
            and kept % 2
            and int(self.values[-1]) > 15
        ):
            raise ValueError(
                f"values: the high nibble past {kept} codes must be 0, got {int(self.values[-1]) >> 4}"
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
        if tensor.device != self.values.device:
            raise ValueError(f"{name}: must lie where values lie ({self.values.device}), got {tensor.device}")
