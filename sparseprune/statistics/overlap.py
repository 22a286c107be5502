"""Has a model been calibrated on the text it is judged by? Fingerprints of token ids, small enough to travel along.

A text's shingles are its runs of `SHINGLE` tokens, each hashed. A fingerprint keeps the smallest hashes, the same ones of
any text (Broder 1997, "On the resemblance and containment of documents"), so that two can be compared although each
is a sample. Runs of 32 tokens do not come about twice by chance: one shared run is shared text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData, token_ids
from sparseprune.models.batches import Batch

__all__ = ["SHINGLE", "Fingerprint", "Overlap", "note", "overlap", "recall", "remember"]

SHINGLE = 32
_LIMIT = 1 << 12  # hashes in a fingerprint: 32 KiB; of 131,000 tokens of text each 32nd is kept
_EVERY = 16  # a small text keeps each 16th: a shared paragraph of 100 tokens is missed once in 86 times
_ATTRIBUTE = "_calibration_fingerprint"


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation text the calibration text holds: `shared` of `compared` runs of tokens."""

    shared: int
    compared: int

    @property
    def share(self) -> float:
        return self.shared / max(self.compared, 1)

    def __bool__(self) -> bool:
        return self.shared > 0

    def __str__(self) -> str:
        if not self:
            return f"no run of {SHINGLE} tokens of the text is in the calibration text"
        return (
            f"WARNING: the model was calibrated on {self.share:.1%} of this text (runs of {SHINGLE} tokens); the "
            "number flatters it, judge it by another text"
        )


@dataclass(frozen=True)
class Fingerprint:
    """The hashes up to `limit` of a text's shingles, uint64, ascending and each once."""

    limit: int
    hashes: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[Tensor]) -> Fingerprint:
        """Of token ids, int64 [tokens] each; a run of tokens does not span two of them."""
        found = [_shingles(ids) for ids in texts]
        hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
        return cls((1 << 64) // _EVERY - 1, hashes)._sampled()

    def joined(self, other: Fingerprint) -> Fingerprint:
        """Of both texts."""
        limit = min(self.limit, other.limit)
        return Fingerprint(limit, np.union1d(self.hashes, other.hashes))._sampled()

    def overlap(self, ids: Tensor) -> Overlap:
        """Of this text with the one to evaluate on, int64 [tokens]."""
        hashes = np.unique(_shingles(ids))
        hashes = hashes[hashes <= self.limit]
        return Overlap(int(np.isin(hashes, self.hashes, assume_unique=True).sum()), len(hashes))

    def _sampled(self) -> Fingerprint:
        hashes = self.hashes[self.hashes <= self.limit]
        if len(hashes) <= _LIMIT:
            return Fingerprint(self.limit, hashes)
        return Fingerprint(int(hashes[_LIMIT - 1]), hashes[:_LIMIT])

    def to_json(self) -> str:
        hashes = base64.b64encode(self.hashes.astype("<u8").tobytes()).decode("ascii")
        return json.dumps({"shingle": SHINGLE, "limit": self.limit, "hashes": hashes})

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """What `to_json` gave.

        Raises:
            ValueError: anything else.
        """
        try:
            data = json.loads(text)
            if data["shingle"] != SHINGLE:
                raise ValueError(f"runs of {data['shingle']} tokens")
            hashes = np.frombuffer(base64.b64decode(data["hashes"], validate=True), "<u8").astype(np.uint64)
            return cls(int(data["limit"]), hashes)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"calibration: must be a fingerprint of runs of {SHINGLE} tokens, got {error}; save the model again"
            ) from error


def overlap(
    calibration: CalibrationData | str | Tensor | Sequence[int],
    evaluation: str | Tensor | Sequence[int],
    tokenizer: Any = None,
) -> Overlap:
    """How much of `evaluation` is in `calibration`, found by runs of 32 tokens; `tokenizer` reads strings.

    Raises:
        ValueError: an empty text, a string without a tokenizer.
    """
    if isinstance(calibration, CalibrationData):
        found = Fingerprint.of(_texts(calibration))
    else:
        found = Fingerprint.of([token_ids(calibration, tokenizer)])
    return found.overlap(token_ids(evaluation, tokenizer))


def remember(model: nn.Module, data: Iterable[Batch]) -> None:
    """Notes on the model which texts it was fitted to; `save` keeps the note, `perplexity` reads it.

    Batches without token ids (whole numbers in the first tensor, or under `input_ids`) leave no trace.
    """
    note(model, Fingerprint.of(_texts(data)))


def note(model: nn.Module, fingerprint: Fingerprint) -> None:
    """Adds a fingerprint to what is noted on the model."""
    known = recall(model)
    setattr(model, _ATTRIBUTE, fingerprint if known is None else known.joined(fingerprint))


def recall(model: nn.Module) -> Fingerprint | None:
    """What was noted on the model, None if nothing was."""
    return getattr(model, _ATTRIBUTE, None)


def to_metadata(model: nn.Module) -> dict[str, str]:
    """The note as an entry of a file's header, no entry without a note."""
    found = recall(model)
    return {} if found is None else {"calibration": found.to_json()}


def from_metadata(metadata: Mapping[str, str]) -> Fingerprint | None:
    """What `to_metadata` put into a file's header."""
    return Fingerprint.from_json(metadata["calibration"]) if "calibration" in metadata else None


def _texts(data: Iterable[Batch]) -> Iterable[Tensor]:
    for batch in data:
        ids: Any = batch
        if isinstance(batch, Mapping):
            ids = batch.get("input_ids")
        elif isinstance(batch, tuple):
            ids = batch[0] if batch else None
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in (torch.int64, torch.int32):
            yield from ids


def _shingles(ids: Tensor) -> np.ndarray:
    """A hash, uint64, of each run of SHINGLE ids: a polynomial, its bits mixed so that small values are a fair sample."""
    values = ids.cpu().numpy().astype(np.uint64)
    count = max(len(values) - SHINGLE + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count] + np.uint64(1)
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
