"""How good and how fast a language model is: perplexity with its protocol, text, tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune.calibration import token_ids
from sparseprune.models import device_of, evaluation_mode, max_length
from sparseprune.report import track

__all__ = [
    "PerplexityResult",
    "SpeedResult",
    "decode_speed",
    "dtype_name",
    "generate",
    "perplexity",
    "prompt_speed",
]

# Rows of logits that become float32 at a time: 128 x 49152 x 4 bytes are 25 MB, a window takes 200.
_ROWS = 128


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity is only comparable under its protocol; `str()` prints both."""

    value: float
    text_name: str
    tokens: int
    windows: int
    window: int
    stride: int
    dtype: str

    @property
    def protocol(self) -> str:
        return (
            f"{self.text_name}: {self.tokens:,} tokens scored in {self.windows} windows of {self.window}, "
            f"stride {self.stride}, no special tokens, {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "protocol": self.protocol}

    def __str__(self) -> str:
        return f"perplexity {self.value:.4g} ({self.protocol})"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Tensor,
    window: int = 1024,
    max_windows: int | None = None,
    stride: int | None = None,
    text_name: str = "text",
    progress: bool = False,
) -> PerplexityResult:
    """exp of the mean negative log-likelihood a token, for a causal language model.

    The text's token ids, without special tokens, are cut from their beginning into windows of `window`
    tokens, each `stride` (default: `window`, no overlap) after the last. A window is read on its own, and
    scores those of its tokens that have a predecessor in it and that no earlier window has scored. Tokens
    behind the last full window are left out.

    Args:
        tokenizer: may be None if `text` is token ids [tokens].
        max_windows: read only the first so many windows.
        text_name: printed with the result.

    Raises:
        ValueError: an argument out of range, a text shorter than one window, a window longer than the model's
            positions, NaN in the logits.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(
            f"window: must be at least 2, got {window}; a token is predicted from those before it"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride: must be in [1, window = {window}], got {stride}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows: must be at least 1, got {max_windows}; pass None for the whole text")
    _check_length(model, "window", window)
    ids = token_ids(text, tokenizer)
    if len(ids) < window:
        raise ValueError(
            f"text: must hold at least one window of {window} tokens, got {len(ids)}; pass a longer text or "
            "a smaller window"
        )
    starts = range(0, len(ids) - window + 1, stride)[:max_windows]
    total, scored = 0.0, 0
    with torch.inference_mode(), evaluation_mode(model):
        for start in track(starts, "perplexity", enabled=progress):
            piece = ids[start : start + window].unsqueeze(0).to(device_of(model))
            logits = model(input_ids=piece, use_cache=False).logits[0]
            first = 1 if start == 0 else max(1, window - stride)
            loss = _negative_log_likelihood(logits[first - 1 : -1], piece[0, first:])
            if math.isnan(loss):
                raise ValueError(f"model: logits must not be NaN, got some in the window at token {start}")
            total += loss
            scored += window - first
    value = _exp(total / scored)
    return PerplexityResult(value, text_name, scored, len(starts), window, stride, dtype_name(model))


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return sum(float(F.cross_entropy(part.float(), target, reduction="sum")) for part, target in parts)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40, chat: bool = False) -> str:
    """The model's greedy continuation of `prompt`, without the prompt.

    Args:
        chat: wrap the prompt, as a user's message, in the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, a tokenizer without a chat template, a prompt that leaves no room.
    """
    if not prompt:
        raise ValueError("prompt: must not be empty; pass some words to continue")
    _check_positive(max_new_tokens=max_new_tokens)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat: the tokenizer has no chat template; pass chat=False")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    ids = encoded["input_ids"].to(device_of(model))
    _check_length(model, "max_new_tokens", ids.shape[1] + max_new_tokens)
    with torch.inference_mode(), evaluation_mode(model):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True)
class SpeedResult:
    """Tokens per second, from the median of `runs` timings of `tokens` tokens each."""

    tokens_per_second: float
    seconds: float
    tokens: int
    runs: int
    threads: int
    what: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        speed = f"{self.tokens_per_second:.1f} tokens/s"
        return f"{speed} ({self.what}, median of {self.runs}, {self.threads} threads)"


def decode_speed(model: Any, prompt_length: int = 16, new_tokens: int = 64, warmup: int = 4) -> SpeedResult:
    """Greedy decoding at batch 1 with the model's own cache: the median time of `new_tokens` steps."""
    _check_positive(prompt_length=prompt_length, new_tokens=new_tokens)
    _check_length(model, "new_tokens", prompt_length + warmup + new_tokens)
    times = []
    with torch.inference_mode(), evaluation_mode(model):
        output = model(input_ids=_random_ids(model, prompt_length), use_cache=True)
        for _ in range(warmup + new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            begin = _now(model)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            times.append(_now(model) - begin)
    return _speed(model, times[warmup:], 1, f"decode, batch 1, {dtype_name(model)}")


def prompt_speed(model: Any, length: int = 512, repeats: int = 5, warmup: int = 1) -> SpeedResult:
    """Reading `length` random tokens at batch 1, logits included: the median of `repeats` passes."""
    _check_positive(length=length, repeats=repeats)
    _check_length(model, "length", length)
    times = []
    with torch.inference_mode(), evaluation_mode(model):
        ids = _random_ids(model, length)
        for _ in range(warmup + repeats):
            begin = _now(model)
            model(input_ids=ids, use_cache=True)
            times.append(_now(model) - begin)
    return _speed(model, times[warmup:], length, f"prompt of {length}, batch 1, {dtype_name(model)}")


def _speed(model: nn.Module, times: list[float], tokens: int, what: str) -> SpeedResult:
    seconds = statistics.median(times)
    return SpeedResult(tokens / seconds, seconds, tokens, len(times), torch.get_num_threads(), what)


def _now(model: nn.Module) -> float:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _random_ids(model: Any, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator).to(device_of(model))


def dtype_name(model: nn.Module) -> str:
    """The floating-point dtype of the model's first parameter, as "float32"."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(next(dtypes, torch.get_default_dtype())).removeprefix("torch.")


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")


def _check_length(model: nn.Module, argument: str, length: int) -> None:
    limit = max_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"{argument}: the model's positions end at {limit}, this would take {length}; lower it"
        )
