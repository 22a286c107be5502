"""Embeddings in int8 and int4, and weights that several modules have: looked up, moved, copied, and one all the while."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers.shapes import generator
from torch import nn

import sparseprune as sp
from sparseprune.weights.sparse_weight import SparseWeight

ENCODINGS = ["int8", "int4", "int4_minimum"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
encodings = pytest.mark.parametrize("encoding", ENCODINGS)
IDS = torch.tensor([[3, 0, 39], [3, 7, 1]])


def dense_of(rows: int = 40, cols: int = 70, dtype: torch.dtype = torch.float32, **options) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, cols, **options).to(dtype)


def embedding_of(encoding: str = "int8", dtype: torch.dtype = torch.float32) -> sp.SparseEmbedding:
    return sp.SparseEmbedding.from_dense(dense_of(dtype=dtype), encoding)


class Tied(nn.Module):
    def __init__(self, encoding: str = "int4", dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        self.embed = embedding_of(encoding, dtype)
        self.head = sp.SparseLinear.tied_to(
            self.embed, torch.randn(40, generator=generator(1)).to(dtype) if bias else None
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))

    @property
    def is_one(self) -> bool:
        embed, head = self.embed, self.head
        same = (embed.spec, embed.nnz, embed.packing) == (head.spec, head.nnz, head.packing)
        return same and embed.packed is head.packed and embed.shares_weight and head.shares_weight


@encodings
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_rounded_weight_in_every_shape(encoding, dtype):
    dense = dense_of(dtype=dtype, padding_idx=-1).eval()
    embedding = sp.SparseEmbedding.from_dense(dense, encoding)
    rounded = SparseWeight.from_dense(dense.weight, "dense", encoding).dense()
    assert torch.equal(embedding.weight, rounded)
    for ids in (IDS, IDS[0], IDS[0, 0], IDS.int(), IDS[:, :0], IDS[None, None]):
        out = embedding(ids)
        assert out.dtype == dtype and torch.equal(out, rounded[ids.long()])
        expected = dense(ids).float().detach()
        error = (out.float() - expected).norm() / expected.norm().clamp_min(1e-9)
        assert float(error) < (0.01 if encoding == "int8" else 0.12)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (40, 70, 39)
    assert not embedding.training and not list(embedding.parameters())
    assert not bool(embedding(torch.tensor(39)).any()), "the zeros of the padding row stay zeros"
    twin = embedding.to_dense()
    assert (
        torch.equal(twin.weight, rounded)
        and twin.padding_idx == 39
        and torch.equal(twin(IDS), embedding(IDS))
    )


def test_what_does_more_than_look_up_rows_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    for embedding, rule in [
        (
            dense_of(max_norm=1.0),
            "embedding: must have no max_norm, which rewrites rows as they are read, got 1.0",
        ),
        (dense_of(sparse=True), "embedding: must not have sparse=True, which is about gradients"),
        (dense_of(scale_grad_by_freq=True), "embedding: must not have scale_grad_by_freq=True"),
        (Scaled(4, 8), r"embedding: must do no more than look up rows, Scaled has a forward\(\) of its own"),
        (nn.EmbeddingBag(4, 8), "embedding: must be an nn.Embedding, got EmbeddingBag"),
    ]:
        with pytest.raises(ValueError, match=rule):
            sp.SparseEmbedding.from_dense(embedding)
    with pytest.raises(
        ValueError, match="format: must be dense for an embedding, got 2:4; encode it as int8"
    ):
        sp.SparseEmbedding.from_weight(SparseWeight.from_dense(torch.zeros(4, 64), "2:4", "int4"))
    assert sp.SparseEmbedding(40, 8, padding_idx=-1).padding_idx == 39
    with pytest.raises(ValueError, match="padding_idx: must be one of 40 rows, got 40"):
        sp.SparseEmbedding(40, 8, padding_idx=40)
    with pytest.raises(ValueError, match="encoding: kind must be one of|format: dense is for int8 and int4"):
        sp.SparseEmbedding.from_dense(dense_of(), "plain")


def test_indices_that_are_not_rows():
    embedding = embedding_of()
    with pytest.raises(IndexError, match="indices: must be at least 0 and below 40, .* got 40 at position 1"):
        embedding(torch.tensor([1, 40]))
    with pytest.raises(
        TypeError, match="indices: must be a strided tensor of int64 or int32, got torch.float32"
    ):
        embedding(torch.ones(2))


@encodings
def test_moved_between_processes_and_state_dicts(encoding):
    embedding = embedding_of(encoding, torch.bfloat16)
    expected = embedding(IDS)
    stream = io.BytesIO()
    torch.save(embedding, stream)
    stream.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(embedding)),
        copy.deepcopy(embedding),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(IDS), expected) and twin.packed.data_ptr() != embedding.packed.data_ptr()
    state = embedding.state_dict()
    assert set(state) == {f"weight.{name}" for name in embedding.spec.part_names}
    place = sp.SparseEmbedding(40, 70, dtype=torch.bfloat16)  # its encoding is the state dict's afterwards
    assert not bool(place(IDS).any())
    place.load_state_dict(state)
    assert torch.equal(place(IDS), expected) and place.encoding == embedding.encoding
    meta = sp.SparseEmbedding(40, 70, device="meta")
    assert meta(IDS.to("meta")).shape == (2, 3, 70)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(IDS), expected) and meta.dtype == torch.bfloat16


def test_a_state_dict_of_another_weight_is_refused():
    embedding = embedding_of()
    before = embedding(IDS)
    sparse = sp.SparseLinear.from_weight(SparseWeight.from_dense(torch.zeros(40, 72), "2:4", "int4"))
    for state, rule in [
        (sparse.state_dict(), "weight.spec: the layer is 40 x 70, got 40 x 72"),
        (sp.SparseEmbedding(41, 70).state_dict(), "weight.spec: the layer is 40 x 70, got 41 x 70"),
    ]:
        with pytest.raises(RuntimeError, match=rule):
            embedding.load_state_dict(state)
    with pytest.raises(RuntimeError, match="format: must be dense for an embedding, got 2:4"):
        sp.SparseEmbedding(40, 72).load_state_dict(sparse.state_dict())
    assert torch.equal(embedding(IDS), before)


@encodings
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_change_what_is_computed_in_and_no_code(encoding, dtype):
    embedding = embedding_of(encoding)
    before = embedding.sparse_weight()
    embedding.to(dtype)
    after = embedding.sparse_weight()
    assert torch.equal(after.values, before.values) and torch.equal(after.scales, before.scales)
    assert torch.equal(embedding(IDS), before.dense()[IDS].to(dtype))
    with pytest.raises(ValueError, match="dtype: must be float32, bfloat16 or float16 for a sparse layer"):
        embedding.double()


def test_compiled_it_is_one_operation():
    torch._dynamo.reset()
    model = Tied()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1]):
            assert torch.equal(compiled(ids), model(ids))


def test_repr_says_what_matters():
    model = Tied(dtype=torch.bfloat16)
    text = repr(model)
    for part in (
        "SparseEmbedding(40, 70, format=dense, values=int4, groups of 64",
        "of dense, shared), isa=",
    ):
        assert part in text
    assert "padding_idx=3" in repr(sp.SparseEmbedding.from_dense(dense_of(padding_idx=3)))
    assert "shared" not in repr(embedding_of())


@encodings
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_head_is_a_linear_over_the_embeddings_own_memory(encoding, dtype):
    model = Tied(encoding, dtype)
    assert model.is_one
    alone = sp.SparseLinear.from_weight(model.embed.sparse_weight(), model.head.bias)
    x = torch.randn(3, 70, generator=generator(2)).to(dtype)
    assert torch.equal(model.head(x), alone(x))


def test_whatever_is_done_to_a_model_its_tied_weight_is_one():
    model = Tied()
    expected, ids = model(IDS), IDS
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.is_one and torch.equal(twin(ids), expected)
        assert twin.embed.packed.data_ptr() != model.embed.packed.data_ptr()
        assert twin.embed._sharing is not model.embed._sharing
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.is_one and model.head.bias.dtype == model(ids).dtype == dtype
    meta = copy.deepcopy(model).to("meta")
    assert meta.is_one and meta.embed.packed.is_meta and pickle.loads(pickle.dumps(meta)).is_one
    meta.load_state_dict(model.state_dict(), assign=True)
    assert meta.is_one and torch.equal(meta(ids), model(ids))
    emptied = model.to_empty(device="cpu")
    assert emptied.is_one
    with pytest.raises(ValueError, match="packed"):
        emptied(ids)
    emptied.load_state_dict(Tied("int8").state_dict())
    assert emptied.is_one and str(emptied.head.encoding) == "int8, groups of 64"


def test_one_of_two_tied_modules_takes_the_other_along():
    model = Tied(bias=False)
    model.head.bfloat16()
    assert model.is_one and model.embed(IDS).dtype == torch.bfloat16
    model.embed.load_state_dict(embedding_of("int8").state_dict())
    assert model.is_one and torch.equal(
        model.head.weight, embedding_of("int8", torch.float32).weight.bfloat16()
    )


def test_copied_alone_a_tied_module_is_alone():
    model = Tied()
    for twin in (copy.deepcopy(model.head), pickle.loads(pickle.dumps(model.head))):
        assert not twin.shares_weight and torch.equal(twin.weight, model.head.weight)
    assert model.is_one


def test_a_tie_keeps_nothing_alive():
    model = Tied()
    head = weakref.ref(model.head)
    del model.head
    gc.collect()
    assert head() is None and not model.embed.shares_weight
    other = sp.SparseLinear.tied_to(model.embed)
    third = embedding_of("int8")
    other.share_weight(third)
    assert other.shares_weight and third.shares_weight and not model.embed.shares_weight


def test_an_embedding_over_a_heads_weight():
    head = sp.SparseLinear.from_weight(SparseWeight.from_dense(dense_of().weight, "dense", "int4"))
    embed = sp.SparseEmbedding.tied_to(head, padding_idx=2)
    assert embed.packed is head.packed and embed.padding_idx == 2
    assert torch.equal(embed(IDS), head.weight[IDS])
    with pytest.raises(ValueError, match="weight: the layer is 40 x 70, got 41 x 70"):
        embed.share_weight(sp.SparseEmbedding(41, 70))
    with pytest.raises(ValueError, match="format: must be dense for an embedding, got 2:4"):
        sp.SparseEmbedding.tied_to(sp.SparseLinear(72, 40, encoding="int4"))
