"""Calibration batches that fit the model, and what tells two sets of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparseprune.calibration import CalibrationData
from sparseprune.io.safetensors import as_bytes
from sparseprune.models.batches import Batch

__all__ = ["clamp", "fingerprint", "token_counts"]


def clamp(data: CalibrationData, limit: int | None) -> tuple[CalibrationData, str | None]:
    """`data` with sequences cut to `limit` tokens, and a note of what was cut, None if nothing was.

    A sequence is a tensor [batch, tokens, ...] on its own, or the `input_ids` of a mapping, whose other tensors of that
    length are cut alike.
    """
    if limit is None:
        return data, None
    batches, cut, longest = [], 0, 0
    for batch in data:
        length = _length(batch)
        if length <= limit:
            batches.append(batch)
            continue
        cut, longest = cut + 1, max(longest, length)
        batches.append(_cut(batch, length, limit))
    if not cut:
        return data, None
    note = f"{cut} of {len(data)} windows were cut to the model's {limit} positions, the longest had {longest} tokens"
    return CalibrationData(tuple(batches), f"{data.source}, cut to {limit} tokens"), note


def token_counts(batches: Iterable[Batch]) -> list[int]:
    """Tokens in each batch; 0 where it holds no token ids."""
    found = (_ids(batch) for batch in batches)
    return [0 if ids is None else ids.numel() for ids in found]


def fingerprint(batches: Iterable[Batch]) -> str:
    """The same for equal batches only."""
    digest = hashlib.sha256()
    for batch in batches:
        _digest(digest, batch)
    return digest.hexdigest()


def _digest(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(as_bytes(value.detach().cpu().contiguous()))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _digest(digest, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _digest(digest, item)
    else:
        digest.update(repr(value).encode())


def _ids(batch: Batch) -> Tensor | None:
    values: Any = (batch,)
    if isinstance(batch, Mapping):
        values = (batch.get("input_ids"),)
    elif isinstance(batch, tuple):
        values = batch[:1]
    return next((it for it in values if isinstance(it, Tensor) and _is_ids(it)), None)


def _is_ids(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool


def _length(batch: Batch) -> int:
    ids = _ids(batch)
    return 0 if ids is None else ids.shape[1]


def _cut(value: Any, length: int, limit: int) -> Any:
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length:
        return value[:, :limit]
    if isinstance(value, Mapping):
        return {key: _cut(item, length, limit) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cut(item, length, limit) for item in value)
    return value
