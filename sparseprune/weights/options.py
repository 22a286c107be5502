"""What `sparsify` is asked for: which form, and whether only where it is faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

from sparseprune.options import option, require_above, require_among

if TYPE_CHECKING:
    from sparseprune.weights.format import Format

__all__ = ["Conversion"]


@dataclass(frozen=True)
class Conversion:
    """How linears become sparse; see `sparseprune.sparsify`, whose arguments these are.

    Raises:
        ValueError: a value out of range, or one that has no meaning beside the others.
    """

    format: str | Format = option("auto", '"auto", "2:4" (any "N:M"), "bitmap" or "csr".', given=str)
    _: KW_ONLY
    policy: Literal["auto", "always"] = option(
        "auto", "auto: swap the layers that get faster here; always: swap all, measure nothing."
    )
    batch: int | Iterable[int] | None = option(
        None,
        "Batch size (rows of activations) that counts (repeatable) [default: 1].",
        given=list[int],
        read=tuple,
    )
    seconds: float | None = option(None, "Time to spend on measuring, about [default: 20].")

    def __post_init__(self) -> None:
        from sparseprune.weights.format import Format

        if self.format != "auto":
            Format.parse(self.format)
        require_among(("auto", "always"), policy=self.policy)
        require_above(0, seconds=self.seconds)
        if self.policy == "always":
            for name, value in (("batch", self.batch), ("seconds", self.seconds)):
                if value is not None:
                    raise ValueError(
                        f'{name}: nothing is measured under policy="always", got {value!r}; leave it out'
                    )
        if isinstance(self.batch, Iterable):
            object.__setattr__(self, "batch", tuple(self.batch))  # to be read more than once
        if not all(isinstance(it, int) and not isinstance(it, bool) and it >= 1 for it in self.batches):
            raise ValueError(f"batch: must be one or several whole numbers of at least 1, got {self.batch!r}")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        given = 1 if self.batch is None else self.batch
        return (
            (given,)
            if not isinstance(given, Iterable)
            else tuple(dict.fromkeys(given)) or (0,)  # none at all is refused as 0 is
        )
