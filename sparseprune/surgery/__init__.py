"""Structured pruning: neurons, attention heads and whole layers are cut out, and smaller modules stay."""

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily

if TYPE_CHECKING:
    from sparseprune.surgery.criteria import CRITERIA
    from sparseprune.surgery.entry import cut
    from sparseprune.surgery.heads import remove_heads
    from sparseprune.surgery.layers import LAYER_CRITERIA, remove_layers
    from sparseprune.surgery.neurons import remove_neurons
    from sparseprune.surgery.options import STRUCTURES, Cutting
    from sparseprune.surgery.report import StructureCut, StructuredReport

_PLACES = {
    "CRITERIA": "criteria",
    "LAYER_CRITERIA": "layers",
    "STRUCTURES": "options",
    "Cutting": "options",
    "StructureCut": "report",
    "StructuredReport": "report",
    "cut": "entry",
    "remove_heads": "heads",
    "remove_layers": "layers",
    "remove_neurons": "neurons",
}

__all__ = [
    "CRITERIA",
    "LAYER_CRITERIA",
    "STRUCTURES",
    "Cutting",
    "StructureCut",
    "StructuredReport",
    "cut",
    "remove_heads",
    "remove_layers",
    "remove_neurons",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazily(__name__, _PLACES)
