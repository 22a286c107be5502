"""What a term of recovery's loss is: a number to make smaller, from what student and teacher made of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sparseprune.models.batches import Batch

__all__ = ["Head", "LogitsTerm", "Read", "RowLosses", "Rows", "Term"]

Head = tuple[Tensor, Tensor | None]
"""Weight [vocabulary, in] and bias [vocabulary] of an output head."""


class Read(NamedTuple):
    """What one model made of a batch.

    logits = head(states), or states where `head` is None. `output`: of the whole model, None where its head runs inside
    the loss. `hidden`: the blocks' outputs [batch, tokens, features], where a term reads them.
    """

    states: Tensor
    head: Head | None
    output: Any
    hidden: Sequence[Tensor]


@dataclass(frozen=True)
class Term(ABC):
    """One term, and its weight in the sum that is minimised.

    Attributes:
        title: what a report calls it.
        needs_teacher: whether it compares with the dense model.
        reads_blocks: whether it needs `Read.hidden`.
    """

    weight: float

    title: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    reads_blocks: ClassVar[bool] = False

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Whether the two can be compared so; asked of terms that need a teacher.

        Raises:
            ValueError: they cannot.
        """
        return

    @abstractmethod
    def loss(self, student: Read, teacher: Read | None, batch: Batch) -> Tensor:
        """Its mean over the batch, with a gradient."""


@dataclass(frozen=True)
class LogitsTerm(Term):
    """A term of the logits, in rows: all such terms share one pass over them (`head.py`), a few rows at a time.

    Attributes:
        needs_labels: whether it looks at the labels.
        recorded: whether it is computed where its weight is 0, too, for the record.
    """

    needs_labels: ClassVar[bool] = False
    recorded: ClassVar[bool] = False

    @property
    def scale(self) -> float:
        """What its rows' losses are multiplied by, beside the weight."""
        return 1.0

    @abstractmethod
    def rows(self, rows: Rows) -> RowLosses:
        """The losses of a few rows, and their gradient."""

    def loss(self, student: Read, teacher: Read | None, batch: Batch) -> Tensor:
        raise TypeError(f"{type(self).__name__} is computed with the other terms of the logits, see head.py")


class Rows:
    """A few rows of logits, in float32 or more.

    Attributes:
        logits, teacher: [rows, vocabulary]; the teacher's None where no term needs it.
        labels: int64 [rows], -100 where a row does not count (whatever is computed for it is dropped); None: there are
            none.
    """

    def __init__(self, logits: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
        self.logits, self.teacher, self.labels = logits, teacher, labels
        self._softened: dict[float, Tensor] = {}

    def log_softmax(self, temperature: float = 1.0) -> Tensor:
        """log q = log softmax(logits / temperature); computed once, for all terms, none of which may write to it."""
        if temperature not in self._softened:
            logits = self.logits if temperature == 1.0 else self.logits / temperature
            self._softened[temperature] = torch.log_softmax(logits, dim=1)
        return self._softened[temperature]

    def take_softmax(self, temperature: float) -> Tensor:
        """q, in the memory of log q, which is gone."""
        return self._softened.pop(temperature).exp_()


@dataclass(frozen=True)
class RowLosses:
    """What a term makes of a few rows.

    d(weight x scale x losses) / d logits = softmax x q + rest, where q is the student's softmax at `temperature`.

    Attributes:
        losses: [rows], neither weighted nor scaled.
        softmax: the factor of q. Terms at one temperature share the softmax that way.
        add: adds the rest to a gradient [rows, vocabulary]; None: there is none.
    """

    losses: Tensor
    softmax: float = 0.0
    temperature: float = 1.0
    add: Callable[[Tensor], object] | None = None
