"""All about a weight but its numbers: shape, dtype, format, encoding; and `spec`, the tensor that states them in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprune.kernels.packing import ENCODINGS
from sparseprune.weights.encoding import PLAIN, Encoding, Part
from sparseprune.weights.format import Format

__all__ = ["DTYPES", "SPEC", "SPEC_FIELDS", "WeightSpec"]

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes a sparse weight may compute in; the position is the code in the file."""

SPEC = "spec"
"""Name of the part that every sparse weight has: it says what the other parts are."""

SPEC_FIELDS = ("version", "kind", "n", "m", "rows", "cols", "dtype", "encoding", "group_size", "scale_dtype")
"""What the ten integers of the `spec` tensor mean. Version 1, which plain values still have, ends with `group_size`."""

_VERSION_FIELDS = {1: 9, 2: 10}
_KIND_CODES = {"nm": 1, "bitmap": 2, "csr": 3, "dense": 4}  # 0 is not a kind: a spec of zeros is refused
_MAX_SIDE = 2**31 - 1  # the kernels count columns in 32 bits


@dataclass(frozen=True)
class WeightSpec:
    """shape: `(rows, cols)`; dtype: of activations, bias and output, and of plain values."""

    shape: tuple[int, int]
    dtype: torch.dtype
    format: Format
    encoding: Encoding = PLAIN

    def __post_init__(self) -> None:
        form, plain = self.format, self.encoding == PLAIN
        if plain and form.kind == "dense":
            raise ValueError(
                "format: dense is for int8 and int4 values, got plain ones; that is an nn.Linear"
            )
        if not plain and form.kind == "csr":
            raise ValueError(
                f"format: must be dense, N:M or bitmap for {self.encoding.kind} values, got csr; use bitmap"
            )
        if self.encoding.minimums and form.kind != "dense":
            raise ValueError(
                f"format: must be dense for values with minimums, which have no code for 0, got {form}; use int4"
            )

    def __str__(self) -> str:
        """`"2:4"`, `"bitmap"`, and so on; `"dense int4"`, `"2:4 int8"` where values are codes."""
        return str(self.format) if self.encoding == PLAIN else f"{self.format} {self.encoding.kind}"

    def parts(self, nnz: int) -> dict[str, Part]:
        """The tensors of such a weight that keeps `nnz` entries, by name, in the order of a state dict."""
        rows, cols = self.shape
        parts = self.encoding.parts(self.shape, nnz, self.dtype)
        if self.format.kind != "dense":
            parts["mask"] = Part(torch.uint8, (rows, -(-cols // 8)))
        parts[SPEC] = Part(torch.int64, (_VERSION_FIELDS[self._version],))
        return parts

    def nbytes(self, nnz: int) -> int:
        """Bytes of these tensors, but for the few of `spec`."""
        parts = self.parts(nnz)
        return sum(part.nbytes for name, part in parts.items() if name != SPEC)

    @property
    def _version(self) -> int:
        return 1 if self.encoding == PLAIN else 2

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(self.parts(0))

    def to_tensor(self) -> Tensor:
        """`int64 [9]`, of codes `[10]`: see `SPEC_FIELDS`."""
        form, values = self.format, self.encoding
        kind, dtype = _KIND_CODES[form.kind], DTYPES.index(self.dtype)
        fields = [kind, form.n, form.m, *self.shape, dtype, ENCODINGS[values.kind], values.group_size]
        if values.scale_dtype is not None:
            fields.append(DTYPES.index(values.scale_dtype))
        return torch.tensor([self._version, *fields])

    @classmethod
    def from_tensor(cls, spec: Tensor) -> WeightSpec:
        """What a `spec` tensor states; ValueError says which field is wrong."""
        if spec.dtype != torch.int64 or spec.dim() != 1 or spec.numel() not in _VERSION_FIELDS.values():
            raise ValueError(
                f"spec: must be int64 of shape (9,) or (10,), got {spec.dtype} of shape {tuple(spec.shape)}"
            )
        fields = dict(zip(SPEC_FIELDS, spec.tolist(), strict=False))
        count = _require(
            fields, "version", _VERSION_FIELDS, "a newer sparseprune may have written it: upgrade"
        )
        if spec.numel() != count:
            raise ValueError(f"spec: version {fields['version']} has {count} integers, got {spec.numel()}")
        kind = _require(fields, "kind", _inverse(_KIND_CODES))
        values = _require(fields, "encoding", _inverse(ENCODINGS))
        scales = _require(fields, "scale_dtype", dict(enumerate(DTYPES))) if count > 9 else None
        dtype = _require(fields, "dtype", dict(enumerate(DTYPES)))
        try:
            form = Format(kind, fields["n"], fields["m"])
            stated = cls(
                (fields["rows"], fields["cols"]), dtype, form, Encoding(values, fields["group_size"], scales)
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
