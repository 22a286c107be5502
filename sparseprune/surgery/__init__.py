"""Structured pruning: neurons, attention heads and whole layers are cut out, and smaller modules stay."""

from sparseprune.io.sizes import apply_sizes
from sparseprune.surgery.criteria import CRITERIA
from sparseprune.surgery.cut import STRUCTURES, cut
from sparseprune.surgery.heads import remove_heads
from sparseprune.surgery.layers import LAYER_CRITERIA, remove_layers
from sparseprune.surgery.neurons import remove_neurons
from sparseprune.surgery.report import StructureCut, StructuredReport

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "STRUCTURES",
    "StructureCut",
    "StructuredReport",
    "apply_sizes",
    "cut",
    "remove_heads",
    "remove_layers",
    "remove_neurons",
]
