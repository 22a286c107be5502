"""Round to nearest, each group of columns by the scale of least squared error (`sparseprune.weights.rounding`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparseprune.quantization.methods.base import QuantizationMethod
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.rounding import Grid, rounded

__all__ = ["NEAREST"]


def _solve(weight: Tensor, kept: Tensor | None, encoding: Encoding, statistic: Any) -> tuple[Tensor, Grid]:
    return rounded(weight, encoding, kept)


NEAREST = QuantizationMethod("nearest", _solve)
