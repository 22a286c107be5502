"""Recovery: masked fine-tuning, distillation from the dense model, on one process or several.

>>> from sparseprune.recovery import Distillation, TokenStream, recover
>>> recover(model, TokenStream(text, tokenizer), teacher=dense, minutes=20, progress=True)
"""

from typing import TYPE_CHECKING

from sparseprune.lazy import lazily

if TYPE_CHECKING:
    from sparseprune.recovery.data import Sampler, TokenStream
    from sparseprune.recovery.dense import to_dense
    from sparseprune.recovery.options import Budget, Checkpointing, Training
    from sparseprune.recovery.report import RecoveryReport
    from sparseprune.recovery.terms import Distillation
    from sparseprune.recovery.trainer import recover

_PLACES = {
    "Budget": "options",
    "Checkpointing": "options",
    "Distillation": "terms",
    "RecoveryReport": "report",
    "Sampler": "data",
    "TokenStream": "data",
    "Training": "options",
    "recover": "trainer",
    "to_dense": "dense",
}

__all__ = [
    "Budget",
    "Checkpointing",
    "Distillation",
    "RecoveryReport",
    "Sampler",
    "TokenStream",
    "Training",
    "recover",
    "to_dense",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazily(__name__, _PLACES)
