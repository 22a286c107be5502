"""Models to cut neurons, heads and layers from, and what to compare."""

from __future__ import annotations

import torch
from helpers import tiny
from torch import Tensor, nn

from sparseprune.surgery.probe import find_neurons, sample_batch


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output = model(tiny.ids(2, 12, 99) if ids is None else ids)
    return next(
        value
        for value in (getattr(output, "logits", None), getattr(output, "last_hidden_state", None), output)
        if isinstance(value, torch.Tensor)
    )


def correlated(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gives the hidden neurons very different sizes, and makes half of them near copies of others."""
    generator = torch.Generator().manual_seed(seed)
    for group in find_neurons(model, sample_batch(model, None)):
        half = group.width // 2
        for layer in group.producers:
            weight = layer.weight
            weight[half : 2 * half] = (
                weight[:half] + 0.05 * torch.randn(half, weight.shape[1], generator=generator) * weight.std()
            )
        group.consumer.weight.mul_(torch.exp(torch.randn(group.width, generator=generator)))
    return model


FAMILIES = {
    "llama": tiny.llama,
    "llama tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "bert mlm": lambda: tiny.bert(head=True),
    "lstm": tiny.lstm_classifier,
}
TRANSFORMERS = [name for name in FAMILIES if name != "lstm"]


def phi3() -> nn.Module:
    """Fused query, key and value; fused gate and up."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(**tiny.SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)
    return Phi3ForCausalLM(config).eval()


def gpt_neox() -> nn.Module:
    """Fused query, key and value, interleaved by head; attention and feed-forward side by side."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**tiny.SIZES)).eval()
