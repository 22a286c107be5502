"""What `cut` is asked for."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass

from sparseprune.options import option, require_among, require_at_least

__all__ = ["STRUCTURES", "Cutting"]

STRUCTURES = ("neurons", "heads", "layers")


@dataclass(frozen=True)
class Cutting:
    """How structures are cut out; see `sparseprune.cut`, whose arguments these are.

    Raises:
        ValueError: a value out of range, or a criterion that is not one of the structure's.
    """

    structure: str = option(MISSING, '"neurons", "heads" or "layers".')
    fraction: float = option(MISSING, "Fraction of them to remove.")
    _: KW_ONLY
    criterion: str = option("auto", 'Which go; "auto": the best with --calibration, "l1" without.')
    seed: int = option(0, "Of all that is drawn at random.")

    def __post_init__(self) -> None:
        from sparseprune.surgery.criteria import CRITERIA
        from sparseprune.surgery.layers import LAYER_CRITERIA

        require_among(STRUCTURES, structure=self.structure)
        if not isinstance(self.fraction, (int, float)) or not 0 < self.fraction < 1:
            raise ValueError(
                f"fraction: must be in (0, 1) for {self.structure}, got {self.fraction!r}; pass the fraction of them to remove"
            )
        known = LAYER_CRITERIA if self.structure == "layers" else CRITERIA
        if self.criterion not in ("auto", *known):
            raise ValueError(
                f"criterion: must be one of auto, {', '.join(known)} for {self.structure}, got {self.criterion!r}"
            )
        require_at_least(0, seed=self.seed)
