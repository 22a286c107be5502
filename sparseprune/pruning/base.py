"""What a pruning method is: which statistic it needs, how it scores weights, what it ranks together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseprune.calibration import Statistic
from sparseprune.pruning.patterns import Scope

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """One pruning method; each is a small file that defines one of these.

    Attributes:
        score: (weight float32 [out, in], statistic or None) -> scores float32 [out, in]; the highest are
            kept. It must leave the weight alone.
        statistic: collected over the calibration data for each layer and handed to `score`; None if the
            method looks at weights only.
        scope: what it ranks together by default under the unstructured pattern.
    """

    name: str
    score: Callable[[Tensor, Any], Tensor]
    statistic: type[Statistic] | None = None
    scope: Scope = "row"
