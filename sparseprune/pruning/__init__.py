"""Pruning: statistic -> score -> mask, each a pure step; `prune` composes them over a model."""

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily

if TYPE_CHECKING:
    from sparseprune.pruning import allocation, schedules
    from sparseprune.pruning.base import Method, Pruned, Target
    from sparseprune.pruning.driver import prune
    from sparseprune.pruning.methods import METHODS
    from sparseprune.pruning.options import Recipe, Reconstruction
    from sparseprune.pruning.patterns import Pattern, mask_from_scores
    from sparseprune.pruning.report import LayerPruned, PruneReport
    from sparseprune.pruning.zeros import Zeros, hold_zeros

_PLACES = {
    "METHODS": "methods",
    "LayerPruned": "report",
    "Method": "base",
    "Pattern": "patterns",
    "PruneReport": "report",
    "Pruned": "base",
    "Recipe": "options",
    "Reconstruction": "options",
    "Target": "base",
    "Zeros": "zeros",
    "allocation": "allocation:",
    "hold_zeros": "zeros",
    "mask_from_scores": "patterns",
    "prune": "driver",
    "schedules": "schedules:",
}

__all__ = [
    "METHODS",
    "LayerPruned",
    "Method",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Recipe",
    "Reconstruction",
    "Target",
    "Zeros",
    "allocation",
    "hold_zeros",
    "mask_from_scores",
    "prune",
    "schedules",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazily(__name__, _PLACES)
