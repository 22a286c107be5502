"""What a weight may become: a place for zeros, and bits for what is left. A new form is a line in `FORMS`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprune.pruning.patterns import Pattern
from sparseprune.weights.choose import has_codes
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.spec import SPEC_FIELDS, WeightSpec

_ENTRY = 110  # bytes at most, beside its name, that a part takes in a file's header

__all__ = ["EMBEDDING_FORMS", "FORMS", "Form"]


@dataclass(frozen=True)
class Form:
    """A weight's form, before it is known whose weight.

    Attributes:
        pattern: "dense", "2:4", or "unstructured".
        encoding: of the values that are kept; plain ones of a dense weight: it is stored as it is now.
        sparsity: the fraction of weights that is zero; the pattern 2:4 implies it.
        kept: the codes are those of the file that the model came from.
    """

    pattern: str
    encoding: Encoding = PLAIN
    sparsity: float = 0.0
    kept: bool = False

    def __str__(self) -> str:
        """ "int4 g64", "2:4 int4 g64", "50 % int4 g64"; "plain"."""
        if self.encoding == PLAIN:
            return "plain"
        zeros = {"dense": "", "2:4": "2:4 "}.get(self.pattern, f"{self.sparsity:.0%} ".replace("%", " %"))
        return f"{zeros}{self.encoding.kind} g{self.encoding.group_size}{', kept' if self.kept else ''}"

    @property
    def plain(self) -> bool:
        return self.encoding == PLAIN

    @property
    def format(self) -> Format:
        return Format.parse({"unstructured": "bitmap"}.get(self.pattern, self.pattern))

    @property
    def target(self) -> tuple[Pattern, float]:
        """What `prune` is to do first."""
        if self.pattern == "dense":
            return Pattern(), 0.0
        pattern = Pattern.parse(self.pattern)
        return pattern, pattern.resolve_sparsity(self.sparsity if self.pattern == "unstructured" else None)

    def fits(self, weight: Tensor) -> bool:
        """Whether `weight` [out, in] can become this and be multiplied by on its device."""
        return (self.pattern != "2:4" or weight.shape[1] % 4 == 0) and has_codes(self.format, weight)

    def nbytes(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """In a file, for the weight of the layer `name`, of this shape, that computes in `dtype`; at most a little more."""
        if self.plain:
            return shape[0] * shape[1] * dtype.itemsize
        spec = WeightSpec(shape, dtype, self.format, self.encoding)
        kept = self.format.count(shape)
        if kept is None:
            kept = shape[0] * (shape[1] - round(shape[1] * self.sparsity))
        headings = (len(name) + _ENTRY) * (1 + len(spec.part_names))  # one notes what it was pruned to
        return spec.nbytes(kept) + 8 * len(SPEC_FIELDS) + headings


def _codes(kind: str, group: int) -> Encoding:
    return Encoding(kind, group, torch.float16)


FORMS: tuple[Form, ...] = (
    Form("dense"),
    Form("dense", _codes("int8", 64)),
    Form("dense", _codes("int4_minimum", 32)),
    Form("dense", _codes("int4", 32)),
    Form("dense", _codes("int4", 64)),
    Form("dense", _codes("int4", 128)),
    Form("2:4", _codes("int8", 64)),
    Form("2:4", _codes("int4", 64)),
    Form("unstructured", _codes("int4", 64), 0.5),
)
"""Of linears. On a 4096 x 4096 weight: 16, 8.25, 5, 4.5, 4.25, 4.125, 5.25, 3.25 and 3.25 bits a weight. A GPU has no
kernels for the last."""

EMBEDDING_FORMS: tuple[Form, ...] = (
    Form("dense"),
    Form("dense", _codes("int8", 64)),
    Form("dense", _codes("int4", 32)),
    Form("dense", _codes("int4", 64)),
)
"""Of token embeddings and output heads, whose rows are looked up: dense."""
