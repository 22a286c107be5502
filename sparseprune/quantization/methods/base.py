"""What a quantization method is: the statistic it needs, and how it finds codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseprune.statistics.inputs import Statistic
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.rounding import Grid

__all__ = ["QuantizationMethod"]


@dataclass(frozen=True)
class QuantizationMethod:
    """One method; each is a small file that defines one of these.

    Attributes:
        solve: (weight float32 [out, in], kept bool [out, in] or None where all are, encoding, statistic or None) ->
            (codes float32 [out, in], their grid). Codes of entries that are not kept count for nothing.
        statistic: collected over the calibration data for each layer; None if the method looks at weights only.
    """

    name: str
    solve: Callable[[Tensor, Tensor | None, Encoding, Any], tuple[Tensor, Grid]]
    statistic: type[Statistic] | None = None
