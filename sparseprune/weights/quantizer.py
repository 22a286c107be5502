"""Weights trained as the codes that will stand for them (`kernels/rounding.py`): rounded in every forward pass, as if not in
the backward one."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseprune.kernels import ops
from sparseprune.kernels.packing import CODES
from sparseprune.kernels.rounding import round_codes, round_through
from sparseprune.models.sites import WeightSite
from sparseprune.weights.rounding import Grid
from sparseprune.weights.sparse_weight import SparseWeight

__all__ = ["Quantizer", "TrainedCodes"]


class TrainedCodes:
    """Inside `with`, the weights of some sites are trained through their codes; at the end `weights()` has what these became.

    Each site's parameter is the weight before it is rounded, and beside it are trained: for every group of columns the value
    that its largest code stands for, and its minimum where it has one. All are of the weights' size, so one learning rate
    serves them. Afterwards the parameters hold the numbers that the codes stand for, and nothing else is left.
    """

    def __init__(self, weights: Iterable[tuple[WeightSite, SparseWeight]]) -> None:
        """The sites hold what the codes stand for, or anything that rounds to them."""
        self._quantizers = [(site, Quantizer(site, weight)) for site, weight in weights]
        self._found: dict[str, SparseWeight] = {}

    def __enter__(self) -> TrainedCodes:
        for site, quantizer in self._quantizers:
            for module in site.places:
                parametrize.register_parametrization(module, site.parameter_name, quantizer, unsafe=True)
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for site, quantizer in self._quantizers:
            name = site.parameter_name
            latent = getattr(site.module.parametrizations, name).original
            weight = quantizer.weight(site.matrix(latent.detach()))
            for module in site.places:
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            site.weight.copy_(weight.to(dtype=torch.float32).dense())
            self._found[site.name] = weight

    def weights(self) -> dict[str, SparseWeight]:
        """Site name -> its codes, exactly those that the last forward pass would have rounded to."""
        return self._found


class Quantizer(nn.Module):
    """The parametrization of a site's weight by the codes of a `SparseWeight`: its encoding, its mask, scales to begin with."""

    site: WeightSite
    kept: Tensor | None
    start: Tensor
    damping = 0.1
    """Of the step of scales: one moves all weights of a group at once."""

    def __init__(self, site: WeightSite, weight: SparseWeight) -> None:
        super().__init__()
        assert weight.scales is not None
        self.site, self.spec, self.mask = site, weight.spec, weight.mask
        code = CODES[weight.encoding.kind]
        self.farthest = max(code.zero - code.least, code.largest - code.zero)
        self.reach = nn.Parameter(weight.scales.float() * self.farthest)
        self.register_buffer("start", self.reach.detach().clone(), persistent=False)
        self.minimum = None if weight.minimums is None else nn.Parameter(weight.minimums.float())
        kept = None if weight.mask is None else ops.unpack_mask(weight.mask, weight.shape[1])
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        device = latent.device.type
        # what a product would be cast to, in one pass over the weight instead of two
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else latent.dtype
        scale, minimum = self._parts()
        values = self.spec.encoding
        matrix = self.site.matrix(latent).float()
        rounded = round_through(matrix, scale, minimum, self.kept, values.group_size, values.kind, dtype)
        return self.site.stored(rounded)

    def weight(self, matrix: Tensor) -> SparseWeight:
        """The codes that `matrix` [out, in] rounds to."""
        scale, minimum = self._parts()
        values = self.spec.encoding
        codes = round_codes(matrix.float(), scale, minimum, self.kept, values.group_size, values.kind)
        return SparseWeight.from_codes(codes, self.mask, Grid(values, scale, minimum), self.spec)

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        """Scales and minimums, float32 [rows, groups], as they will be stored."""
        minimum = None if self.minimum is None else _stored(self.minimum, self.spec.encoding.scale_dtype)
        reach = self.start.lerp(self.reach, self.damping)
        return _stored(reach / self.farthest, self.spec.encoding.scale_dtype), minimum


def _stored(part: Tensor, dtype: Any) -> Tensor:
    """Rounded to `dtype`; the gradient passes straight through."""
    return part + (part.to(dtype).float() - part).detach()
