"""Lottery tickets: prune, rewind to an early checkpoint, train again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseprune import clock
from sparseprune.models.losses import Evaluate
from sparseprune.models.sites import EmbeddingSite, find_sites, matches
from sparseprune.models.snapshot import Snapshot
from sparseprune.options import Names, require_at_least
from sparseprune.pruning.patterns import mask_from_scores
from sparseprune.pruning.schedules.base import (
    ScheduleReport,
    Step,
    check_target,
    measure,
)
from sparseprune.pruning.zeros import Zeros
from sparseprune.report import track

__all__ = ["LotteryTicket"]


@dataclass(frozen=True)
class LotteryTicket:
    """Train, prune the smallest weights, rewind the others to an early checkpoint, train again, and so on.

    Frankle and Carbin 2019, "The Lottery Ticket Hypothesis"; with `rewind` above 0 Frankle et al. 2020, "Linear Mode
    Connectivity and the Lottery Ticket Hypothesis". Each round prunes the same fraction of what is left.

    Attributes:
        steps: the length of a training.
        rounds: of pruning.
        rewind: the step to go back to; 0 is the initialisation.
        scope: "model" ranks all weights together, "layer" each parameter for itself.
        include, exclude: shell patterns over parameter names; by default every parameter with two dimensions or more
            that is not an embedding.
    """

    steps: int
    _: KW_ONLY
    rounds: int = 5
    rewind: int = 0
    scope: Literal["model", "layer"] = "model"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, rounds=self.rounds)
        if (
            isinstance(self.rewind, bool)
            or not isinstance(self.rewind, int)
            or not 0 <= self.rewind < self.steps
        ):
            raise ValueError(f"rewind: must be in [0, steps = {self.steps}), got {self.rewind!r}")
        if self.scope not in ("model", "layer"):
            raise ValueError(f'scope: must be "model" or "layer", got {self.scope!r}')

    def sparsities(self, target: float) -> list[float]:
        """After each round: 1 - (1 - target)^(round / rounds); the last is `target` exactly."""
        check_target(target)
        return [1 - (1 - target) ** (it / self.rounds) for it in range(1, self.rounds)] + [target]

    def run(
        self,
        model: nn.Module,
        train: Callable[[nn.Module, int, int], Any],
        target: float,
        *,
        evaluate: Evaluate | None = None,
        progress: bool = False,
    ) -> ScheduleReport:
        """Trains and prunes `model` in place; it ends as the trained ticket.

        Args:
            train: (model, start, stop) trains from step `start` up to step `stop`: the same data for the same step
                each time it is called, with a new optimizer.
            target: fraction of the prunable weights to remove in the end.

        An error in a callable passes through, with the model as it is then. Memory: one copy of the model.
        """
        sparsities = self.sparsities(target)
        prunable = self._prunable(model)
        if self.rewind:
            train(model, 0, self.rewind)
        early = Snapshot(model)
        train(model, self.rewind, self.steps)
        before = measure(evaluate, model)
        zeros = Zeros(model)
        steps = []
        for number, sparsity in enumerate(track(sparsities, "lottery ticket", enabled=progress), 1):
            start = clock.now()
            zeros.set(self._smallest(prunable, zeros.masks(), sparsity))
            pruned = measure(evaluate, model)
            early.restore()
            zeros.apply()
            with zeros.held():
                train(model, self.rewind, self.steps)
            loss = measure(evaluate, model)
            steps.append(Step(number, "all", zeros.fraction(), pruned, loss, 1, clock.now() - start))
        described = f"Lottery ticket, rewound to step {self.rewind} of {self.steps}, pruned"
        return ScheduleReport(described, target, before, tuple(steps), "target reached")

    def _prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        which = Names(self.include, self.exclude)
        which.check(
            [name for name, _ in model.named_parameters()], f"parameter of this {type(model).__name__}"
        )
        embeddings = {id(site.parameter) for site in find_sites(model, kinds=[EmbeddingSite])}
        found = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
            and parameter.requires_grad
            and (
                parameter.ndim > 1 and id(parameter) not in embeddings
                if self.include is None
                else matches([name], which.patterns("include"))
            )
            and not matches([name], which.patterns("exclude"))
        }
        if not found:
            raise ValueError(
                f"model: {type(model).__name__} has no parameter to prune under include={self.include!r}, "
                f"exclude={self.exclude!r}; see model.named_parameters()"
            )
        return found

    def _smallest(
        self, prunable: Mapping[str, nn.Parameter], gone: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, Tensor]:
        """Parameter name -> bool: what is pruned at `sparsity`, the weights that were pruned before among it."""
        scores = {}
        for name, parameter in prunable.items():
            flat = parameter.detach().float().abs().flatten()
            if not flat.isfinite().all():
                raise ValueError(
                    f"{name}: weights must be finite, training made NaN or Inf; lower the learning rate"
                )
            # below a weight that training has made zero, so that what is pruned never comes back
            scores[name] = flat.masked_fill(gone[name].flatten(), -1) if name in gone else flat
        if self.scope == "model":
            row = torch.cat([it.cpu() for it in scores.values()])
            kept = _keep(row, sparsity).split([len(it) for it in scores.values()])
        else:
            kept = tuple(_keep(it, sparsity) for it in scores.values())
        parts = zip(prunable.items(), kept, strict=True)
        return {
            name: ~keep.reshape(parameter.shape).to(parameter.device) for (name, parameter), keep in parts
        }


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    return mask_from_scores(scores.unsqueeze(0), "unstructured", sparsity, scope="layer")[0]
