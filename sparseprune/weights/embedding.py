"""`SparseEmbedding`: an embedding whose rows are int8 or int4 codes, looked up where they lie packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseprune.kernels import ops
from sparseprune.models import notes
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import WeightSpec

__all__ = ["SparseEmbedding", "refusal"]


class SparseEmbedding(SparseModule):
    """Rows of a weight `[num_embeddings, embedding_dim]` in int8 or int4 codes, in the place of an `nn.Embedding`.

    Input: int64 or int32 indices of any shape `[...]`; output `[..., embedding_dim]` in the weight's dtype (float32,
    bfloat16, float16), each number rounded once. The weight is frozen. `padding_idx` names the row that stands for padding:
    it is a row like the others, as it is to an `nn.Embedding` that is not trained.

    An index that is not a row raises IndexError on a CPU; on a GPU it gives a row of NaN. How the weight is held, moved, copied and
    saved is in `SparseModule`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        encoding: str | Encoding = "int8",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An embedding of zeros, as a place for a state dict. `from_dense` makes one from a dense embedding."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        spec = WeightSpec((num_embeddings, embedding_dim), dtype, Format("dense"), Encoding.parse(encoding))
        super().__init__(spec, device)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: must be one of {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % max(1, num_embeddings)

    @classmethod
    def from_dense(cls, embedding: nn.Embedding, encoding: str | Encoding = "int8") -> SparseEmbedding:
        """Twin of an `nn.Embedding`; `encoding` as for `SparseWeight.from_dense`.

        Raises:
            ValueError: the embedding does more than look up rows (`refusal`), or its weight cannot be encoded.
        """
        if problem := refusal(embedding):
            raise ValueError(f"embedding: {problem}")
        return cls.in_place_of(embedding, SparseWeight.from_dense(embedding.weight, "dense", encoding))

    @classmethod
    def in_place_of(
        cls, embedding: nn.Embedding | SparseEmbedding, weight: SparseWeight | SparseModule
    ) -> SparseEmbedding:
        """An embedding over what the weight of `embedding` has become, with its mode, its padding and its notes.

        weight: or the module that has it, to be `tied_to`.
        """
        if isinstance(weight, SparseModule):
            made = cls.tied_to(weight, embedding.padding_idx, embedding.training)
        else:
            made = cls.from_weight(weight, embedding.padding_idx, embedding.training)
        notes.carry(embedding, made)
        return made

    @classmethod
    def from_weight(
        cls, weight: SparseWeight, padding_idx: int | None = None, training: bool = False
    ) -> SparseEmbedding:
        """An embedding over a canonical weight of the format `dense`."""
        embedding = cls._without_weight(weight.spec, padding_idx, training)
        embedding._set_weight(weight)
        return embedding

    @classmethod
    def tied_to(
        cls, other: SparseModule, padding_idx: int | None = None, training: bool = False
    ) -> SparseEmbedding:
        """An embedding over the one weight that `other` has and keeps, such as its model's head."""
        embedding = cls._without_weight(other.spec, padding_idx, training)
        embedding.share_weight(other)
        return embedding

    @classmethod
    def _without_weight(cls, spec: WeightSpec, padding_idx: int | None, training: bool) -> SparseEmbedding:
        _require_dense(spec)
        return cls(*spec.shape, padding_idx, spec.encoding, spec.dtype, "meta").train(training)

    def forward(self, indices: Tensor) -> Tensor:
        return ops.lookup(indices, self.packed_weight)

    def to_dense(self) -> nn.Embedding:
        """The dense twin."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(self.weight, requires_grad=False)
        notes.carry(self, dense)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._weight_repr()}"

    def _require(self, spec: WeightSpec) -> None:
        _require_dense(spec)


def refusal(embedding: nn.Module) -> str | None:
    """Why a `SparseEmbedding` cannot take this module's place; None where it can."""
    if isinstance(embedding, SparseEmbedding):
        return None
    if not isinstance(embedding, nn.Embedding):
        return f"must be an nn.Embedding, got {type(embedding).__name__}"
    if type(embedding).forward is not nn.Embedding.forward:
        return f"must do no more than look up rows, {type(embedding).__name__} has a forward() of its own; leave it dense"
    if embedding.max_norm is not None:
        return f"must have no max_norm, which rewrites rows as they are read, got {embedding.max_norm}; set it to None"
    for option in ("scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            return f"must not have {option}=True, which is about gradients, the weight is frozen; set it to False"
    return None


def _require_dense(spec: WeightSpec) -> None:
    if spec.format.kind != "dense":
        raise ValueError(
            f"format: must be dense for an embedding, got {spec.format}; encode it as int8 or int4"
        )
