"""A model's token embeddings and output head as int8 or int4 codes: a lookup and a linear, over one copy where they are tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparseprune.models import ties
from sparseprune.models.modules import put_in_place
from sparseprune.models.sites import EmbeddingSite, LinearSite, WeightSite, find_sites
from sparseprune.weights.embedding import SparseEmbedding, refusal
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["EmbeddingCompressed", "compress_embedding", "embedding_sites", "encode_site", "stays"]


@dataclass(frozen=True)
class EmbeddingCompressed:
    """What became of a weight.

    Attributes:
        names: of the modules that have it: several where it is tied.
        reason: why it stayed dense; empty where it did not.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    reason: str = ""


def compress_embedding(model: nn.Module, encoding: str | Encoding = "int8") -> list[EmbeddingCompressed]:
    """Rounds a model's embeddings and its output head to the nearest codes, in place; gives what became of each weight.

    Which those are: `embedding_sites`. An error leaves the model as it was.

    Raises:
        ValueError: a weight that cannot be encoded (NaN, Inf, on a GPU), no embedding in the model.
    """
    sites = embedding_sites(model)
    if not sites:
        raise ValueError(f"model: {type(model).__name__} has no embedding and no output head to compress")
    reasons = {site.name: stays(site) for site in sites}
    weights = {
        site.name: SparseWeight.from_dense(site.weight, "dense", encoding)
        for site in sites
        if not reasons[site.name]
    }
    rows = []
    for site in sites:
        shape, before = (site.out_features, site.in_features), site.weight.nbytes
        weight = weights.get(site.name)
        after = before if weight is None else encode_site(model, site, weight)
        rows.append(EmbeddingCompressed(site.names, shape, before, after, reasons[site.name]))
    return rows


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
