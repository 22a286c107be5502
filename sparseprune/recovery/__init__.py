"""Recovery: masked fine-tuning, distillation from the dense model, on one process or several.

>>> from sparseprune.recovery import Distillation, TokenStream, recover
>>> recover(model, TokenStream(text, tokenizer), teacher=dense, minutes=20, progress=True)
"""

from sparseprune.recovery.data import Sampler, TokenStream
from sparseprune.recovery.dense import to_dense
from sparseprune.recovery.report import RecoveryReport
from sparseprune.recovery.terms import Distillation
from sparseprune.recovery.trainer import recover

__all__ = [
    "Distillation",
    "RecoveryReport",
    "Sampler",
    "TokenStream",
    "recover",
    "to_dense",
]
