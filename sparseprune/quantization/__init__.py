"""Weights in few bits: `quantize`, and one file for each method in `methods/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily

if TYPE_CHECKING:
    from sparseprune.quantization.driver import quantize
    from sparseprune.quantization.methods import METHODS
    from sparseprune.quantization.options import Quantization
    from sparseprune.quantization.report import LayerQuantized, QuantizeReport

_PLACES = {
    "METHODS": "methods",
    "LayerQuantized": "report",
    "Quantization": "options",
    "QuantizeReport": "report",
    "quantize": "driver",
}

__all__ = ["METHODS", "LayerQuantized", "Quantization", "QuantizeReport", "quantize"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _PLACES)
