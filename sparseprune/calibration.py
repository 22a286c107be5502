"""Text to calibrate on: windows of tokens, or batches of any kind."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprune.models.batches import Batch
from sparseprune.options import Windowing, require_at_least

__all__ = ["Batch", "CalibrationData", "as_data", "token_ids", "windows"]


@dataclass(frozen=True)
class CalibrationData:
    """Batches to run a model on, and in words where they come from. Any model, any number of passes."""

    batches: Sequence[Batch]
    source: str = "given batches"

    def __post_init__(self) -> None:
        if len(self.batches) == 0:
            raise ValueError("batches: must hold at least one batch, got none")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def as_data(calibration: CalibrationData | Iterable[Batch]) -> CalibrationData:
    """Given batches as `CalibrationData`, which passes through.

    Raises:
        TypeError: a text or a model in place of batches.
    """
    if isinstance(calibration, CalibrationData):
        return calibration
    if isinstance(calibration, (str, Tensor, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration: must be batches, got a {type(calibration).__name__}; pass "
            "sparseprune.calibration.windows(text, tokenizer), or a list of batches"
        )
    return CalibrationData(list(calibration))


def token_ids(text: str | Tensor | Sequence[int], tokenizer: Any = None) -> Tensor:
    """`text` as int64 token ids [tokens], without special tokens; ids pass through.

    Raises:
        ValueError: an empty text, ids that are not integers in one row, a string without a tokenizer.
    """
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(
                "text: must not be empty, got only white space; pass a text of some thousand words"
            )
        if tokenizer is None:
            raise ValueError(
                "tokenizer: must be given to read text, got None; pass it, or token ids instead of text"
            )
        # verbose=False: a text longer than the model's window is meant, it is cut into windows afterwards
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if not isinstance(text, (Tensor, Sequence)):
        raise TypeError(f"text: must be a str or token ids, got a {type(text).__name__}; read the file first")
    ids = torch.as_tensor(text)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if ids.numel() == 0:
            raise ValueError("text: must not be empty, got no token ids")
        raise ValueError(f"text: token ids must be integers [tokens], got {ids.dtype} {list(ids.shape)}")
    return ids.to(torch.int64)


def windows(
    text: str | Tensor | Sequence[int],
    tokenizer: Any = None,
    *,
    length: int = 1024,
    count: int = 32,
    seed: int = 0,
) -> CalibrationData:
    """`count` windows of `length` tokens of one text, for `collect` and `prune`: batches int64 [1, length].

    The text is cut into windows that do not overlap; `seed` draws `count` of them, in the text's order. No
    special tokens are added.

    Raises:
        ValueError: `length` or `count` below 1, an empty text, or one of fewer than length * count tokens.
    """
    Windowing(count, length)
    require_at_least(0, seed=seed)
    ids = token_ids(text, tokenizer)
    available = len(ids) // length
    if available < count:
        raise ValueError(
            f"text: {count} windows of {length} tokens need {count * length} tokens, got {len(ids)}; pass a "
            f"longer text, or {f'count={available}' if available else 'a smaller length'}"
        )
    chosen = sorted(random.Random(seed).sample(range(available), count))
    batches = tuple(ids[index * length : (index + 1) * length].unsqueeze(0) for index in chosen)
    return CalibrationData(batches, f"{count} windows of {length} tokens, seed {seed}")
