"""What a pruning method is: the statistic it needs, how it scores weights, how it repairs what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseprune.models.batches import Batch
from sparseprune.models.losses import Loss
from sparseprune.models.notes import note
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.patterns import Pattern, Scope, mask_from_scores
from sparseprune.statistics.inputs import Statistic

__all__ = ["Method", "Pruned", "Target"]


@dataclass(frozen=True)
class Target:
    """What one layer is to become: a pattern, the fraction of weights to remove, and what is ranked together."""

    pattern: Pattern
    sparsity: float
    scope: Scope = "row"

    def mask(self, scores: Tensor) -> Tensor:
        """bool [out, in], the positions to keep: those of the highest scores."""
        return mask_from_scores(scores, self.pattern, self.sparsity, scope=self.scope)

    def trained(self, site: WeightSite) -> AbstractContextManager[Any]:
        """Around the training of a site that has been solved, when what it became is more than its zeros."""
        return nullcontext()

    def note(self, site: WeightSite) -> None:
        """Notes on the site that it was pruned so. Where nothing was to go, what was noted before still holds."""
        if self.sparsity > 0:
            note(site, str(self.pattern))


class Pruned(NamedTuple):
    """A layer's new weight, float32 [out, in], zero outside `mask`, bool [out, in]."""

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Method:
    """One pruning method; each is a small file that defines one of these.

    Either `score` ranks the weights, or `solve` finds mask and weights together; then `refine` may improve the
    mask and `update` the weights under it, from the dense ones. None of them changes what it is given.

    Attributes:
        score: (weight float32 [out, in], statistic or None) -> scores float32 [out, in]; the highest are kept.
        solve: (weight, statistic, target) -> `Pruned`.
        refine: (weight, mask bool [out, in], statistic, target) -> a better mask of the same pattern.
        update: (weight, mask, statistic) -> weights [out, in], zero outside the mask.
        statistic: collected over the calibration data for each layer and handed to the steps; None if the
            method looks at weights only.
        scope: what it ranks together by default under the unstructured pattern.
        prepare: changes the whole model before its layers are pruned, so that its outputs stay what they are; as
            `sparseprune.pruning.methods.permutation.permute_neurons`.
        loss: what a statistic of gradients differentiates; None: what the batches imply, see
            `sparseprune.models.losses.loss_of`.
    """

    name: str
    score: Callable[[Tensor, Any], Tensor] | None = None
    statistic: type[Statistic] | None = None
    scope: Scope = "row"
    solve: Callable[[Tensor, Any, Target], Pruned] | None = None
    refine: Callable[[Tensor, Tensor, Any, Target], Tensor] | None = None
    update: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    prepare: Callable[..., list[str]] | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.solve is None):
            raise ValueError(f"method {self.name}: must have a score or a solve, one of the two")

    @property
    def changes_weights(self) -> bool:
        """Whether the weights that stay get new values."""
        return self.solve is not None or self.update is not None

    def collect(
        self, model: nn.Module, layers: Sequence[WeightSite], batches: Iterable[Batch], progress: bool = False
    ) -> dict[str, Any]:
        """layer name -> its statistic over `batches`; empty where the method looks at weights only."""
        if self.statistic is None:
            return {}
        return self.statistic.collect(model, layers, batches, loss=self.loss, progress=progress)

    def prune(self, weight: Tensor, statistic: Any, target: Target) -> Pruned:
        """One layer, pruned; `weight` float32 [out, in] stays as it is."""
        if self.solve is not None:
            solved = self.solve(weight, statistic, target)
            if self.refine is None and self.update is None:
                return solved
            mask = solved.mask
        else:
            assert self.score is not None
            mask = target.mask(self.score(weight, statistic))
        if self.refine is not None:
            mask = self.refine(weight, mask, statistic, target)
        if self.update is not None:
            return Pruned(self.update(weight, mask, statistic), mask)
        return Pruned(torch.where(mask, weight, 0), mask)
