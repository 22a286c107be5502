"""A model's token embeddings and output head as int8 or int4 codes: a lookup and a linear, over one copy where they are tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparseprune.kernels.codes import unserved
from sparseprune.models import ties
from sparseprune.models.modules import put_in_place
from sparseprune.models.sites import EmbeddingSite, LinearSite, WeightSite, find_sites
from sparseprune.quantization.report import LayerQuantized, error_of
from sparseprune.weights.embedding import SparseEmbedding, refusal
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.gguf import StoredCodes
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["EmbeddingCodes", "embedding_codes", "embedding_sites", "encode_site", "no_kernels", "stays"]


@dataclass(frozen=True)
class EmbeddingCodes:
    """What the weight of an embedding or a head is to become.

    Attributes:
        weight: None where it stays as it is; `reason` says why.
        method: "nearest", or "kept" (a file's own codes).
    """

    site: WeightSite
    weight: SparseWeight | None
    method: str = ""
    reason: str = ""

    def put(self, model: nn.Module) -> LayerQuantized:
        """Puts it in place; its row of the report."""
        if self.weight is None:
            return LayerQuantized.unchanged(self.site, self.reason)
        error = error_of(self.site.weight.detach(), self.weight)
        row = LayerQuantized.of(self.site, self.weight, self.method, error)
        encode_site(model, self.site, self.weight)
        return row


def embedding_codes(
    model: nn.Module, encoding: Encoding, stored: StoredCodes | None = None
) -> list[EmbeddingCodes]:
    """The codes of a model's embeddings and of its output head, rounded to nearest, or those that a file has for them.

    Which weights those are: `embedding_sites`. The model stays as it is.

    Raises:
        ValueError: no embedding and no head in the model, a weight that cannot be encoded.
    """
    sites = embedding_sites(model)
    if not sites:
        raise ValueError(
            f"embeddings: {type(model).__name__} has no embedding and no output head, got {encoding.kind}; leave it out"
        )
    found = []
    for site in sites:
        if reason := stays(site):
            found.append(EmbeddingCodes(site, None, reason=reason))
            continue
        if stored is not None and (kept := stored.find(site.weight)) is not None:
            found.append(EmbeddingCodes(site, kept, "kept"))
            continue
        try:
            weight = SparseWeight.from_dense(site.weight, "dense", encoding)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
        found.append(EmbeddingCodes(site, weight, "nearest"))
    return found


def embedding_sites(model: nn.Module) -> list[WeightSite]:
    """The weights of the model's token embeddings and of its output head, a tied one once.

    What transformers' `get_input_embeddings()` and `get_output_embeddings()` name, of each model within the model; where
    there are none of these, every `nn.Embedding`.
    """
    named = {id(module) for it in model.modules() for module in _named_by(it)}
    found = find_sites(model, kinds=[EmbeddingSite, LinearSite], lm_head=True)
    if not named:
        return [site for site in found if isinstance(site, EmbeddingSite)]
    return [site for site in found if any(id(place) in named for place in site.places)]


def _named_by(module: Any) -> list[nn.Module]:
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(module, method)())
        except (AttributeError, NotImplementedError):  # of another library, or without any
            continue
    return [it for it in found if isinstance(it, (nn.Linear, nn.Embedding))]


def stays(site: WeightSite) -> str:
    """Why codes cannot take the place of a site's weight; empty where they can."""
    if unserved := no_kernels(site.weight):
        return unserved
    for name, module in ((site.name, site.module), *site.tied):
        if isinstance(module, nn.Linear):
            continue
        if problem := refusal(module):
            return f"{name}: {problem}"
    return ""


def encode_site(model: nn.Module, site: WeightSite, weight: SparseWeight) -> int:
    """Puts modules over the one `weight` in all of the site's places; gives its bytes, packed.

    weight: of the format `dense`, where one of the places is an embedding.
    """
    made: dict[nn.Module, SparseModule] = {}
    for place in site.places:
        kind: Any = SparseEmbedding if isinstance(place, nn.Embedding) else SparseLinear
        made[place] = kind.in_place_of(place, next(iter(made.values()), weight))
    ties.release(model, site.names)
    for place, module in made.items():
        put_in_place(model, place, module)
    return next(iter(made.values())).nbytes


def no_kernels(weight: Tensor) -> str:
    """Why nothing multiplies by codes in the place of `weight`; empty where something does."""
    if weight.is_meta:
        return "on the meta device: no data"
    return unserved(weight.dtype, weight)
