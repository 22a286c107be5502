"""What recovery minimises: cross-entropy on the text, and distances to the dense model that is the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune.models.batches import Batch, attention_mask, call, no_cache
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import IGNORED, Loss, is_causal
from sparseprune.models.modules import evaluation_mode
from sparseprune.recovery.attention import FastAttention
from sparseprune.recovery.losses import Head, head_loss, hidden_loss

__all__ = ["Distillation", "Losses", "Objective"]


@dataclass(frozen=True)
class Distillation:
    """How much each loss weighs; each is a mean over tokens, see `head_loss` and `hidden_loss`.

    Attributes:
        cross_entropy: on the text's own next tokens, or the batch's labels.
        logits: KL of the teacher's distribution to the student's, over the full vocabulary.
        temperature: softens both distributions in that divergence.
        hidden: normalised squared error of the blocks' outputs, a mean over the blocks.
    """

    cross_entropy: float = 0.0
    logits: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("cross_entropy", "logits", "hidden")}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: must be at least 0, got {value}; 0 leaves this loss out")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0, got {self.temperature}; 1 softens nothing")
        if not any(weights.values()):
            raise ValueError("cross_entropy, logits, hidden: must not all be 0; make one of them 1")


class Losses(NamedTuple):
    """Means over a batch's tokens, each a scalar tensor; only `total`, their weighted sum, carries a gradient."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    hidden: Tensor


class _Read(NamedTuple):
    """What one model made of a batch: logits = head(states), or states where `head` is None."""

    states: Tensor
    head: Head | None
    output: Any
    hidden: Sequence[Tensor]


class Objective(nn.Module):
    """Student and teacher read a batch, and the losses come out. The student is a submodule, the teacher is not.

    A module, because data parallelism wraps whatever has the forward pass.

    Where the student's logits are its output head applied to what its base model returns, as in nearly every decoder,
    the head runs inside the loss, a few rows at a time; whether it is so is tried out on the first batch. Other
    models (logits scaled or capped, classifiers) run whole.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        weights: Distillation,
        loss: Loss | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.weights = weights
        self.loss = loss
        self.autocast = autocast
        self._teacher = [] if teacher is None else [teacher]  # a list hides it from parameters()
        self._splits: dict[int, tuple[nn.Module, nn.Linear] | None] = {}
        self._frozen_head: tuple[tuple[int, int], Tensor] | None = None
        self._blocks = {id(model): find_blocks(model) for model in (student, *self._teacher)}
        if weights.hidden and teacher is not None:
            mine, its = (len(self._blocks[id(model)]) for model in (student, teacher))
            if mine != its or mine == 0:
                raise ValueError(
                    f"hidden: needs as many blocks in the teacher as in the model, at least one, got {its} and "
                    f"{mine}; pass hidden=0"
                )

    def count(self, batch: Batch) -> int:
        """How many tokens (rows of the batch, where there are no labels) the losses are means over."""
        labels = self._labels(batch)
        return len(_first_tensor(batch)) if labels is None else int((labels != IGNORED).sum())

    def forward(self, batch: Batch) -> Losses:
        weights = self.weights
        labels = self._labels(batch)
        if weights.cross_entropy and labels is None and self.loss is None:
            raise ValueError(
                "data: batches must have labels to learn from, got none; pass mappings with 'labels', a loss, or a "
                "teacher and cross_entropy=0"
            )
        taught = None
        if self._teacher and (weights.logits or weights.hidden):
            with torch.no_grad(), evaluation_mode(self._teacher[0]):
                taught = self._read(self._teacher[0], batch)
        device = _first_tensor(batch).device
        cast = torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)
        with cast, FastAttention():
            read = self._read(self.student, batch)
            given = self.loss(read.output, batch) if self.loss is not None else None
        zero = read.states.new_zeros((), dtype=torch.promote_types(read.states.dtype, torch.float32))
        total = ce = divergence = hidden = zero
        if given is not None:
            ce = given.detach()
            total = total + weights.cross_entropy * given
        if labels is not None or (taught is not None and weights.logits):
            part, ce_mean, divergence = self._head_losses(read, taught, labels)
            ce = ce if given is not None else ce_mean
            total = total + part
        if taught is not None and weights.hidden:
            hidden = _hidden_losses(read.hidden, taught.hidden, attention_mask(batch))
            total = total + weights.hidden * hidden
        return Losses(total, ce, divergence, hidden.detach())

    def _head_losses(
        self, read: _Read, taught: _Read | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = read.states.flatten(0, -2)
        flat = None if labels is None else labels.flatten()
        teacher = taught if taught is not None and self.weights.logits else None
        if flat is not None and len(flat) != len(states):
            raise ValueError(
                f"data: labels must be one for each row of logits, got {len(flat)} for {len(states)} rows"
            )
        result = head_loss(
            states,
            read.head if read.head is None else self._cast(read.head),
            flat,
            None if teacher is None else teacher.states.flatten(0, -2),
            None if teacher is None else teacher.head,
            # a loss function of the caller's stands in for the cross-entropy
            0.0 if self.loss is not None else self.weights.cross_entropy,
            self.weights.logits,
            self.weights.temperature,
            self.autocast if read.head is not None else None,
        )
        count = len(states) if flat is None else max(1, int((flat != IGNORED).sum()))
        return result.total / count, result.cross_entropy / count, result.divergence / count

    def _cast(self, head: Head) -> Head:
        """A head that is not trained is cast once, not in every step."""
        weight, bias = head
        if self.autocast is None or weight.requires_grad or weight.dtype == self.autocast:
            return head
        key = (id(weight), weight._version)
        if self._frozen_head is None or self._frozen_head[0] != key:
            self._frozen_head = (key, weight.detach().to(self.autocast))
        return self._frozen_head[1], bias

    def _labels(self, batch: Batch) -> Tensor | None:
        """int64 [batch, ...], the next token at each place of a causal model, -100 where there is none to learn."""
        if self.loss is not None:
            return None
        given = batch.get("labels") if isinstance(batch, Mapping) else None
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        causal = is_causal(self.student)
        if given is None:
            if not (causal and isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()):
                return None
            mask = attention_mask(batch)
            given = ids if mask is None else ids.masked_fill(~mask.bool(), IGNORED)
        if not causal:
            return given
        last = torch.full_like(given[:, :1], IGNORED)
        return torch.cat([given[:, 1:], last], dim=1)

    def _read(self, model: nn.Module, batch: Batch) -> _Read:
        if (
            isinstance(batch, Mapping) and "labels" in batch
        ):  # the model would spend time on a loss of its own
            batch = {key: value for key, value in batch.items() if key != "labels"}
        if id(model) not in self._splits:
            parts = _parts(model) if self.loss is None else None
            self._splits[id(model)] = parts if parts is not None and _splits(model, *parts, batch) else None
        blocks = [block for _, block in self._blocks[id(model)]] if self.weights.hidden else []
        with _recording(blocks) as hidden, no_cache(model):
            parts = self._splits[id(model)]
            if parts is not None:
                trunk, head = parts
                return _Read(call(trunk, batch)[0], (head.weight, head.bias), None, hidden)
            output = call(model, batch)
        return _Read(_logits(output), None, output, hidden)


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """A model's base model and its output head, if it says which they are."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    trunk = getattr(model, "base_model", None)
    if not isinstance(trunk, nn.Module) or trunk is model or type(head) is not nn.Linear:
        return None
    return trunk, head


def _splits(model: nn.Module, trunk: nn.Module, head: nn.Linear, batch: Batch) -> bool:
    """Whether the logits are exactly head(trunk), on the first tokens of a batch."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor):
        return False
    probe = ids[:1, :8]
    with torch.no_grad(), evaluation_mode(model), no_cache(model):
        whole = _logits(model(probe))
        states = trunk(probe)[0]
        if not isinstance(states, Tensor) or states.shape[-1] != head.in_features:
            return False
        split = F.linear(states, head.weight, head.bias)
    return whole.shape == split.shape and torch.allclose(whole.float(), split.float(), rtol=1e-5, atol=1e-6)


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of `blocks`, in the order they ran."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(hook).remove)
        yield outputs


def _hidden_losses(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for mine, its in zip(student, teacher, strict=True):
        tokens = mine.shape[:-1].numel()
        counts = None
        if mask is not None and mask.shape == mine.shape[:-1]:
            counts = mask.bool()
            tokens = int(counts.sum())
        total = total + hidden_loss(mine, its, counts) / max(1, tokens)
    return total / len(student)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: must return a tensor or an output with logits, got {type(output).__name__}; wrap it in a module "
            "that does"
        )
    return logits


def _first_tensor(batch: Batch) -> Tensor:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError("data: a batch must hold a tensor, got none")
