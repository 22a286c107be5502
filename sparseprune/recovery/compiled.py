"""A model's blocks, compiled for the time of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparseprune.models.blocks import find_blocks

__all__ = ["compiled_blocks"]


@contextmanager
def compiled_blocks(*models: nn.Module) -> Iterator[None]:
    """`torch.compile` of each block's forward pass inside; blocks alike share their code.

    What lies between a block's matrix products (norms, rotary embeddings, activations, casts) becomes a few fused
    loops. Block by block, not the model as one: that would take as many times longer to compile as it has blocks.

    Raises:
        ValueError: a model without repeated blocks.
    """
    blocks = []
    for model in models:
        found = [block for _, block in find_blocks(model)]
        if not found:
            raise ValueError(
                f"compile: {type(model).__name__} has no repeated blocks to compile; pass compile=False"
            )
        blocks += found
    for block in blocks:
        # the method, not the module: hooks on it come and go between steps, and stay outside
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
