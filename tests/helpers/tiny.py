"""Tiny models of several families, built in milliseconds with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
"""Of every family whose configuration uses these names."""


def llama(tied: bool = False, layers: int = 2, **kwargs) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"num_hidden_layers": layers, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(tie_word_embeddings=tied, pad_token_id=0, **(SIZES | own | kwargs))
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def bert(head: bool = False) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(**SIZES, max_position_embeddings=64)
    torch.manual_seed(0)
    return (BertForMaskedLM if head else BertModel)(config).eval()


class LstmClassifier(nn.Module):
    """Embedding, LSTM, two linears: a text classifier that owes nothing to transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.hidden = nn.Linear(24, 20)
        self.classifier = nn.Linear(20, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(ids))
        return self.classifier(torch.relu(self.hidden(states[:, -1])))


def lstm_classifier() -> nn.Module:
    torch.manual_seed(0)
    return LstmClassifier().eval()


def ids(batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))


class WordTokenizer:
    """Words to ids below 96, called as a transformers tokenizer is."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        words = [sum(word.encode()) % 95 + 1 for word in text.split()]
        return {"input_ids": [0, *words] if add_special_tokens else words}
