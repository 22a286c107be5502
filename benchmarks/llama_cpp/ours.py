"""This package's side: a model in each of our forms, made once and kept, and the clock for its tokens."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparseprune as sp
from sparseprune.calibration import windows
from sparseprune.demo import demo_texts
from sparseprune.io.checkpoint import load_tokenizer
from sparseprune.measure.evaluate import Windows, logits_of, prompt_speed, window_loss
from sparseprune.models.decoding import compile_decoding
from sparseprune.models.loading import load_dense

CACHE_LENGTH = 256
"""Positions of the static cache. Attention of a compiled step reads all of them."""

_PROMPT = 16


@dataclass(frozen=True)
class Form:
    """How the weights are held: `encoding` and `embeddings` as for `sp.quantize`, "keep": the codes of the GGUF file."""

    name: str
    encoding: str | None = None
    embeddings: str | None = None
    pruned: bool = False


FORMS = (
    Form("dense bf16"),
    Form("the file's codes, embeddings int8", "keep", "int8"),
    Form("int8, embeddings int8", "int8", "int8"),
    Form("int4, embeddings int8", "int4", "int8"),
    Form("int4 everywhere", "int4", "int4"),
    Form("2:4 int8, embeddings int8", "int8", "int8", pruned=True),
    Form("2:4 int4, embeddings int8", "int4", "int8", pruned=True),
)
"""Of a real model."""

SHAPE_FORMS = (
    Form("dense bf16"),
    Form("int4 everywhere", "int4", "int4"),
    Form("2:4 int4 everywhere", "int4", "int4", pruned=True),
)
"""Of random weights."""


def made(form: Form, source: Path, cache: Path) -> Path:
    """The folder of a GGUF file's model in this form; made the first time, with calibration text where that helps."""
    folder = cache / "ours" / form.name.replace(":", "of").replace(", ", "-").replace(" ", "-")
    if folder.is_dir():
        return folder
    model, tokenizer = _pruned(source, cache) if form.pruned else load_dense(source, torch.bfloat16)
    if form.encoding is not None:
        keep = source if form.encoding == "keep" else None
        encoding: Any = "int8" if keep else form.encoding
        data = windows(demo_texts()[0], tokenizer, length=512, count=32) if encoding == "int4" else None
        sp.quantize(model, encoding, calibration=data, keep=keep, embeddings=form.embeddings)  # type: ignore[arg-type]
    sp.save(model, folder, tokenizer)
    return folder


def _pruned(source: Path, cache: Path) -> tuple[Any, Any]:
    folder = cache / "ours" / "pruned"
    if not folder.is_dir():
        model, tokenizer = load_dense(source, torch.bfloat16)
        data = windows(demo_texts()[0], tokenizer, length=512, count=32)
        # not "auto": what fits in its minutes depends on the machine
        sp.prune(model, "2:4", "admm", calibration=data)
        sp.save(model, folder, tokenizer)
    return sp.load(folder), load_tokenizer(folder)


def in_form(dense: Any, form: Form) -> Any:
    """A copy of a model in this form, rounded to nearest and pruned by magnitude: for speed alone."""
    model = copy.deepcopy(dense)
    if form.pruned:
        sp.prune(model, "2:4", "magnitude")
    if form.encoding is not None:
        sp.quantize(model, form.encoding, "nearest", embeddings=form.embeddings)  # type: ignore[arg-type]
    return model


def second_halves(model: Any, text: str | torch.Tensor, tokenizer: Any, window: int, count: int) -> float:
    """Perplexity as llama-perplexity takes it: of each window only the second half is scored, behind the first."""
    cut = Windows.of(model, tokenizer, text, window, count, None, "text")
    with torch.inference_mode():
        losses = [
            window_loss(logits_of(model, piece), piece, window // 2 + 1, start=start)
            for start, piece, _ in cut
        ]
    scored = len(losses) * (window - window // 2 - 1)
    return float(torch.tensor(sum(losses) / scored).exp())


class Candidate:
    """One model, ready: its compiled steps are compiled, in a copy, because compiling leaves its mark on a model."""

    def __init__(self, model: Any) -> None:
        from transformers import StaticCache

        self._plain = model
        self._compiled = copy.deepcopy(model)
        compile_decoding(self._compiled)
        self._cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(model.config.vocab_size, (1, _PROMPT), generator=generator)
        self.compiled(2)

    def generated(self, new: int) -> float:
        """Tokens per second of `model.generate`, greedy, with the cache it makes itself: the time of `new` more tokens."""
        short, long = self._generate(1), self._generate(1 + new)
        return new / (long - short)

    def compiled(self, new: int) -> float:
        """Tokens per second of compiled greedy steps with a static cache: the median step, without the choice of the token."""
        times = []
        options = {"past_key_values": self._cache, "use_cache": True}
        with torch.inference_mode():
            self._cache.reset()
            logits = self._compiled(input_ids=self._ids, **options).logits
            for _ in range(new):
                token = logits[:, -1:].argmax(dim=-1)
                begin = time.perf_counter()
                logits = self._compiled(input_ids=token, **options).logits
                times.append(time.perf_counter() - begin)
        return 1 / statistics.median(times)

    def prompt(self, length: int) -> float:
        """Tokens per second of a prompt, read as it is without a compiler."""
        return prompt_speed(self._plain, length, repeats=1).tokens_per_second

    def _generate(self, new: int) -> float:
        begin = time.perf_counter()
        self._plain.generate(
            self._ids, attention_mask=torch.ones_like(self._ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - begin
