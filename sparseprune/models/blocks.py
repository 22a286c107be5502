"""The repeated blocks of a model. Found by structure, never by name."""

from __future__ import annotations

from torch import nn

from sparseprune.models.modules import require_module
from sparseprune.models.sites import is_linear

__all__ = ["find_blocks"]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks, in model order: `model.layers.0`, `model.layers.1`, ... of a Llama.

    A block is an item of an outermost `nn.ModuleList` (or `nn.Sequential` of one class) every item of which
    holds linear layers without being one. A model without any gives [].
    """
    require_module(model=model)
    blocks: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if _is_block_list(child):
                blocks.extend((f"{path}.{index}", block) for index, block in child.named_children())
            else:
                visit(f"{path}.", child)

    if _is_block_list(model):
        return list(model.named_children())
    visit("", model)
    return blocks


def _is_block_list(module: nn.Module) -> bool:
    items = list(module.children())
    if isinstance(module, nn.Sequential):
        # nn.Sequential holds anything in a row; it is a stack of blocks only if its items are alike
        if len({type(item) for item in items}) != 1 or len(items) < 2:
            return False
    elif not isinstance(module, nn.ModuleList):
        return False
    return bool(items) and all(
        not is_linear(item) and any(is_linear(inner) for inner in item.modules()) for item in items
    )
