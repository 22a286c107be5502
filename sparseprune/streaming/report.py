"""What `prune_folder` reports."""

from __future__ import annotations

from dataclasses import dataclass

from sparseprune.pruning.report import PruneReport
from sparseprune.report import Report, Table, human_bytes

__all__ = ["StreamReport"]


@dataclass(frozen=True)
class StreamReport(Report):
    """What a streamed pruning did; `print(report)` shows it as a table.

    Attributes:
        pruned: layer by layer, as `prune` reports it.
        blocks: how many the model has.
        resumed_at: the block at which this run went on, None if it began at the first.
        shards, bytes_before, bytes_after: files written; bytes of the checkpoint read, and of the one written.
        peak_memory: the most that the process had in memory, over all runs where a kill came between.
        memory: the limit asked for, None if none was.
        activations, spilled: bytes of hidden states between two blocks; how many of them were on the disk only.
        formats: format ("dense" where none serves) -> why -> how many layers.
    """

    pruned: PruneReport
    blocks: int
    resumed_at: int | None
    shards: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    memory: int | None
    activations: int
    spilled: int
    formats: dict[str, dict[str, int]]
    seconds: float

    def footer(self) -> list[str]:
        """The totals in words."""
        limit = f" of {human_bytes(self.memory)} allowed" if self.memory is not None else ""
        if self.memory is not None and self.peak_memory > self.memory:
            limit += ", which was too little"
        lines = [
            f"streamed in {self.blocks} blocks; {self.shards} shards, {human_bytes(self.bytes_before)} before and "
            f"{human_bytes(self.bytes_after)} after ({self.bytes_after / max(1, self.bytes_before):.2f})",
            f"peak memory {human_bytes(self.peak_memory)}{limit}; hidden states {human_bytes(self.activations)}, "
            f"{human_bytes(self.spilled)} of them on the disk only; {self.seconds:.0f} s",
        ]
        for form, reasons in sorted(self.formats.items()):
            lines += [f"{count} layers {form}: {reason}" for reason, count in reasons.items()]
        if self.resumed_at is not None:
            lines.append(f"resumed at block {self.resumed_at} of {self.blocks}")
        return [*lines, *self.pruned.notes]

    def table(self) -> Table:
        return self.pruned.table()

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.footer()])
