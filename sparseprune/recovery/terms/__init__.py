"""What recovery minimises: a weighted sum of terms, one in each file. A new one is a file, and its line in `Distillation`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from sparseprune.recovery.terms.base import Term
from sparseprune.recovery.terms.cross_entropy import CrossEntropy
from sparseprune.recovery.terms.hidden import Hidden
from sparseprune.recovery.terms.logits import Divergence

__all__ = ["Distillation", "weight_of"]


def weight_of(term: type[Term], default: float, *options: str) -> Any:
    """A field that is the weight of `term`, which also gets the fields named in `options`."""
    return field(default=default, metadata={"term": term, "options": options})


@dataclass(frozen=True)
class Distillation:
    """How much each loss weighs; each is a mean over tokens. Those of the dense model need a teacher.

    A subclass may add terms of its own, as these are added.

    Attributes:
        cross_entropy: on the text's own next tokens, or the batch's labels.
        logits: KL of the teacher's distribution to the student's, over the full vocabulary.
        temperature: softens both distributions in that divergence.
        hidden: normalised squared error of the blocks' outputs, a mean over the blocks.
    """

    cross_entropy: float = weight_of(CrossEntropy, 0.0)
    logits: float = weight_of(Divergence, 1.0, "temperature")
    temperature: float = 1.0
    hidden: float = weight_of(Hidden, 0.0)

    def __post_init__(self) -> None:
        terms = self.terms()
        for name, term in terms.items():
            if not 0 <= term.weight < float("inf"):
                raise ValueError(f"{name}: must be at least 0, got {term.weight}; 0 leaves this loss out")
        if not any(term.weight for term in terms.values()):
            raise ValueError(f"{', '.join(terms)}: must not all be 0; make one of them 1")

    def terms(self) -> dict[str, Term]:
        """The terms by the name of their weight."""
        return {
            it.name: it.metadata["term"](
                getattr(self, it.name), **{name: getattr(self, name) for name in it.metadata["options"]}
            )
            for it in fields(self)
            if "term" in it.metadata
        }
