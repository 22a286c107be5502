"""What recovery minimises: a weighted sum of terms, one in each file. A new one is a file, and its line in `Distillation`.

`Distillation` is what the command line reads its options from, so the terms' files are imported where they are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparseprune.options import Option, require_above

if TYPE_CHECKING:
    from sparseprune.models.losses import Loss
    from sparseprune.recovery.terms.base import Term

__all__ = ["Distillation", "weight_of"]


def weight_of(term: str | type[Term], default: float | None, *options: str, help: str | None = None) -> Any:
    """A field that is the weight of a term, which also gets the fields named in `options`.

    Args:
        term: its class, or "file.Class" of this folder.
        help: makes it an option of the command line, too.
    """
    about = {} if help is None else {"option": Option(help)}
    return field(default=default, metadata={"term": term, "options": options, **about})


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How much each loss weighs; each is a mean over tokens. Those of the dense model need a teacher.

    A subclass may add terms of its own, as these are added.

    Attributes:
        cross_entropy: on the text's own next tokens, or the batch's labels; by default 0 with a teacher, 1 without, or
            with a `loss`.
        logits: KL of the teacher's distribution to the student's, over the full vocabulary; by default 1 with a
            teacher, 0 without.
        temperature: softens both distributions in that divergence.
        hidden: normalised squared error of the blocks' outputs, a mean over the blocks.
        loss: stands in for the cross-entropy where a model is not a language model: (output, batch) -> mean loss over
            the batch, a scalar with a gradient.
    """

    cross_entropy: float | None = weight_of(
        "cross_entropy.CrossEntropy",
        None,
        help="Weight of the loss on the text [default: 0 with a teacher, else 1].",
    )
    logits: float | None = weight_of(
        "logits.Divergence",
        None,
        "temperature",
        help="Weight of the divergence from the teacher [default: 1 with a teacher].",
    )
    temperature: float = field(
        default=1.0, metadata={"option": Option("Softens teacher and student in their divergence.")}
    )
    hidden: float = weight_of("hidden.Hidden", 0.0, help="Weight of the loss on the blocks' outputs.")
    loss: Loss | None = None

    def __post_init__(self) -> None:
        weights = {it.name: getattr(self, it.name) for it in fields(self) if "term" in it.metadata}
        for name, weight in weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if weight is not None and not (number and 0 <= weight < math.inf):
                raise ValueError(f"{name}: must be at least 0, got {weight!r}; 0 leaves this loss out")
        if not any(weight is None or weight for weight in weights.values()):
            raise ValueError(f"{', '.join(weights)}: must not all be 0; make one of them 1")
        require_above(0, "1 softens nothing", temperature=self.temperature)
        if self.logits == 0 and self.temperature != 1:
            raise ValueError(
                f"temperature: softens the divergence, whose weight is 0, got {self.temperature}; pass logits=1, or leave "
                "it out"
            )
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"loss: must be a function (output, batch) -> loss, got {self.loss!r}")
        if self.loss is not None and self.cross_entropy == 0:
            raise ValueError("loss: stands in for the cross-entropy, whose weight is 0; pass cross_entropy=1")

    def terms(self, teacher: bool) -> dict[str, Term]:
        """The terms by the name of their weight.

        Args:
            teacher: whether there is one, which decides the weights that were left out.

        Raises:
            ValueError: a term that needs a teacher without one, a teacher that no term needs, or no term at all.
        """
        from sparseprune.recovery.terms.cross_entropy import OwnLoss

        left_out = {
            "cross_entropy": 0.0 if teacher and self.loss is None else 1.0,
            "logits": float(teacher or self.temperature != 1),
        }
        terms: dict[str, Term] = {}
        for it in fields(self):
            if "term" in it.metadata:
                weight = getattr(self, it.name)
                options = {name: getattr(self, name) for name in it.metadata["options"]}
                made = _class_of(it.metadata["term"])
                terms[it.name] = made(left_out.get(it.name, 0.0) if weight is None else weight, **options)
        if self.loss is not None:
            terms["cross_entropy"] = OwnLoss(terms["cross_entropy"].weight, self.loss)
        used = [term for term in terms.values() if term.weight]
        if not used:
            raise ValueError(f"{', '.join(terms)}: must not all be 0; make one of them 1")
        of_teacher = {name: term.weight for name, term in terms.items() if term.needs_teacher}
        if any(of_teacher.values()) and not teacher:
            weights = ", ".join(f"{name}={weight:g}" for name, weight in of_teacher.items())
            raise ValueError(
                f"teacher: must be given for the losses {weights}, got None; or leave cross_entropy alone above 0"
            )
        if teacher and not any(of_teacher.values()):
            weights = ", ".join(f"{name}=0" for name in of_teacher)
            raise ValueError(
                f"teacher: is read by no loss under {weights}; make one of them 1, or leave the teacher out"
            )
        return terms


def _class_of(term: str | type[Term]) -> type[Term]:
    if not isinstance(term, str):
        return term
    file, name = term.split(".")
    found: type[Term] = getattr(import_module(f"{__name__}.{file}"), name)
    return found
