"""A model within a budget: `compress`, which picks a form for each weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily

if TYPE_CHECKING:
    from sparseprune.compression.driver import compress
    from sparseprune.compression.forms import FORMS, Form
    from sparseprune.compression.options import Budget, Compression
    from sparseprune.compression.report import CompressReport, LayerCompressed

_PLACES = {
    "FORMS": "forms",
    "Budget": "options",
    "CompressReport": "report",
    "Compression": "options",
    "Form": "forms",
    "LayerCompressed": "report",
    "compress": "driver",
}

__all__ = ["FORMS", "Budget", "CompressReport", "Compression", "Form", "LayerCompressed", "compress"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _PLACES)
