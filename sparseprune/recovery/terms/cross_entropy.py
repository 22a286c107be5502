"""Cross-entropy on the text's own next tokens, or on the batch's labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseprune.models.batches import Batch
from sparseprune.models.losses import Loss
from sparseprune.recovery.terms.base import LogitsTerm, Read, RowLosses, Rows, Term

__all__ = ["CrossEntropy", "OwnLoss"]


class CrossEntropy(LogitsTerm):
    """-log q[label], with q = softmax(logits)."""

    title = "cross-entropy"
    needs_teacher = False
    needs_labels = True
    recorded = True

    def rows(self, rows: Rows) -> RowLosses:
        assert rows.labels is not None
        targets = rows.labels.clamp(min=0).unsqueeze(1)
        losses = -rows.log_softmax().gather(1, targets).squeeze(1)
        weight = self.weight

        def subtract_labels(grad: Tensor) -> None:
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -weight))

        return RowLosses(losses, weight, add=subtract_labels if weight else None)


@dataclass(frozen=True)
class OwnLoss(Term):
    """A loss function of the caller's, in the place of the cross-entropy."""

    function: Loss

    title: ClassVar[str] = "cross-entropy"
    needs_teacher: ClassVar[bool] = False

    def loss(self, student: Read, teacher: Read | None, batch: Batch) -> Tensor:
        return self.function(student.output, batch)
