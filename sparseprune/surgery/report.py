"""What structured pruning did, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseprune.report import Column, Report, Table, human_bytes

__all__ = ["StructureCut", "StructuredReport"]


@dataclass(frozen=True)
class StructureCut:
    """One layer: how many neurons or heads (or blocks, for a model's stack) it had, which went, by number."""

    name: str
    before: int
    removed: tuple[int, ...]

    @property
    def after(self) -> int:
        return self.before - len(self.removed)


COLUMNS = (
    Column("layer", value=lambda it: it.name),
    Column("before", value=lambda it: it.before),
    Column("after", value=lambda it: it.after),
    Column("removed", ".1%", lambda it: len(it.removed) / max(it.before, 1)),
)


@dataclass(frozen=True)
class StructuredReport(Report):
    """What was removed; `print(report)` shows it as a table.

    Attributes:
        structure: "neurons", "heads" or "layers".
        method: the criterion by which they were chosen.
        sparsity: the fraction asked for; `removed_fraction` is what became of it.
        reloads: what loads the model once saved: "from_pretrained" (and `sparseprune.load`), "sparseprune.load"
            alone, or `sparseprune.load` with a model to fill.
        sizes: of the linears that changed, for `apply_sizes` on a model to fill.
    """

    structure: str
    method: str
    sparsity: float
    cuts: tuple[StructureCut, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    compensated: bool
    calibration: str | None
    reloads: str
    sizes: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def removed_fraction(self) -> float:
        """Structures removed, as a fraction of those there were."""
        return sum(len(cut.removed) for cut in self.cuts) / max(sum(cut.before for cut in self.cuts), 1)

    def table(self) -> Table:
        title = f"Removed {self.removed_fraction:.1%} of the {self.structure} by {self.method}"
        if self.compensated:
            title += ", compensated by least squares"
        gone = self.parameters_before - self.parameters_after
        footer = [
            f"parameters: {self.parameters_before:,} -> {self.parameters_after:,} "
            f"(-{gone / max(self.parameters_before, 1):.1%}), {human_bytes(self.bytes_before)} -> "
            f"{human_bytes(self.bytes_after)}",
            f"reloads with {self.reloads}",
        ]
        if self.structure == "layers":
            footer[:0] = [f"removed from {cut.name}: {', '.join(map(str, cut.removed))}" for cut in self.cuts]
        if self.calibration is not None:
            footer.append(f"calibration: {self.calibration}")
        return Table.of(title, COLUMNS, self.cuts, footer)
