import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.nn import functional as F

from sparseprune.measure.evaluate import decode_speed, dtype_name, generate, perplexity, prompt_speed


def naive_perplexity(model, ids, window, stride, max_windows=None):
    """Token by token: each is scored once, in the first window that holds it and a predecessor."""
    losses = {}
    for index, start in enumerate(range(0, len(ids) - window + 1, stride)):
        if max_windows is not None and index >= max_windows:
            break
        with torch.no_grad():
            logits = model(input_ids=ids[None, start : start + window]).logits[0].double()
        for position in range(1, window):
            if start + position not in losses:
                probabilities = F.log_softmax(logits[position - 1], dim=0)
                losses[start + position] = -probabilities[ids[start + position]].item()
    return math.exp(sum(losses.values()) / len(losses)), len(losses)


IDS = tiny.ids(1, 300)[0]


class TestPerplexity:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    @pytest.mark.parametrize(
        ("window", "stride", "max_windows"),
        [
            (32, None, None),
            (32, None, 3),
            (32, 32, None),
            (32, 8, None),
            (32, 31, None),
            (32, 1, 20),
            (2, None, None),
        ],
    )
    def test_equals_the_naive_reference(self, build, window, stride, max_windows):
        model = build()
        result = perplexity(model, None, IDS, window=window, max_windows=max_windows, stride=stride)
        value, scored = naive_perplexity(model, IDS, window, stride or window, max_windows)
        assert result.value == pytest.approx(value, rel=1e-4)
        assert result.tokens == scored

    def test_windows_wider_than_a_slice_of_logits(self):
        model = tiny.llama(max_position_embeddings=300)
        value, scored = naive_perplexity(model, IDS, 300, 300)
        result = perplexity(model, None, IDS, window=300)
        assert (result.value, result.tokens) == (pytest.approx(value, rel=1e-4), scored)

    def test_the_uniform_model_has_the_vocabulary_s_size(self):
        model = tiny.llama()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert perplexity(model, None, IDS, window=32).value == pytest.approx(96, rel=1e-5)

    def test_text_goes_through_the_tokenizer_without_special_tokens(self):
        tokenizer = tiny.WordTokenizer()
        text = "some words of a text that is repeated " * 10
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        model = tiny.llama()
        assert perplexity(model, tokenizer, text, window=16) == perplexity(model, None, ids, window=16)

    def test_protocol_is_printed_with_the_value(self):
        result = perplexity(
            tiny.llama().bfloat16(), None, IDS, window=32, max_windows=4, stride=16, text_name="ids"
        )
        assert str(result).startswith(
            f"perplexity {result.value:.4g} (ids: 79 tokens scored in 4 windows of 32"
        )
        assert "stride 16, no special tokens, bfloat16" in str(result)
        data = json.loads(json.dumps(result.to_dict()))
        assert (data["windows"], data["window"], data["stride"], data["tokens"]) == (4, 32, 16, 79)
        assert data["protocol"] == result.protocol

    def test_the_model_keeps_its_mode_and_dropout_is_off(self):
        model = tiny.llama(attention_dropout=0.5).train()
        first, second = (perplexity(model, None, IDS, window=32).value for _ in range(2))
        assert first == second
        assert model.training

    def test_a_hopeless_model_is_infinitely_perplexed(self):
        class Sure(nn.Module):
            def forward(self, input_ids, use_cache):
                return SimpleNamespace(logits=1e4 * F.one_hot(input_ids % 2, 96).float())

        assert perplexity(Sure(), None, torch.full((8,), 5), window=8).value == math.inf

    def test_errors(self):
        model = tiny.llama()
        for window, stride, max_windows, match in [
            (1, None, None, "window: must be at least 2, got 1"),
            (32, 0, None, r"stride: must be at least 1, got 0"),
            (32, 33, None, r"stride: must be in \[1, window = 32\], got 33"),
            (32, None, 0, "max_windows: must be at least 1, got 0"),
            (65, None, None, "window: the model's positions end at 64, this would take 65"),
        ]:
            with pytest.raises(ValueError, match=match):
                perplexity(model, None, IDS, window=window, max_windows=max_windows, stride=stride)
        with pytest.raises(ValueError, match="text: must hold at least one window of 32 tokens, got 31"):
            perplexity(model, None, IDS[:31], window=32)
        with pytest.raises(ValueError, match="tokenizer: must be given"):
            perplexity(model, None, "a text", window=32)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        with pytest.raises(
            ValueError, match="model: logits must not be NaN, got some in the window at token 0"
        ):
            perplexity(model, None, IDS, window=32)


class EchoTokenizer:
    """Letters to ids 1 and on; 0 ends a text."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text, return_tensors, add_special_tokens):
        return {"input_ids": torch.tensor([[ord(letter) - 96 for letter in text]])}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(index) for index in ids.tolist())


class TestGenerate:
    def test_greedy_continuation_equals_a_plain_loop(self):
        model = tiny.llama(eos_token_id=None)
        ids = torch.tensor([[8, 5, 12, 12, 15]])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = " ".join(str(index) for index in ids[0, 5:].tolist())
        assert generate(model, EchoTokenizer(), "hello", max_new_tokens=6) == expected

    def test_errors(self):
        model = tiny.llama()
        with pytest.raises(ValueError, match="prompt: must not be empty"):
            generate(model, EchoTokenizer(), "")
        with pytest.raises(ValueError, match="max_new_tokens: must be at least 1, got 0"):
            generate(model, EchoTokenizer(), "a", max_new_tokens=0)
        with pytest.raises(
            ValueError, match="max_new_tokens: the model's positions end at 64, this would take 65"
        ):
            generate(model, EchoTokenizer(), "abcde", max_new_tokens=60)
        with pytest.raises(ValueError, match="chat: the tokenizer has no chat template"):
            generate(model, EchoTokenizer(), "a", chat=True)


class TestSpeed:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    def test_decode(self, build):
        model = build()
        lengths = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        result = decode_speed(model, prompt_length=5, new_tokens=7, warmup=2)
        assert lengths == [5] + [1] * 9
        assert result.tokens_per_second == pytest.approx(1 / result.seconds)
        assert (result.tokens, result.runs, result.threads) == (1, 7, torch.get_num_threads())
        assert "decode, batch 1, float32" in str(result)

    def test_prompt(self):
        result = prompt_speed(tiny.llama(), length=20, repeats=3)
        assert result.tokens_per_second == pytest.approx(20 / result.seconds)
        assert (result.tokens, result.runs) == (20, 3)
        assert json.loads(json.dumps(result.to_dict()))["what"] == "prompt of 20, batch 1, float32"

    def test_the_median_is_taken(self, monkeypatch):
        ticks = iter([0.0, 9.0, 10.0, 11.0, 20.0, 22.0, 30.0, 90.0])
        monkeypatch.setattr("sparseprune.clock.now", lambda: next(ticks))
        assert prompt_speed(tiny.llama(), length=4, repeats=3, warmup=1).seconds == 2.0

    def test_errors(self):
        model = tiny.llama()
        with pytest.raises(ValueError, match="new_tokens: must be at least 1, got 0"):
            decode_speed(model, new_tokens=0)
        with pytest.raises(ValueError, match="new_tokens: the model's positions end at 64"):
            decode_speed(model, new_tokens=64)
        with pytest.raises(ValueError, match="length: the model's positions end at 64"):
            prompt_speed(model, length=65)
        with pytest.raises(ValueError, match="repeats: must be at least 1"):
            prompt_speed(model, length=4, repeats=0)


def test_dtype_name():
    assert dtype_name(tiny.lstm_classifier().half()) == "float16"
    assert dtype_name(nn.ReLU()) == "float32"
