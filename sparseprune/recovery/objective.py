"""Student and teacher read a batch, and what recovery minimises comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune.models.batches import Batch, attention_mask, call, no_cache
from sparseprune.models.blocks import find_blocks
from sparseprune.models.losses import IGNORED, is_causal
from sparseprune.models.modules import evaluation_mode
from sparseprune.recovery.attention import FastAttention
from sparseprune.recovery.head import head_loss
from sparseprune.recovery.terms import Distillation
from sparseprune.recovery.terms.base import Head, LogitsTerm, Read

__all__ = ["Objective"]


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
        distillation: Distillation,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = distillation.loss
        self.autocast = autocast
        self.terms = distillation.terms(teacher is not None)
        self._teacher = [] if teacher is None else [teacher]  # a list hides it from parameters()
        self._splits: dict[int, tuple[nn.Module, nn.Linear] | None] = {}
        self._frozen_head: tuple[tuple[int, int], Tensor] | None = None
        self._blocks = {id(model): find_blocks(model) for model in (student, *self._teacher)}

    def count(self, batch: Batch) -> int:
        """How many tokens (rows of the batch, where there are no labels) the losses are means over."""
        labels = self._labels(batch)
        return len(_first_tensor(batch)) if labels is None else int((labels != IGNORED).sum())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each term's mean over the batch's tokens, by name, a scalar; and "total", their weighted sum, which alone
        carries a gradient.
        """
        labels = self._labels(batch)
        used = {name: term for name, term in self.terms.items() if term.weight}
        for term in used.values():
            if isinstance(term, LogitsTerm) and term.needs_labels and labels is None:
                raise ValueError(
                    "data: batches must have labels to learn from, got none; pass mappings with 'labels', a loss, or a "
                    "teacher and cross_entropy=0"
                )
        taught = None
        if any(term.needs_teacher for term in used.values()):
            with torch.no_grad(), evaluation_mode(self._teacher[0]):
                taught = self._read(self._teacher[0], batch)
        of_logits = {
            name: term
            for name, term in self.terms.items()
            if isinstance(term, LogitsTerm)
            and (term.weight or (term.recorded and not (term.needs_labels and labels is None)))
        }
        device = _first_tensor(batch).device
        cast = torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)
        with cast, FastAttention():
            read = self._read(self.student, batch)
            means = {
                name: term.loss(read, taught, batch) for name, term in used.items() if name not in of_logits
            }
        zero = read.states.new_zeros((), dtype=torch.promote_types(read.states.dtype, torch.float32))
        total = zero
        for name, mean in means.items():
            total = total + used[name].weight * mean
        if of_logits:
            part, sums = self._of_logits(read, taught, labels, list(of_logits.values()))
            means.update(zip(of_logits, sums, strict=True))
            total = total + part
        return {"total": total, **{name: means.get(name, zero).detach() for name in self.terms}}

    def _of_logits(
        self, read: Read, taught: Read | None, labels: Tensor | None, terms: Sequence[LogitsTerm]
    ) -> tuple[Tensor, Tensor]:
        """(their weighted sum, each one's mean)"""
        states = read.states.flatten(0, -2)
        flat = None if labels is None else labels.flatten()
        teacher = taught if any(term.needs_teacher for term in terms) else None
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
            terms,
            self.autocast if read.head is not None else None,
        )
        count = len(states) if flat is None else max(1, int((flat != IGNORED).sum()))
        return result.total / count, result.sums / count

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

    def _read(self, model: nn.Module, batch: Batch) -> Read:
        if (
            isinstance(batch, Mapping) and "labels" in batch
        ):  # the model would spend time on a loss of its own
            batch = {key: value for key, value in batch.items() if key != "labels"}
        if id(model) not in self._splits:
            parts = _parts(model) if self.loss is None else None
            self._splits[id(model)] = parts if parts is not None and _splits(model, *parts, batch) else None
        blocks = (
            [block for _, block in self._blocks[id(model)]]
            if any(term.weight and term.reads_blocks for term in self.terms.values())
            else []
        )
        with _recording(blocks) as hidden, no_cache(model):
            parts = self._splits[id(model)]
            if parts is not None:
                trunk, head = parts
                return Read(call(trunk, batch)[0], (head.weight, head.bias), None, hidden)
            output = call(model, batch)
        return Read(_logits(output), None, output, hidden)


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
