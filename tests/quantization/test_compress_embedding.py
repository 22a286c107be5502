"""A model's embedding and head in int8 and int4, tied and not: swapped, run, saved once, loaded, made dense again."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file
from torch import nn

import sparseprune as sp
from sparseprune.io.inspection import memory_bytes
from sparseprune.models.sites import find_sites
from sparseprune.quantization.embedding import embedding_codes, embedding_sites, encode_site
from sparseprune.quantization.report import LayerQuantized
from sparseprune.recovery import to_dense
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import SparseWeight

ENCODINGS = ["int8", "int4", "int4_minimum"]
encodings = pytest.mark.parametrize("encoding", ENCODINGS)
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
VOCABULARY, WIDTH = 96, 32
PLAIN_BYTES = VOCABULARY * WIDTH * 4


def confident(tied: bool, **options) -> nn.Module:
    """A Llama that is sure of its next token: the head's rows are far apart, and its blocks add little."""
    model = tiny.llama(tied=tied, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(0.3)
        torch.manual_seed(1)
        model.model.embed_tokens.weight.normal_()
        if not tied:
            model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids()).logits


def generated(model: nn.Module) -> torch.Tensor:
    return model.generate(tiny.ids(2, 5), max_new_tokens=12, do_sample=False)


def is_one(model: nn.Module) -> bool:
    return model.get_input_embeddings().packed is model.get_output_embeddings().packed


def compress_embedding(model: nn.Module, encoding: str = "int8") -> list[LayerQuantized]:
    """Embeddings and head alone, as `quantize(embeddings=)` does it."""
    return [it.put(model) for it in embedding_codes(model, Encoding.parse(encoding))]


def header(folder: Path) -> dict:
    with open(folder / "model.safetensors", "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


@ties
@encodings
def test_logits_stay_close_and_the_tokens_the_same(encoding, tied):
    model = confident(tied)
    before, tokens = logits(model), generated(model)
    names = [site.names for site in embedding_sites(model)]
    assert names == ([("model.embed_tokens", "lm_head")] if tied else [("model.embed_tokens",), ("lm_head",)])
    rows = compress_embedding(model, encoding)
    assert [row.name for row in rows] == [it[0] for it in names]
    for row in rows:
        assert row.bytes_before == PLAIN_BYTES and row.shape == (VOCABULARY, WIDTH) and not row.reason
        assert row.bytes_after < PLAIN_BYTES * (
            0.65 if encoding == "int8" else 0.4
        )  # 32 columns are padded to 64
    assert isinstance(model.get_input_embeddings(), sp.SparseEmbedding)
    assert isinstance(model.get_output_embeddings(), SparseLinear) and is_one(model) == tied
    after = logits(model)
    error = (after - before).norm() / before.norm()
    assert float(error) < (0.02 if encoding == "int8" else 0.15)
    assert torch.equal(generated(model), tokens)


@ties
@encodings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_once_and_loaded_to_the_bit(tmp_path, encoding, tied, dtype):
    model = confident(tied).to(dtype)
    compress_embedding(model, encoding)
    expected, tokens = logits(model), generated(model)
    sp.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    ours = [name for name in stored if name.split(".")[0] == "lm_head" or "embed_tokens" in name]
    parts = len(model.lm_head.spec.part_names)
    assert len(ours) == (parts if tied else 2 * parts), ours
    assert json.loads(header(tmp_path / "out")["__metadata__"]["tied"]) == (
        {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    )
    again = sp.load(tmp_path / "out")
    for loaded in (again, sp.load(tmp_path / "out", model=confident(tied).to(dtype))):
        assert torch.equal(logits(loaded), expected) and is_one(loaded) == tied
        assert torch.equal(generated(loaded), tokens)
        assert loaded.lm_head.spec == model.lm_head.spec and not loaded.training
    sp.save(again, tmp_path / "again")
    assert stored.keys() == load_file(tmp_path / "again" / "model.safetensors").keys()
    assert torch.equal(logits(sp.load(tmp_path / "again")), expected)


def test_a_tied_weight_costs_its_bytes_once_on_disk_and_in_memory(tmp_path):
    models = {tied: tiny.llama(tied=tied, vocab_size=4096, hidden_size=64) for tied in (True, False)}
    sizes, memory = {}, {}
    for tied, model in models.items():
        compress_embedding(model, "int4")
        sp.save(model, tmp_path / str(tied))
        sizes[tied] = (tmp_path / str(tied) / "model.safetensors").stat().st_size
        memory[tied] = memory_bytes(model)
    one = models[True].lm_head.sparse_weight().nbytes
    assert abs(sizes[False] - sizes[True] - one) < 1024
    assert memory[False] - memory[True] == models[True].lm_head.nbytes


def test_whatever_is_done_to_the_model_the_weight_stays_one():
    model = confident(tied=True)
    compress_embedding(model, "int4")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_one(twin) and torch.equal(logits(twin), expected)
        twin.tie_weights()
        assert is_one(twin) and torch.equal(logits(twin), expected)
        assert is_one(twin.bfloat16()) and logits(twin).dtype == torch.bfloat16
    model.load_state_dict(model.state_dict())
    assert is_one(model) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("where", ["swapped", "loaded"])
def test_transformers_lets_go_of_the_tie_and_takes_it_back(tmp_path, where):
    model = confident(tied=True)
    compress_embedding(model, "int8")
    expected = logits(model)
    if where == "loaded":
        sp.save(model, tmp_path / "out")
        model = sp.load(tmp_path / "out")
    for recompute in (True, False):
        model.tie_weights(recompute_mapping=recompute)
        assert is_one(model) and torch.equal(logits(model), expected)
    assert not model.all_tied_weights_keys
    rounded = model.lm_head.weight
    to_dense(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(
        model.lm_head.weight, rounded
    )
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.save_pretrained(tmp_path / "dense")  # refuses weights that share memory behind its back
    again = type(model).from_pretrained(tmp_path / "dense")
    assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(
        again.lm_head.weight, rounded
    )


def test_bert_has_a_bias_and_other_ties_which_stay(tmp_path):
    model = tiny.bert(head=True)
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    before = logits(model)
    (site,) = embedding_sites(model)
    compress_embedding(model, "int8")
    assert site.names == ("bert.embeddings.word_embeddings", "cls.predictions.decoder")
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert model.get_input_embeddings().padding_idx == 0
    assert float((logits(model) - before).norm() / before.norm()) < 0.02
    sp.save(model, tmp_path / "out")
    again = sp.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and is_one(again)
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias
    assert again.get_input_embeddings().padding_idx == 0
    again.tie_weights()
    assert again.all_tied_weights_keys == {"cls.predictions.decoder.bias": "cls.predictions.bias"}


def test_gpt2s_positions_stay_dense_and_a_plain_models_embedding_is_found():
    gpt2 = tiny.gpt2()
    (site,) = embedding_sites(gpt2)
    compress_embedding(gpt2)
    assert site.names == ("transformer.wte", "lm_head") and type(gpt2.transformer.wpe) is nn.Embedding
    classifier = tiny.lstm_classifier().requires_grad_(False)
    expected = classifier(tiny.ids())
    (site,) = embedding_sites(classifier)
    compress_embedding(classifier)
    assert site.names == ("embedding",) and isinstance(classifier.embedding, sp.SparseEmbedding)
    assert float((classifier(tiny.ids()) - expected).norm() / expected.norm()) < 0.02


class Backwards(nn.Module):
    """Its head comes first, and there is a second embedding over the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.other = nn.Embedding(VOCABULARY, WIDTH)
        self.embed.weight = self.other.weight = self.head.weight
        self.again = self.embed

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) + self.other(ids) + self.again(ids))


def test_any_order_and_any_number_of_places(tmp_path):
    model = Backwards().eval()
    (site,) = embedding_sites(model)
    compress_embedding(model, "int4")
    assert site.names == ("head", "embed", "other", "again")
    assert model.again is model.embed and model.head.packed is model.embed.packed is model.other.packed
    sp.save(model, tmp_path / "out")
    again = sp.load(tmp_path / "out", model=Backwards())
    assert torch.equal(again(tiny.ids()), model(tiny.ids()))
    assert again.again is again.embed and again.head.packed is again.embed.packed is again.other.packed
    assert (again.embed.padding_idx, again.other.padding_idx) == (3, None)


def test_what_cannot_be_codes_stays_dense_and_says_why():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model = tiny.llama(tied=True)
    embed = Scaled(VOCABULARY, WIDTH)
    model.set_input_embeddings(embed)
    model.tie_weights()
    (row,) = compress_embedding(model)
    assert row.bytes_after == row.bytes_before == PLAIN_BYTES
    assert row.reason.startswith("model.embed_tokens: must do no more than look up rows, Scaled has")
    assert model.lm_head.weight is embed.weight and model.all_tied_weights_keys
    with pytest.raises(
        ValueError, match="embeddings: Sequential has no embedding and no output head, got int8"
    ):
        compress_embedding(nn.Sequential(nn.Linear(4, 4)))


def test_an_error_leaves_the_model_as_it_was():
    model = confident(tied=False)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    before = model.model.embed_tokens
    with pytest.raises(ValueError, match="lm_head: weight: must be finite to be quantized, got NaN or Inf"):
        compress_embedding(model)
    assert model.model.embed_tokens is before


def test_weights_that_are_codes_already_are_put_in_place():
    model = confident(tied=True)
    (site,) = embedding_sites(model)
    weight = SparseWeight.from_dense(site.weight, "dense", "int4_minimum")
    assert encode_site(model, site, weight) == model.lm_head.nbytes and is_one(model)
    assert torch.equal(model.lm_head.weight, weight.dense())


def test_the_head_stays_out_of_what_is_pruned_and_swapped_later():
    model = confident(tied=True)
    compress_embedding(model)
    names = [site.name for site in find_sites(model, lm_head=True)]
    assert len(names) == 14 and "lm_head" not in names
    sp.sparsify(model, "bitmap", policy="always")
    assert is_one(model)


def damaged(folder: Path, change) -> None:
    """Rewrites the file's header."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + size])
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ({"lm_head.weight": "model.norm.weight"}, "lm_head.weight: shape must be|missing"),
        ({"nowhere.weight": "model.embed_tokens.weight"}, "nowhere.weight: the model must have a linear layer or an embedding here"),
        ({"model.norm.weight": "model.embed_tokens.weight"}, "model.norm.weight: the model must have a linear layer or an embedding here, it has a LlamaRMSNorm"),
        ({"model.layers.0.mlp.up_proj.weight": "model.embed_tokens.weight"}, r"up_proj.weight: shape must be \(48, 32\), as in the model, got \(96, 32\)"),
        ({}, "lm_head.weight: missing"),
    ],
)  # fmt: skip
def test_ties_that_lie_are_refused(tmp_path, tied, message):
    model = confident(tied=True)
    compress_embedding(model)
    sp.save(model, tmp_path / "out")
    damaged(tmp_path / "out", lambda it: it["__metadata__"].update(tied=json.dumps(tied)))
    untied = confident(tied=False)
    before = logits(untied)
    with pytest.raises(sp.CheckpointError, match=message):
        sp.load(tmp_path / "out", model=untied)
    assert torch.equal(logits(untied), before)
