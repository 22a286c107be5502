"""`compile_decoding()`: the steps of one token as one compiled graph, for transformers' language models on the CPU.

Beside its matrix products a token of a small model is hundreds of tiny operations, which take longer to call than to
compute. `torch.compile` fuses them, if every step has the same shapes: a static cache.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["compile_decoding"]

ATTENTION = "sparseprune_decoding"
"""The name under which transformers knows `_attention`."""

_steps: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


def compile_decoding(model: Any) -> None:
    """Makes `model` run its steps of one token compiled, in place; prompts, training and other caches run as before.

    A step is compiled if it reads one token for each sequence, without gradients, with a `transformers.StaticCache`; the first
    one takes a minute or more, and so does the first with another batch size or length of the cache. So make
    one cache, `cache.reset()` it between texts, and give it to the model or to `model.generate` as `past_key_values`.

    Call it last: a compiled step does not look for changes of the modules (dynamo's checks of them take a millisecond
    per token on a model of 30 blocks). Copies and pickles of the model are not compiled. Compiled steps round less often
    than eager ones, so that their logits differ in the last bits.

    Raises:
        TypeError: not a model of transformers whose attention can be chosen.
        ValueError: the model is not on the CPU, or in training mode.
    """
    _check(model)
    _register()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    _steps[model] = _compiled(type(model).forward)
    model.forward = types.MethodType(_forward_of(type(model)), model)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"model: must be a language model of transformers, got {type(model).__name__}; compile others with torch.compile"
        )
    if model.device.type != "cpu":
        raise ValueError(
            f"model: must be on the CPU, got {model.device}; transformers compiles on GPUs by itself, with cache_implementation='static'"
        )
    if model.training:
        raise ValueError("model: must be in evaluation mode, got one in training mode; call model.eval()")


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Dynamo keeps graphs with the code object, and these do not check which model they are called with: one for each.
    step.__code__ = step.__code__.replace()
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(step, fullgraph=True, dynamic=False, options={"guard_filter_fn": skip})


def _forward_of(model_class: Any) -> Callable[..., Any]:
    plain = model_class.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = _steps.get(self)
        if step is None or torch.is_grad_enabled() or not _is_step(*args, **kwargs):
            return plain(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    return forward


def _is_step(input_ids: Any = None, *_: Any, past_key_values: Any = None, **__: Any) -> bool:
    from transformers import StaticCache

    one = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.shape[1] == 1
    return one and isinstance(past_key_values, StaticCache)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes; one compiled token as sums that fuse into one loop.

    torch's scaled_dot_product_attention takes 0.1 ms for one token and one block in bfloat16 (Zen 5), and behind a mask
    transformers copies each head of keys and values for all the queries that share it. Here they are broadcast.

    query `[batch, heads, tokens, size]`, key and value `[batch, groups, keys, size]`, attention_mask bool
    `[batch, 1, tokens, keys]`; gives `[batch, tokens, heads, size]`.
    """
    if query.shape[2] != 1 or not torch.compiler.is_compiling():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    grouped = query.view(batch, groups, heads // groups, 1, size) * scale
    scores = (grouped * key[:, :, None]).sum(-1, dtype=torch.float32)  # [batch, groups, heads / groups, keys]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    shares = scores.softmax(-1)
    sums = (shares[..., None] * value[:, :, None]).sum(-2)
    return sums.to(query.dtype).view(batch, 1, heads, size), None
