"""Normalised squared error of the blocks' outputs, a mean over the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseprune.models.batches import Batch, attention_mask
from sparseprune.models.blocks import find_blocks
from sparseprune.recovery.terms.base import Read, Term

__all__ = ["Hidden", "hidden_loss"]


class Hidden(Term):
    """The mean over blocks and tokens of |s - t|^2 / |t|^2, s and t the outputs of student and teacher."""

    title = "hidden"
    reads_blocks = True

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        mine, its = len(find_blocks(student)), len(find_blocks(teacher))
        if mine != its or mine == 0:
            raise ValueError(
                f"hidden: needs as many blocks in the teacher as in the model, at least one, got {its} and {mine}; "
                "pass hidden=0"
            )

    def loss(self, student: Read, teacher: Read | None, batch: Batch) -> Tensor:
        assert teacher is not None
        mask = attention_mask(batch)
        means = []
        for mine, its in zip(student.hidden, teacher.hidden, strict=True):
            tokens = mine.shape[:-1].numel()
            counts = None
            if mask is not None and mask.shape == mine.shape[:-1]:
                counts = mask.bool()
                tokens = int(counts.sum())
            means.append(hidden_loss(mine, its, counts) / max(1, tokens))
        return torch.stack(means).sum() / len(means)


def hidden_loss(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum over tokens of |s - t|^2 / |t|^2, for hidden states [..., hidden].

    Each token is normalised on its own: a model's first tokens have states hundreds of times larger than the rest
    and would be all that a common scale sees (arXiv 2402.17762).

    Args:
        counts: bool [...], the tokens to sum over; None means all.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(exact)
    error = (student.to(exact) - target).square().sum(dim=-1)
    error = error / target.square().sum(dim=-1).clamp(min=torch.finfo(exact).tiny)
    return error.sum() if counts is None else error.masked_fill(~counts, 0).sum()
