"""`compile_decoding`: compiled steps of one token give what eager ones give, and nothing else is compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers import tiny
from torch import nn

import sparseprune as sp
from sparseprune.models import compile_decoding, decoding

LENGTH = 32


def quantized(encoding="int4", **kwargs):
    model = tiny.llama(**kwargs)
    sp.quantize(model, encoding, "nearest", group_size=32)
    return model


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH)


@torch.no_grad()
def steps(model, cache, batch=1, count=4):
    """Logits of a prompt and of steps of one token behind it."""
    options = {"past_key_values": cache, "use_cache": True}
    found = [model(input_ids=tiny.ids(1, 8).expand(batch, -1), **options).logits[:, -1:]]
    for index in range(count):
        found.append(model(input_ids=torch.full((batch, 1), index + 3), **options).logits)
    return torch.cat(found, 1)


@pytest.fixture
def calls(monkeypatch):
    """The names of the models whose steps were taken by the compiled graph; the compiler itself is left out."""
    seen = []
    monkeypatch.setattr(
        torch, "compile", lambda step, **options: lambda *a, **k: (seen.append(k), step(*a, **k))[1]
    )
    return seen


@pytest.fixture
def captured(monkeypatch):
    """torch.compile without the C++ compiler: capture, guards and functionalization are what matters."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: real(step, backend="aot_eager", **options))


def check_compiled_steps():
    torch._dynamo.reset()
    for encoding in ("int4", "int8"):
        model = quantized(encoding)
        eager = steps(model, static(model))
        compile_decoding(model)
        for batch in (1, 2):
            torch.testing.assert_close(steps(model, static(model), batch)[:1], eager)
    torch.testing.assert_close(steps(model, transformers.DynamicCache(config=model.config)), eager)


def test_compiled_steps_give_what_eager_ones_give(captured):
    """One graph a model: that of another one of the same class, of other codes and another cache, is not taken for it."""
    check_compiled_steps()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
def test_compiled_to_machine_code():
    check_compiled_steps()


def test_only_steps_of_one_token_with_a_static_cache_are_compiled(calls):
    model = quantized()
    compile_decoding(model)
    steps(model, static(model), count=3)
    assert [it["input_ids"].shape for it in calls] == [(1, 1)] * 3
    calls.clear()
    steps(model, transformers.DynamicCache(config=model.config))
    model(input_ids=tiny.ids(1, 1), past_key_values=static(model), use_cache=True)  # with gradients
    model(tiny.ids(1, 1))
    assert calls == []


def test_generate_takes_compiled_steps(calls):
    model = quantized()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tiny.ids(1, 8), **options)
    compile_decoding(model)
    assert torch.equal(model.generate(tiny.ids(1, 8), past_key_values=static(model), **options), expected)
    assert len(calls) == 5  # the first token is the prompt's


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_are_whole_and_not_compiled(calls, again):
    model = quantized()
    compile_decoding(model)
    twin = again(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert steps(twin, static(twin)).abs().max() > 0
    assert calls == []


def test_a_compiled_model_is_saved_like_any_other(calls, tmp_path):
    model = quantized()
    compile_decoding(model)
    sp.save(model, tmp_path)
    again = sp.load(tmp_path)
    assert torch.equal(steps(again, static(again)), steps(model, static(model)))
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_token(groups, masked, monkeypatch):
    """Against torch's own, in float64."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 8, generator=random)
    key, value = torch.randn(2, 2, groups, 16, 8, generator=random).unbind(1)
    mask = torch.rand(2, 1, 1, 16, generator=random) < 0.7 if masked else None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, _ = decoding._attention(nn.Module(), query, key, value, mask, scaling=0.3)
    repeated = [it.double().repeat_interleave(4 // groups, 1) for it in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(
        query.double(), *repeated, attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), TypeError, "must be a language model of transformers, got Linear"),
        (lambda: tiny.llama().train(), ValueError, "must be in evaluation mode"),
        (lambda: tiny.llama().to("meta"), ValueError, "must be on the CPU, got meta"),
    ],
)
def test_what_cannot_be_compiled_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        compile_decoding(model())
