"""Pruning: statistic -> score -> mask, each a pure step; `prune` composes them over a model."""

from sparseprune.pruning.base import Method, Pruned, Target
from sparseprune.pruning.methods import METHODS
from sparseprune.pruning.patterns import Pattern, mask_from_scores
from sparseprune.pruning.prune import prune
from sparseprune.pruning.reconstruction import Reconstruction
from sparseprune.pruning.report import LayerPruned, PruneReport
from sparseprune.pruning.zeros import Zeros, hold_zeros

__all__ = [
    "METHODS",
    "LayerPruned",
    "Method",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Reconstruction",
    "Target",
    "Zeros",
    "hold_zeros",
    "mask_from_scores",
    "prune",
]
