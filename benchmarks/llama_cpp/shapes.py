"""A model of given sizes and random weights: for speed alone, for transformers and as a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

LLAMA_1B: Mapping[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""Llama-3.2-1B's, with fewer positions."""


def random_model(sizes: Mapping[str, Any]) -> Any:
    """A bfloat16 `LlamaForCausalLM`; only its shapes mean something."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = LlamaForCausalLM(LlamaConfig(pad_token_id=0, **sizes))
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=random)
    return model.eval()


def write_gguf(path: Path, sizes: Mapping[str, Any]) -> Path:
    """The same shapes as a GGUF file: every matrix in Q4_0, the tied embedding too; made once.

    Blocks of random codes and one scale are as good as rounded weights for speed, and are written in seconds.
    """
    if path.is_file():
        return path
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    random = np.random.default_rng(0)
    for name, shape in tensors(sizes):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            writer.add_tensor(name, _q4_0(random, *shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


def tensors(sizes: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """(llama.cpp's name, shape) of each tensor of a Llama; matrices are [out, in]."""
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    named: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd", (sizes["vocab_size"], hidden)),
        ("output_norm", (hidden,)),
    ]
    for block in range(sizes["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
            "attn_output": (hidden, queries), "ffn_norm": (hidden,), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }  # fmt: skip
        named += [(f"blk.{block}.{name}", shape) for name, shape in parts.items()]
    return [(f"{name}.weight", shape) for name, shape in named]


def _q4_0(random: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Blocks of 32 columns: a float16 scale and 16 bytes of codes, `uint8 [rows, cols / 32 * 18]`."""
    blocks = random.integers(0, 256, (rows, cols // 32, 18), dtype=np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.005).tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, -1)
