"""Prune a Transformer, and get a model that is measurably smaller and faster, and that reloads in one call.

>>> import sparseprune as sp
>>> sp.prune(model, pattern="2:4", method="auto", calibration=windows)
>>> sp.recover(model, sp.recovery.TokenStream(text, tokenizer), teacher=dense, minutes=10)
>>> sp.sparsify(model, batch=1)
>>> sp.save(model, "out/")
>>> model = sp.load("out/")
"""

from sparseprune.convert import sparsify
from sparseprune.io.checkpoint import load, save
from sparseprune.kernels import ops
from sparseprune.kernels.cuda import cuda_info
from sparseprune.kernels.native import isa, isas_available
from sparseprune.measure.evaluate import perplexity
from sparseprune.pruning import prune
from sparseprune.recovery import recover
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import Format, SparseWeight

__version__ = "0.1.0"
__all__ = [
    "Format",
    "SparseLinear",
    "SparseWeight",
    "cuda_info",
    "isa",
    "isas_available",
    "load",
    "ops",
    "perplexity",
    "prune",
    "recover",
    "save",
    "sparsify",
]
