"""What pruning does to a model's predictions, on text that no statistic has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.measure.fidelity import divergence
from sparseprune.models.batches import Batch, attention_mask, call, no_cache, to_device
from sparseprune.models.blocks import find_blocks
from sparseprune.models.modules import device_of, evaluation_mode

__all__ = ["Judge", "hold_out"]

PIECE = 512
"""Tokens of each held-out window that are read. More windows tell more than longer ones; but pruning hurts most where
there is little context: a search judged by 256 tokens gained 18 % of perplexity there, and 4 % in windows of 512."""

_BATCH = 1024  # tokens read at once: their logits are what takes memory


def hold_out(data: CalibrationData, argument: str, tokens: int) -> tuple[CalibrationData, list[Batch]]:
    """Batches for statistics, and about `tokens` tokens of other batches to judge by.

    Every fourth batch, and at least one, is held out. Of token ids [1, length] the first 512 are read, several windows
    at once.

    Raises:
        ValueError: fewer than two batches.
    """
    if len(data) < 2:
        raise ValueError(
            f"calibration: allocation {argument} holds some out to judge by and needs at least 2 batches, got "
            f"{len(data)}; pass more windows"
        )
    held = [batch for index, batch in enumerate(data) if index % 4 == 1]
    fit = CalibrationData([batch for index, batch in enumerate(data) if index % 4 != 1], data.source)
    pieces: list[Batch] = []
    read = 0
    for batch in held:
        plain = isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point()
        if plain and read >= tokens:
            continue
        piece: Any = batch[:, :PIECE] if plain else batch  # type: ignore[call-overload, index]
        last = pieces[-1] if pieces and plain else None
        if isinstance(last, Tensor) and last.shape[1] == piece.shape[1] and last.numel() < _BATCH:
            pieces[-1] = torch.cat([last, piece])
        else:
            pieces.append(piece)
        read += piece.numel() if plain else 0
    return fit, pieces


class Judge:
    """Compares a model that changes with what it predicted when the judge was made.

    Predictions are compared by KL divergence, mean over rows (tokens), where the model gives logits; by the squared
    error relative to their square, where it gives hidden states.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = [to_device(batch, device_of(model)) for batch in batches]
        self.blocks = find_blocks(model)
        # what each block gave when nothing was changed: a change in block b leaves all before it as they were
        self._outputs: list[list[Any]] = []
        self._before: list[tuple[Tensor, bool]] = []
        for batch in self.batches:
            seen: list[Any] = []
            with self._running(), _recording([block for _, block in self.blocks], seen):
                self._before.append(_prediction(call(model, batch), batch))
            self._outputs.append(seen if len(seen) == len(self.blocks) else [])

    @property
    def compares_logits(self) -> bool:
        return all(logits for _, logits in self._before)

    def __call__(self, block: str | None = None) -> float:
        """How far the model is from what it was.

        Args:
            block: nothing before this block has changed: those before it need not run.
        """
        names = [name for name, _ in self.blocks]
        first = names.index(block) if block in names else 0
        total, rows = 0.0, 0
        for batch, outputs, (before, logits) in zip(self.batches, self._outputs, self._before, strict=True):
            done = first if outputs else 0
            known = [(self.blocks[index][1], outputs[index]) for index in range(done)]
            with self._running(), _returning(known):
                after, _ = _prediction(call(self.model, batch), batch)
            rows += len(before)
            if logits:
                total += divergence(before, after)[0]
            else:
                error = (after.float() - before.float()).square().sum(dtype=torch.float64)
                size = before.float().square().sum(dtype=torch.float64)
                total += len(before) * float(error / size.clamp_min(1e-30))
        return total / max(rows, 1)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.no_grad(), evaluation_mode(self.model), no_cache(self.model):
            yield


def _prediction(output: Any, batch: Batch) -> tuple[Tensor, bool]:
    """(rows [tokens, classes or features] without padding, whether they are logits)."""
    logits = getattr(output, "logits", None)
    if isinstance(output, Tensor):
        logits = output
    found = logits if isinstance(logits, Tensor) else output[0]
    mask = attention_mask(batch)
    if mask is not None and mask.ndim == 2 and found.shape[:-1] == mask.shape:
        return found[mask.bool()], logits is not None
    return found.reshape(-1, found.shape[-1]), logits is not None


@contextmanager
def _recording(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning(known: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Inside, the blocks do nothing, and each returns what it once gave."""
    try:
        for block, output in known:
            block.forward = lambda *args, output=output, **kwargs: output  # type: ignore[method-assign, misc]
        yield
    finally:
        for block, _ in known:
            del block.forward
