"""Quantization methods: from a layer's weight, and what its inputs look like, to codes."""

from __future__ import annotations

from sparseprune.quantization.methods.base import QuantizationMethod
from sparseprune.quantization.methods.gptq import GPTQ
from sparseprune.quantization.methods.nearest import NEAREST

__all__ = ["METHODS", "QuantizationMethod"]

METHODS: dict[str, QuantizationMethod] = {method.name: method for method in (NEAREST, GPTQ)}
"""By name."""
