"""What `prune` is asked for: a `Recipe`, and in it how blocks are reconstructed."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparseprune.options import option, require_above, require_among, require_at_least

if TYPE_CHECKING:
    from sparseprune.pruning.base import Method
    from sparseprune.pruning.patterns import Pattern

__all__ = ["Recipe", "Reconstruction"]


@dataclass(frozen=True)
class Reconstruction:
    """How a block is reconstructed.

    Attributes:
        epochs: passes over the calibration batches.
        learning_rate: Adam's at its peak, as a fraction of the root mean square of each parameter's weights; it rises
            over the first tenth of the steps and falls to zero by a cosine.
        batch: calibration batches a step.
        seed: of their order.
    """

    epochs: int = 4
    _: KW_ONLY
    learning_rate: float = 0.03
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, batch=self.batch)
        require_at_least(0, seed=self.seed)
        require_above(0, learning_rate=self.learning_rate)


def read_allocation(given: list[str]) -> str | dict[str, float | str]:
    """An allocation as it is typed: one name, or "LAYERS=VALUE" several times."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    found: dict[str, float | str] = {}
    for entry in given:
        layers, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"allocation: must be one name, or LAYERS=VALUE entries only, got {entry!r}")
        try:
            found[layers] = float(value)
        except ValueError:
            found[layers] = value
    return found


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned; see `sparseprune.prune`, whose arguments these are.

    Raises:
        ValueError: a value out of range, or one that has no meaning beside the others.
    """

    pattern: str | Pattern = option(
        "2:4", '"2:4", any "N:M", blocks such as "16x1", "unstructured".', given=str
    )
    method: str | Method = option(
        "magnitude",
        '"magnitude", "wanda", "ria", "sparsegpt", "admm", ..., with "+swaps" or "+least-squares" behind it or not; '
        '"auto": the best recipe for the time. All but magnitude and random need --calibration.',
        given=str,
    )
    _: KW_ONLY
    sparsity: float | None = option(None, "Fraction of the weights to remove; N:M implies it.")
    allocation: Any = option(
        "uniform",
        'How much each layer loses: "uniform", "global", "std", "owl", "sensitivity" or "search"; or LAYERS=VALUE, a '
        'shell pattern and a sparsity or pattern, such as "*.down_proj=0.4" or "*.q_proj=dense" (repeatable).',
        given=list[str],
        read=read_allocation,
    )
    scope: Literal["row", "layer"] | None = option(
        None, "What unstructured ranks together [default: what suits the method]."
    )
    sequential: bool | None = option(
        None,
        "Take a block's inputs from the blocks pruned before it [default: if the method changes weights].",
        flag="--sequential/--no-sequential",
    )
    reconstruction: Reconstruction | bool | None = option(
        None,
        "Train each block towards the dense one's outputs [default: what the method says, which is no but for auto].",
        flag="--reconstruct/--no-reconstruct",
        given=bool | None,
    )
    schedule: Any = option(
        "one-shot",
        '"gradual" or "greedy": many small steps, judged by the first tenth of --calibration.',
        given=str,
    )
    minutes: float | None = option(None, "How long the pruning may take, where it can do with less.")
    seed: int = option(0, "Of all that is drawn at random.")

    def __post_init__(self) -> None:
        from sparseprune.pruning.allocation import check_allocation
        from sparseprune.pruning.methods import find_method
        from sparseprune.pruning.patterns import Pattern
        from sparseprune.pruning.scheduled import check_schedule

        pattern = Pattern.parse(self.pattern)
        pattern.resolve_sparsity(self.sparsity)
        require_at_least(0, seed=self.seed)
        require_above(0, minutes=self.minutes)
        if self.scope is not None:
            require_among(("row", "layer"), scope=self.scope)
        if self.scope is not None and pattern.structured:
            raise ValueError(
                f"scope: pattern {pattern} ranks within its groups, got {self.scope!r}; leave it out"
            )
        check_allocation(self.allocation, pattern)
        if not isinstance(self.reconstruction, (bool, Reconstruction, type(None))):
            raise ValueError(
                f"reconstruction: must be True, False or a Reconstruction, got {self.reconstruction!r}"
            )
        if self.sequential not in (None, True, False):
            raise ValueError(f"sequential: must be True or False, got {self.sequential!r}")
        method = None if self.method == "auto" else find_method(self.method, self.seed)
        self._check_sequential(method)
        check_schedule(self.schedule)
        if self.schedule != "one-shot":
            self._check_schedule(pattern)
        self._check_minutes(method)

    @property
    def reconstructs(self) -> bool | None:
        """Whether blocks are reconstructed; None: where the model is a chain of blocks ("auto")."""
        if self.reconstruction is None:
            return None if self.method == "auto" else False
        return self.reconstruction is not False

    @property
    def reads_calibration(self) -> bool:
        """Whether calibration data is of any use."""
        return self._reader is not None or callable(self.allocation)

    @property
    def _reader(self) -> str | None:
        """What cannot do without calibration data."""
        from sparseprune.pruning.allocation import allocation_name, needs_calibration
        from sparseprune.pruning.methods import find_method

        method = None if self.method == "auto" else find_method(self.method)
        if method is None or method.statistic is not None:
            return f"method {self.method if method is None else method.name}"
        if self.reconstructs:
            return "reconstruction"
        return (
            f"allocation {allocation_name(self.allocation)}" if needs_calibration(self.allocation) else None
        )

    def check_calibration(self, given: bool) -> None:
        """Whether calibration data is there where it is needed, and only where it is of use.

        Raises:
            ValueError: it is missing, or given and of no use.
        """
        reader = self._reader
        if reader is not None and not given:
            raise ValueError(
                f"calibration: {reader} needs some, got none; pass sparseprune.calibration.windows(text, tokenizer)"
            )
        if given and not self.reads_calibration:
            name = self.method if isinstance(self.method, str) else self.method.name
            raise ValueError(f"calibration: method {name} looks at weights only; leave it out")

    def _check_sequential(self, method: Method | None) -> None:
        if self.sequential is None:
            return
        if not self.sequential and (self.reconstructs or self.reconstructs is None):
            raise ValueError(
                "sequential: reconstruction trains each block on the pruned ones before it, got False; leave it out, or "
                "pass reconstruction=False"
            )
        if method is None or self.reconstructs:
            return
        if method.statistic is None:
            raise ValueError(
                f"sequential: method {method.name} looks at weights only, got {self.sequential}; leave it out"
            )
        if method.statistic.whole_model:
            raise ValueError(
                f"sequential: method {method.name} takes its statistic from the whole dense model, got {self.sequential}; "
                "leave it out"
            )

    def _check_schedule(self, pattern: Pattern) -> None:
        if pattern.structured:
            raise ValueError(
                f"schedule: pattern {pattern} has one sparsity, so there are no steps to it; pass "
                'pattern="unstructured", or leave the schedule out'
            )
        if not self.sparsity:
            raise ValueError(
                f"sparsity: must be above 0 for a schedule, got {self.sparsity}; pass the fraction of weights to remove"
            )
        if self.minutes is not None:
            raise ValueError(
                f"minutes: bounds one pruning and a schedule makes many, got {self.minutes:g}; leave it out, or the schedule"
            )

    def _check_minutes(self, method: Method | None) -> None:
        from sparseprune.pruning.allocation import searches

        if self.minutes is None or method is None or self.reconstructs or searches(self.allocation):
            return
        statistic = method.statistic
        if (
            statistic is not None
            and not statistic.whole_model
            and (method.changes_weights or self.sequential or statistic.light is not None)
        ):
            return
        raise ValueError(
            f"minutes: bounds what goes block by block, and searches; method {method.name} does neither, got "
            f'{self.minutes:g}; leave it out, or pass method="auto"'
        )
