"""What a recovery step reads: windows of one text, or batches given, in an order that the seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseprune.calibration import CalibrationData, token_ids
from sparseprune.models.batches import Batch
from sparseprune.options import require_at_least

__all__ = ["Sampler", "TokenStream", "as_sampler", "batches_of"]


class Sampler(Protocol):
    """Draws training samples. The k-th sample is a function of k and the seed alone: a resumed run goes on exactly."""

    @property
    def source(self) -> str:
        """Where the samples come from, in words."""

    def draw(self, index: int, seed: int) -> Batch:
        """The sample of this index, of any size >= 0."""

    def digest(self) -> str:
        """Tells one set of samples from another."""


@dataclass(frozen=True)
class TokenStream:
    """Windows of `length` tokens of one text, drawn without end; a sample is int64 [1, length].

    An epoch reads the text once: it is cut into windows from a random offset, and they come in random order. No
    special tokens are added.

    Raises:
        ValueError: `length` below 2, an empty text, or one of fewer than `length` tokens.
    """

    text: str | Tensor | Sequence[int] = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    length: int = 512
    ids: Tensor = field(init=False, repr=False)
    _epoch: dict[tuple[int, int], tuple[int, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least(1, length=self.length)
        if self.length < 2:
            raise ValueError(
                f"length: must be at least 2, got {self.length}; a token is predicted from those before it"
            )
        ids = token_ids(self.text, self.tokenizer)
        if len(ids) < self.length:
            raise ValueError(
                f"text: must hold at least one window of {self.length} tokens, got {len(ids)}; pass a longer text "
                "or a smaller length"
            )
        object.__setattr__(self, "ids", ids)

    @property
    def source(self) -> str:
        return f"windows of {self.length} tokens from a text of {len(self.ids):,}"

    def draw(self, index: int, seed: int = 0) -> Tensor:
        # one window of each epoch is lost to the offset, unless there is but one
        count = max(1, (len(self.ids) - self.length) // self.length)
        epoch, place = divmod(index, count)
        if (seed, epoch) not in self._epoch:
            generator = _generator(seed, epoch)
            room = len(self.ids) - count * self.length
            offset = int(torch.randint(room + 1, (), generator=generator))
            self._epoch.clear()
            self._epoch[seed, epoch] = (offset, torch.randperm(count, generator=generator))
        offset, order = self._epoch[seed, epoch]
        start = offset + int(order[place]) * self.length
        return self.ids[start : start + self.length].unsqueeze(0)

    def digest(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes() + str(self.length).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Batches:
    """Given batches, each once an epoch in random order."""

    data: CalibrationData

    @property
    def source(self) -> str:
        return self.data.source

    def draw(self, index: int, seed: int = 0) -> Batch:
        epoch, place = divmod(index, len(self.data))
        order = torch.randperm(len(self.data), generator=_generator(seed, epoch))
        return self.data.batches[int(order[place])]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for batch in self.data.batches:
            for tensor in _tensors(batch):
                digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def as_sampler(data: Sampler | CalibrationData | Iterable[Batch]) -> Sampler:
    """A sampler over whatever holds training data.

    Raises:
        TypeError: a text without its tokenizer, or nothing that can be drawn from.
    """
    if isinstance(data, CalibrationData):
        return _Batches(data)
    if hasattr(data, "draw") and hasattr(data, "digest"):
        return data  # type: ignore[return-value]
    if isinstance(data, (str, Tensor, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: must be samples to draw from, got a {type(data).__name__}; pass "
            "sparseprune.recovery.TokenStream(text, tokenizer)"
        )
    return _Batches(CalibrationData(list(data)))


def batches_of(sampler: Sampler) -> Iterable[Batch]:
    """All that the sampler draws from, where it is one of ours."""
    if isinstance(sampler, TokenStream):
        return [sampler.ids.unsqueeze(0)]
    return sampler.data if isinstance(sampler, _Batches) else []


def join(samples: Sequence[Batch]) -> list[Batch]:
    """Samples of one shape as a single batch, others one by one."""
    if len(samples) > 1 and all(isinstance(sample, Tensor) for sample in samples):
        tensors = [sample for sample in samples if isinstance(sample, Tensor)]
        if len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) == 1:
            return [torch.cat(tensors)]
    return list(samples)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # a hash, not a sum: seed 0 epoch 1 and seed 1 epoch 0 must differ
    value = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(value, "little"))
