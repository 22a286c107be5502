"""What `quantize` did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprune.models.sites import WeightSite
from sparseprune.pruning.report import BlockReconstructed
from sparseprune.report import Column, Report, Table, alike, human_bytes
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["LayerQuantized", "QuantizeReport", "error_of"]


@dataclass(frozen=True)
class LayerQuantized:
    """What became of a weight.

    Attributes:
        method: "nearest", "gptq", "kept" (a file's own codes), or "" where it stayed as it was, as `reason` says.
        bits: for each entry of the dense weight, scales and mask among them.
        error: of the weights, ||W - Q|| / ||W|| (Frobenius norms).
    """

    name: str
    shape: tuple[int, int]
    format: str
    encoding: str
    method: str
    bits: float
    bytes_before: int
    bytes_after: int
    error: float
    reason: str = ""

    @classmethod
    def of(cls, site: WeightSite, weight: SparseWeight, method: str, error: float) -> LayerQuantized:
        """Of a site that still has its own weight, which `weight` is to replace."""
        form, values = str(weight.format), weight.encoding.kind
        before = site.weight.nbytes
        return cls(
            site.name,
            weight.shape,
            form,
            values,
            method,
            weight.bits_per_weight,
            before,
            weight.nbytes,
            error,
        )

    @classmethod
    def unchanged(cls, site: WeightSite, reason: str) -> LayerQuantized:
        weight = site.weight
        shape, dtype = (weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch.")
        bits = 8.0 * weight.dtype.itemsize
        return cls(site.name, shape, "dense", dtype, "", bits, weight.nbytes, weight.nbytes, 0.0, reason)


def error_of(original: Tensor, weight: SparseWeight) -> float:
    """||W - Q|| / ||W||, 0 where W is."""
    rounded = weight.to(dtype=torch.float32).dense()
    # in float64: squares of large and of small weights leave float32
    lost, norm = (torch.linalg.vector_norm(it, dtype=torch.float64) for it in (rounded - original, original))
    return float(lost / norm) if norm else 0.0


@dataclass(frozen=True)
class QuantizeReport(Report):
    """What `quantize` did, weight by weight; `print(report)` shows it as a table, like layers in one row."""

    layers: tuple[LayerQuantized, ...]
    weights_of_model: int
    """Parameters of the whole model, each counted once."""
    seconds: float
    notes: tuple[str, ...] = ()
    blocks: tuple[BlockReconstructed, ...] = ()

    @property
    def quantized_weights(self) -> int:
        """Entries of the weights that are codes now, pruned ones among them."""
        return sum(it.shape[0] * it.shape[1] for it in self.layers if it.method)

    @property
    def bytes_before(self) -> int:
        return sum(it.bytes_before for it in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(it.bytes_after for it in self.layers)

    def table(self, full: bool = False) -> Table:
        """One row for layers that differ in a number of their name only; `full` for a row each."""
        columns = [
            Column("layers", value=lambda it: it.name),
            Column("count", value=lambda it: len(it.members)),
            Column("shape", value=lambda it: it.first.shape),
            Column("format", value=lambda it: it.first.format),
            Column("values", value=lambda it: it.first.encoding),
            Column("method", value=lambda it: it.first.method or "-"),
            Column("bits", ".2f", lambda it: it.mean(lambda layer: layer.bits)),
            Column("error", ".2%", lambda it: it.mean(lambda layer: layer.error)),
            Column("before", human_bytes, lambda it: it.total(lambda layer: layer.bytes_before)),
            Column("after", human_bytes, lambda it: it.total(lambda layer: layer.bytes_after)),
            Column("why", value=lambda it: it.first.reason),
        ]
        if not any(it.reason for it in self.layers):
            columns.pop()
        share = self.quantized_weights / max(1, self.weights_of_model)
        footer = [
            f"quantized {self.quantized_weights:,} of {self.weights_of_model:,} weights ({share:.0%}); their layers took "
            f"{human_bytes(self.bytes_before)} and take {human_bytes(self.bytes_after)}",
            *self.notes,
        ]
        groups = alike(self.layers, lambda it: (it.shape, it.format, it.encoding, it.method, it.reason), full)
        return Table.of("Quantized layers", columns, groups, footer)
