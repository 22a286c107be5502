"""Structured pruning: neurons, attention heads and whole layers are cut out, and smaller modules stay."""

from sparseprune.pruning.structured.criteria import CRITERIA
from sparseprune.pruning.structured.dispatch import STRUCTURES, prune_structured
from sparseprune.pruning.structured.heads import remove_heads
from sparseprune.pruning.structured.layers import LAYER_CRITERIA, remove_layers
from sparseprune.pruning.structured.neurons import remove_neurons
from sparseprune.pruning.structured.report import StructureCut, StructuredReport
from sparseprune.sizes import apply_sizes

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "STRUCTURES",
    "StructureCut",
    "StructuredReport",
    "apply_sizes",
    "prune_structured",
    "remove_heads",
    "remove_layers",
    "remove_neurons",
]
