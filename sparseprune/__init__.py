"""Prune a Transformer, and get a model that is measurably smaller and faster, and that reloads in one call.

>>> import sparseprune as sp
>>> sp.prune(model, pattern="2:4", method="auto", calibration=windows)
>>> sp.recover(model, sp.recovery.TokenStream(text, tokenizer), teacher=dense, minutes=10)
>>> sp.sparsify(model, batch=1)
>>> sp.save(model, "out/")
>>> model = sp.load("out/")

Names are imported when they are first used: torch takes seconds to import, and `sparseprune --help` needs none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily
from sparseprune.version import __version__

if TYPE_CHECKING:
    from sparseprune import (
        calibration,
        compression,
        models,
        pruning,
        quantization,
        recovery,
        streaming,
        surgery,
    )
    from sparseprune.compression.driver import compress
    from sparseprune.convert import sparsify
    from sparseprune.io.checkpoint import load, save
    from sparseprune.io.safetensors import CheckpointError
    from sparseprune.kernels import ops
    from sparseprune.kernels.cuda import cuda_info
    from sparseprune.kernels.native import isa, isas_available
    from sparseprune.measure import tasks
    from sparseprune.measure.evaluate import perplexity
    from sparseprune.pruning.driver import prune
    from sparseprune.quantization.driver import quantize
    from sparseprune.recovery.trainer import recover
    from sparseprune.surgery.entry import cut
    from sparseprune.weights.embedding import SparseEmbedding
    from sparseprune.weights.format import Format
    from sparseprune.weights.linear import SparseLinear
    from sparseprune.weights.sparse_weight import SparseWeight

_PLACES = {
    "CheckpointError": "io.safetensors",
    "Format": "weights.format",
    "SparseEmbedding": "weights.embedding",
    "SparseLinear": "weights.linear",
    "SparseWeight": "weights.sparse_weight",
    "calibration": "calibration:",
    "compress": "compression.driver",
    "compression": "compression:",
    "cuda_info": "kernels.cuda",
    "cut": "surgery.entry",
    "isa": "kernels.native",
    "isas_available": "kernels.native",
    "load": "io.checkpoint",
    "models": "models:",
    "ops": "kernels.ops:",
    "perplexity": "measure.evaluate",
    "prune": "pruning.driver",
    "pruning": "pruning:",
    "quantization": "quantization:",
    "quantize": "quantization.driver",
    "recover": "recovery.trainer",
    "recovery": "recovery:",
    "save": "io.checkpoint",
    "sparsify": "convert",
    "streaming": "streaming:",
    "surgery": "surgery:",
    "tasks": "measure.tasks:",
}

__all__ = [
    "CheckpointError",
    "Format",
    "SparseEmbedding",
    "SparseLinear",
    "SparseWeight",
    "__version__",
    "calibration",
    "compress",
    "compression",
    "cuda_info",
    "cut",
    "isa",
    "isas_available",
    "load",
    "models",
    "ops",
    "perplexity",
    "prune",
    "pruning",
    "quantization",
    "quantize",
    "recover",
    "recovery",
    "save",
    "sparsify",
    "streaming",
    "surgery",
    "tasks",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazily(__name__, _PLACES)
