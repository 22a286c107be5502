"""Prune a Transformer, and get a model that is measurably smaller and faster, and that reloads in one call."""

from sparseprune._native import isa, isas_available

__version__ = "0.1.0"
__all__ = ["isa", "isas_available"]
