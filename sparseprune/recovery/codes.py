"""Layers of codes in training: dense twins stand in for them, whose weights are trained as the codes that they will be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparseprune.models.modules import put_in_place
from sparseprune.models.sites import EmbeddingSite, LinearSite, WeightSite, find_sites
from sparseprune.options import Layers
from sparseprune.recovery.optimizers import Train
from sparseprune.weights.embedding import SparseEmbedding
from sparseprune.weights.encoding import PLAIN
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.module import SparseModule
from sparseprune.weights.quantizer import TrainedCodes
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["OpenCodes", "open_codes"]


class OpenCodes:
    """The layers of codes that are trained: `training`, to be entered, and what they are."""

    def __init__(self, weights: list[tuple[WeightSite, SparseWeight]]) -> None:
        self._weights = weights
        self.training = TrainedCodes(weights)

    def __contains__(self, site: WeightSite) -> bool:
        return any(site.module is it.module for it, _ in self._weights)

    def count(self) -> dict[str, int]:
        """ "2:4 int4", say -> how many layers have such codes."""
        return dict(Counter(str(weight.spec) for _, weight in self._weights))

    def zeros(self) -> tuple[int, int]:
        """(weights that their masks leave out, all weights), of the layers whose codes have a mask."""
        masked = [it for _, it in self._weights if it.mask is not None]
        total = sum(it.shape[0] * it.shape[1] for it in masked)
        return total - sum(it.nnz for it in masked), total

    def digest(self) -> str:
        """Tells one set of forms and masks from another."""
        digest = hashlib.sha256()
        for site, weight in self._weights:
            digest.update(f"{site.name} {weight.spec}".encode())
            if weight.mask is not None:
                digest.update(weight.mask.numpy().tobytes())
        return digest.hexdigest()[:16]


@contextmanager
def open_codes(model: nn.Module, train: Train, chosen: Layers) -> Iterator[OpenCodes]:
    """Inside, dense float32 modules stand where `model` has modules of codes; afterwards these are back, with what `training`
    has made of their codes. The others' codes are as they were, bit by bit.

    Args:
        train: "linears" leaves embeddings and the output head as they are.
        chosen: which linears may be trained.
    """
    twins: dict[nn.Module, SparseModule] = {}
    shared: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, (SparseLinear, SparseEmbedding)) and module.encoding != PLAIN:
            twin: Any = module.to_dense()
            exact = module.sparse_weight().to(dtype=torch.float32).dense()
            twin.weight = shared.setdefault(id(module.packed), nn.Parameter(exact))
            put_in_place(model, module, twin)
            twins[twin] = module
    try:
        sites = find_sites(model, **vars(chosen))
        if train == "all":
            names = {"include": chosen.include, "exclude": chosen.exclude}
            sites = find_sites(model, **names, kinds=[LinearSite, EmbeddingSite], lm_head=True)
        found = [(site, next((twins[it] for it in site.places if it in twins), None)) for site in sites]
        weights = [(site, ours.sparse_weight()) for site, ours in found if ours is not None]
        opened = OpenCodes(weights)
        yield opened
        for name, weight in opened.training.weights().items():
            ours = twins[model.get_submodule(name)]
            ours._set_weight(weight.to(dtype=ours.dtype))
    finally:
        for twin, ours in twins.items():
            put_in_place(model, twin, ours)
