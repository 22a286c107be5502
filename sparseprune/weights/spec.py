"""All about a weight but its numbers: shape, dtype, format, encoding; and `spec`, the tensor that states them in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprune.weights import encoding
from sparseprune.weights.encoding import PLAIN, Encoding, Part
from sparseprune.weights.format import Format

__all__ = ["DTYPES", "SPEC", "SPEC_FIELDS", "WeightSpec"]

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes a sparse weight may compute in; the position is the code in the file."""

SPEC = "spec"
"""Name of the part that every sparse weight has: it says what the other parts are."""

SPEC_FIELDS = ("version", "kind", "n", "m", "rows", "cols", "dtype", "encoding", "group_size")
"""What the nine integers of the `spec` tensor mean."""

_VERSION = 1
_KIND_CODES = {"nm": 1, "bitmap": 2, "csr": 3}  # 0 is no kind: a spec of zeros is refused
_MAX_SIDE = 2**31 - 1  # the kernels count columns in 32 bits


@dataclass(frozen=True)
class WeightSpec:
    """shape: `(rows, cols)`; dtype: of activations, bias and output, and of plain values."""

    shape: tuple[int, int]
    dtype: torch.dtype
    format: Format
    encoding: Encoding = PLAIN

    def parts(self, nnz: int) -> dict[str, Part]:
        """The tensors of such a weight that keeps `nnz` entries, by name, in the order of a state dict."""
        rows, cols = self.shape
        return {
            **self.encoding.parts(self.shape, nnz, self.dtype),
            "mask": Part(torch.uint8, (rows, -(-cols // 8))),
            SPEC: Part(torch.int64, (len(SPEC_FIELDS),)),
        }

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(self.parts(0))

    def to_tensor(self) -> Tensor:
        """`int64 [9]`: see `SPEC_FIELDS`."""
        form, codes = self.format, encoding.CODES
        kind, dtype = _KIND_CODES[form.kind], DTYPES.index(self.dtype)
        values = codes[self.encoding.kind], self.encoding.group_size
        return torch.tensor([_VERSION, kind, form.n, form.m, *self.shape, dtype, *values])

    @classmethod
    def from_tensor(cls, spec: Tensor) -> WeightSpec:
        """What a `spec` tensor states; ValueError says which field is wrong."""
        if spec.dtype != torch.int64 or tuple(spec.shape) != (len(SPEC_FIELDS),):
            raise ValueError(
                f"spec: must be int64 of shape ({len(SPEC_FIELDS)},), got {spec.dtype} of shape {tuple(spec.shape)}"
            )
        fields = dict(zip(SPEC_FIELDS, spec.tolist(), strict=True))
        _require(fields, "version", {_VERSION: None}, "a newer sparseprune may have written it: upgrade")
        kind = _require(fields, "kind", _inverse(_KIND_CODES))
        values = _require(fields, "encoding", _inverse(encoding.CODES))
        dtype = _require(fields, "dtype", dict(enumerate(DTYPES)))
        try:
            form = Format(kind, fields["n"], fields["m"])
            stated = cls(
                (fields["rows"], fields["cols"]), dtype, form, Encoding(values, fields["group_size"])
            )
        except ValueError as error:
            raise ValueError(f"spec: {error}") from None
        stated.check_shape()
        return stated

    def check_shape(self) -> None:
        """ValueError where the shape is not one that kernels can count."""
        for side, length in zip(("rows", "cols"), self.shape, strict=True):
            if not 0 <= length <= _MAX_SIDE:
                raise ValueError(f"spec: {side} must be in [0, {_MAX_SIDE}], got {length}")


def _inverse(codes: dict[str, int]) -> dict[int, str]:
    return {code: name for name, code in codes.items()}


def _require(
    fields: dict[str, int], name: str, known: dict[int, Any], remedy: str = "upgrade sparseprune"
) -> Any:
    if fields[name] not in known:
        raise ValueError(f"spec: {name} must be one of {sorted(known)}, got {fields[name]}; {remedy}")
    return known[fields[name]]
