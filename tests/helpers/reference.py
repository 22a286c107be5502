"""The plain-torch twin of each operation: its specification, and what the tests hold it to.

A twin is slow and obvious. Zeros are +0.0 and -0.0; NaN is not a zero; what a mask drops becomes +0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mask_apply(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype))


def pack_mask(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    bytes_ = (cols + 7) // 8
    groups = functional.pad(mask.to(torch.int64), (0, 8 * bytes_ - cols)).reshape(rows, bytes_, 8)
    return (groups << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack_mask(bits: Tensor, cols: int) -> Tensor:
    flags = bits.to(torch.int64).unsqueeze(-1) >> torch.arange(8) & 1
    return flags.reshape(bits.shape[0], 8 * bits.shape[1])[:, :cols].bool()


def mask_apply_packed(x: Tensor, bits: Tensor) -> Tensor:
    return mask_apply(x, unpack_mask(bits, x.shape[1]))


def threshold_mask(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(x with |x| <= threshold zeroed, bits of the rest); the comparison is in float32."""
    kept = ~(x.float().abs() <= torch.tensor(threshold, dtype=torch.float32))
    return mask_apply(x, kept), pack_mask(kept)


def dense_to_bitmap(dense: Tensor) -> tuple[Tensor, Tensor]:
    kept = dense != 0
    return dense[kept], pack_mask(kept)


def dense_to_nm(dense: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    kept = (dense != 0).reshape(dense.shape[0], dense.shape[1] // m, m)
    missing = n - kept.sum(-1, keepdim=True)
    filled = kept | (~kept & ((~kept).cumsum(-1) <= missing))
    filled = filled.reshape(dense.shape)
    return dense[filled], pack_mask(filled)


def bitmap_to_dense(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    dense = torch.zeros(bits.shape[0], cols, dtype=values.dtype)
    return dense.masked_scatter_(unpack_mask(bits, cols), values)


def dense_to_csr(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = dense != 0
    crow = functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return crow, kept.nonzero()[:, 1].to(torch.int32), dense[kept]


def csr_to_dense(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> Tensor:
    dense = torch.zeros(crow.numel() - 1, cols, dtype=values.dtype)
    rows = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff())
    dense[rows, col.long()] = values
    return dense


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64; the operation sums in float32."""
    out = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return out.to(x.dtype)
