"""What `compress` did."""

from __future__ import annotations

from dataclasses import dataclass

from sparseprune.pruning.report import PruneReport
from sparseprune.recovery.report import RecoveryReport
from sparseprune.report import Column, Report, Table, alike, human_bytes

__all__ = ["CompressReport", "LayerCompressed"]


@dataclass(frozen=True)
class LayerCompressed:
    """What became of a weight.

    Attributes:
        form: chosen, as "2:4 int4 g64"; "plain".
        bits: for each entry of the weight in the file, scales and mask among them.
        loss: what it was estimated to add to the divergence from the dense model, nats a token, before any training.
        runner_up: the form that would have been next best for the bytes, and its `runner_up_bits` and `runner_up_loss`; ""
            where there is no other.
    """

    name: str
    shape: tuple[int, int]
    form: str
    bits: float
    bytes_before: int
    bytes_after: int
    loss: float
    runner_up: str
    runner_up_bits: float
    runner_up_loss: float


@dataclass(frozen=True)
class CompressReport(Report):
    """What `compress` did, weight by weight; `print(report)` shows it as a table, like layers in one row."""

    layers: tuple[LayerCompressed, ...]
    budget: int
    """Bytes of the file with the weights."""
    bytes_before: int
    """Of that file, dense."""
    bytes_after: int
    seconds: float
    notes: tuple[str, ...] = ()
    pruned: PruneReport | None = None
    recovered: RecoveryReport | None = None

    @property
    def loss(self) -> float:
        """The sum of the layers' estimated losses."""
        return sum(it.loss for it in self.layers)

    def table(self, full: bool = False) -> Table:
        """One row for layers that differ in a number of their name only; `full` for a row each."""
        columns = [
            Column("layers", value=lambda it: it.name),
            Column("count", value=lambda it: len(it.members)),
            Column("shape", value=lambda it: it.first.shape),
            Column("form", value=lambda it: it.first.form),
            Column("bits", ".2f", lambda it: it.mean(lambda layer: layer.bits)),
            Column("before", human_bytes, lambda it: it.total(lambda layer: layer.bytes_before)),
            Column("after", human_bytes, lambda it: it.total(lambda layer: layer.bytes_after)),
            Column("loss", ".4f", lambda it: it.total(lambda layer: layer.loss)),
            Column("or", value=lambda it: it.first.runner_up or "-"),
            Column("bits", ".2f", lambda it: it.mean(lambda layer: layer.runner_up_bits)),
            Column("loss", ".4f", lambda it: it.total(lambda layer: layer.runner_up_loss)),
        ]
        footer = [
            f"the file takes {human_bytes(self.bytes_after)} of {human_bytes(self.budget)} allowed; dense it takes "
            f"{human_bytes(self.bytes_before)}",
            f"loss: estimated divergence from the dense model, nats a token, before training; {self.loss:.4f} in all",
            *self.notes,
        ]
        groups = alike(self.layers, lambda it: (it.shape, it.form, it.runner_up), full)
        return Table.of("Compressed layers", columns, groups, footer)
