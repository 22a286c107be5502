"""What a schedule of several steps needs from the command line: a loss to go by, and training between the steps."""

from __future__ import annotations

import copy
import math
from typing import Any

__all__ = ["callbacks"]

_WINDOWS = 8  # of held-out text for each loss


def callbacks(
    recover_steps: int, text: str, model: Any, tokenizer: Any, length: int, seed: int
) -> dict[str, Any]:
    """`evaluate` and `recover` for `prune`.

    The first tenth of the text gives the loss, the mean negative log-likelihood a token; the rest is for training, by
    distillation from the model as it is now.

    Raises:
        ValueError: a text too short.
    """
    from sparseprune.calibration import token_ids

    ids = token_ids(text, tokenizer)
    held = max(length, min(len(ids) // 10, _WINDOWS * length))

    def evaluate(it: Any) -> float:
        from sparseprune.measure.evaluate import perplexity

        return math.log(perplexity(it, None, ids[:held], window=length).value)

    given = {"evaluate": evaluate}
    if not recover_steps:
        return given
    from sparseprune.recovery import TokenStream, recover

    stream = TokenStream(ids[held:], length=length)
    teacher = copy.deepcopy(model)

    def train(it: Any) -> Any:
        return recover(it, stream, teacher=teacher, steps=recover_steps, seed=seed, progress=True)

    return {**given, "recover": train}
