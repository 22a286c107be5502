"""How good and how fast a language model is: perplexity with its protocol, text, tokens per second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune import clock
from sparseprune.calibration import token_ids
from sparseprune.models.modules import device_of, evaluation_mode, max_length, require_module
from sparseprune.options import require_at_least
from sparseprune.report import track
from sparseprune.statistics.overlap import recall

__all__ = [
    "PROMPT",
    "PerplexityResult",
    "SpeedResult",
    "Windows",
    "check_windows",
    "decode_speed",
    "dtype_name",
    "generate",
    "logits_of",
    "perplexity",
    "prompt_speed",
    "window_loss",
]

# Rows of logits that become float32 at a time: 128 x 49152 x 4 bytes are 25 MB, a window takes 200.
_ROWS = 128

PROMPT = 512
"""Tokens in a prompt whose reading is timed, where a model has so many positions."""


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
    warning: str | None = None
    """Set where the model was calibrated on some of the text."""

    @property
    def protocol(self) -> str:
        return (
            f"{self.text_name}: {self.tokens:,} tokens scored in {self.windows} windows of {self.window}, "
            f"stride {self.stride}, no special tokens, {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "protocol": self.protocol}

    def __str__(self) -> str:
        text = f"perplexity {self.value:.4g} ({self.protocol})"
        return text if self.warning is None else f"{text}\n{self.warning}"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Tensor,
    *,
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
    protocol = Windows.of(model, tokenizer, text, window, max_windows, stride, text_name)
    loss = 0.0
    with torch.inference_mode(), evaluation_mode(model):
        for index, piece, first in track(protocol, "perplexity", len(protocol), enabled=progress):
            loss += window_loss(logits_of(model, piece), piece, first, start=index)
    return protocol.result(model, loss)


def check_windows(window: int, max_windows: int | None, stride: int | None) -> None:
    """Raises ValueError for windows that no text has, see `perplexity`."""
    require_at_least(1, window=window)
    require_at_least(1, optional=True, max_windows=max_windows, stride=stride)
    if window < 2:
        raise ValueError(
            f"window: must be at least 2, got {window}; a token is predicted from those before it"
        )
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"stride: must be in [1, window = {window}], got {stride}")


@dataclass(frozen=True)
class Windows:
    """A text cut up as `perplexity` reads it; gives (token it begins at, ids [1, window], first token to score)."""

    ids: Tensor
    window: int
    stride: int
    starts: range
    text_name: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        text: str | Tensor,
        window: int,
        max_windows: int | None,
        stride: int | None,
        text_name: str,
    ) -> Windows:
        """Arguments and errors: see `perplexity`."""
        require_module(model=model)
        check_windows(window, max_windows, stride)
        stride = window if stride is None else stride
        _check_length(model, "window", window)
        ids = token_ids(text, tokenizer)
        if len(ids) < window:
            raise ValueError(
                f"text: must hold at least one window of {window} tokens, got {len(ids)}; pass a longer text or "
                "a smaller window"
            )
        return cls(ids, window, stride, range(0, len(ids) - window + 1, stride)[:max_windows], text_name)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, Tensor, int]]:
        for start in self.starts:
            first = 1 if start == 0 else max(1, self.window - self.stride)
            yield start, self.ids[start : start + self.window].unsqueeze(0), first

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(self.window - first for _, _, first in self)

    def result(self, model: nn.Module, loss: float) -> PerplexityResult:
        """The perplexity of which `loss` is the sum over all scored tokens."""
        known = recall(model)
        read = self.ids[: self.starts[-1] + self.window]
        shared = None if known is None else known.overlap(read)
        return PerplexityResult(
            _exp(loss / self.scored), self.text_name, self.scored, len(self), self.window, self.stride,
            dtype_name(model), str(shared) if shared else None,
        )  # fmt: skip


def logits_of(model: nn.Module, piece: Tensor) -> Tensor:
    """[window, vocabulary], for one window of token ids [1, window]."""
    logits: Tensor = model(input_ids=piece.to(device_of(model)), use_cache=False).logits[0]
    return logits


def window_loss(logits: Tensor, piece: Tensor, first: int, *, start: int) -> float:
    """Negative log-likelihood of the window's tokens from `first` on.

    Raises:
        ValueError: NaN in the logits [window, vocabulary].
    """
    loss = _negative_log_likelihood(logits[first - 1 : -1], piece[0, first:].to(logits.device))
    if math.isnan(loss):
        raise ValueError(f"model: logits must not be NaN, got some in the window at token {start}")
    return loss


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return sum(float(F.cross_entropy(part.float(), target, reduction="sum")) for part, target in parts)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def generate(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 40, chat: bool = False) -> str:
    """The model's greedy continuation of `prompt`, without the prompt.

    Args:
        chat: wrap the prompt, as a user's message, in the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, a tokenizer without a chat template, a prompt that leaves no room.
    """
    if not prompt:
        raise ValueError("prompt: must not be empty; pass some words to continue")
    require_at_least(1, max_new_tokens=max_new_tokens)
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


def decode_speed(
    model: Any, prompt_length: int = 16, new_tokens: int = 64, *, warmup: int = 4
) -> SpeedResult:
    """Greedy decoding at batch 1 with the model's own cache: the median time of `new_tokens` steps."""
    require_at_least(1, prompt_length=prompt_length, new_tokens=new_tokens)
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


def prompt_speed(model: Any, length: int = PROMPT, repeats: int = 5, *, warmup: int = 1) -> SpeedResult:
    """Reading `length` random tokens at batch 1, logits included: the median of `repeats` passes."""
    require_at_least(1, length=length, repeats=repeats)
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
    return clock.now()


def _random_ids(model: Any, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator).to(device_of(model))


def dtype_name(model: nn.Module) -> str:
    """The floating-point dtype of the model's first parameter, as "float32"."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(next(dtypes, torch.get_default_dtype())).removeprefix("torch.")


def _check_length(model: nn.Module, argument: str, length: int) -> None:
    limit = max_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"{argument}: the model's positions end at {limit}, this would take {length}; lower it"
        )
