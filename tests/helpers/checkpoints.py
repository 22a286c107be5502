"""Checkpoints on the disk: of a tiny model, and of any size, written so that the model never exists in memory."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseprune.io.safetensors import TensorInfo, TensorSource, write
from sparseprune.io.shards import INDEX_FILE, shard_name
from sparseprune.models.sites import find_sites
from sparseprune.weights.linear import SparseLinear


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """Saves a transformers model in shards; gives the folder."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The linears' weights [out, in] by name, sparse ones made dense."""
    found = {layer.name: layer.weight for layer in find_sites(model)}
    return found | {name: it.weight for name, it in model.named_modules() if isinstance(it, SparseLinear)}


def random_llama(
    folder: Path,
    hidden: int = 2048,
    intermediate: int = 5632,
    heads: int = 32,
    kv_heads: int = 4,
    layers: int = 33,
    vocabulary: int = 32000,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Writes a Llama with random weights, a shard for each block and two for the rest; gives its bytes.

    The default is 3.2 GB, with the blocks of TinyLlama.
    """
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    kv = hidden // heads * kv_heads
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens": (vocabulary, hidden)}]
    for number in range(layers):
        shards.append({f"model.layers.{number}.{name}": shape for name, shape in block.items()})
    shards.append({"model.norm": (hidden,), "lm_head": (vocabulary, hidden)})
    weight_map, total = {}, 0
    for number, shard in enumerate(shards):
        name = shard_name(number, len(shards))
        infos = [TensorInfo(f"{key}.weight", dtype, shape) for key, shape in shard.items()]
        sources = [
            TensorSource([info], partial(_random, info, 100 * number + place))
            for place, info in enumerate(infos)
        ]
        write(folder / name, sources, {"format": "pt"})
        weight_map.update({info.name: name for info in infos})
        total += sum(info.nbytes for info in infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return total


def _random(info: TensorInfo, seed: int) -> list[Tensor]:
    if len(info.shape) == 1:
        return [torch.ones(info.shape, dtype=info.dtype)]
    # drawing 1.6 billion numbers takes a minute; rolling the same ones makes other layers of them
    return [_noise(info.shape, info.dtype).roll(7919 * seed + seed)]


@lru_cache(maxsize=8)
def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.empty(shape, dtype=dtype).normal_(0, shape[1] ** -0.5, generator=generator)
