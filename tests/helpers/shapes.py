"""Awkward shapes, batches, sparsities and memory layouts, and the tensors that have them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from helpers import reference
from torch import Tensor

from sparseprune.kernels import ops
from sparseprune.kernels.packing import Packed

# Around the widths that kernels step by: 8, 16, 32 and 64 lanes, tiles, chunks of 256 and 1024 columns.
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 257, 513, 1025)
LONG = (1100, 2100)  # columns past one chunk of AMX (1024) and several of tile_dense (256)
BATCHES = (1, 2, 3, 4, 5, 11, 12, 13, 16, 17, 24, 25, 31, 32, 33, 48, 64, 65, 100, 129, 200, 300)
SPARSITIES = ("zero", "dense", "2:4", "4:8", "50%", "90%")
INPUTS = ("contiguous", "wide rows", "transposed", "offset", "repeated row", "every other row")


def mask(rows: int, cols: int, sparsity: str, seed: torch.Generator) -> Tensor:
    """A bool mask [rows, cols]; in N:M the last group may be short and keeps at most n."""
    if sparsity == "zero":
        return torch.zeros(rows, cols, dtype=torch.bool)
    if sparsity == "dense":
        return torch.ones(rows, cols, dtype=torch.bool)
    if sparsity == "uneven rows":  # one of zeros, one that keeps all, one half of it
        return torch.rand(rows, cols, generator=seed) < (torch.arange(rows) % 3 / 2)[:, None]
    if sparsity.endswith("%"):
        return torch.rand(rows, cols, generator=seed) >= float(sparsity[:-1]) / 100
    n, m = map(int, sparsity.split(":"))
    groups = math.ceil(cols / m)
    order = torch.rand(rows, groups, m, generator=seed).argsort(-1).argsort(-1)
    return (order < n).reshape(rows, groups * m)[:, :cols]


def whole(*shape: int, limit: int, seed: torch.Generator) -> Tensor:
    """Whole numbers of [-limit, limit], none of them 0: products and sums of them are exact in float32."""
    sign = torch.randint(0, 2, shape, generator=seed) * 2 - 1
    return (torch.randint(1, limit + 1, shape, generator=seed) * sign).float()


def arranged(x: Tensor, kind: str) -> Tensor:
    """The values of x [batch, cols] in the memory layout `kind`, with NaN wherever x does not reach."""
    batch, cols = x.shape
    if kind == "contiguous":
        return x.contiguous()
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "repeated row":
        return x[:1].expand(batch, cols)
    base = torch.full((2 * batch, cols + 12), math.nan, dtype=x.dtype)
    view = {
        "wide rows": base[:batch, :cols],
        "offset": base[:batch, 3 : 3 + cols],
        "every other row": base[1::2, 5 : 5 + cols],
    }[kind]
    view.copy_(x)
    return view


def raw(rows: int, cols: int, dtype: torch.dtype, density: float, seed: torch.Generator) -> Tensor:
    """Random bit patterns, so every kind of NaN, infinity and subnormal; the rest is +0.0 and -0.0."""
    word = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(word)
    words = torch.randint(limits.min, limits.max + 1, (rows, cols), generator=seed, dtype=torch.int64).to(
        word
    )
    # Random 32-bit words are rarely special.
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e-45, -1e-40, 6e-8, 65504.0]).to(dtype).view(word)
    pick = torch.randint(0, len(special), (rows, cols), generator=seed)
    words = torch.where(torch.rand(rows, cols, generator=seed) < 0.2, special[pick], words)
    zeros = torch.where(torch.rand(rows, cols, generator=seed) < 0.5, limits.min, 0).to(word)
    return torch.where(torch.rand(rows, cols, generator=seed) < density, words, zeros).view(dtype)


def generator(*numbers: int) -> torch.Generator:
    """One seed for several numbers."""
    return torch.Generator().manual_seed(sum(n * 10007**i for i, n in enumerate(numbers)) % 2**40)


def fits(layout: str, dtype: torch.dtype) -> bool:
    """Whether the packed layout holds values of this dtype."""
    return layout != "sparse24" or dtype != torch.float32


def packable(x: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """As much of x [rows, cols] as the packed layout holds (sparse24: whole groups of 4, 2:4), and its values and bits."""
    if layout != "sparse24":
        return x, *reference.dense_to_bitmap(x)
    x = x[:, : x.shape[1] // 4 * 4]
    x = reference.mask_apply(x, mask(*x.shape, "2:4", generator(*x.shape)))
    return x, *reference.dense_to_nm(x, 2, 4)


def sparse_layer(
    dtype: torch.dtype = torch.float32, rows: int = 20, cols: int = 36
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A 2:4 weight, a bias, and the weight's values and bits."""
    seed = generator(rows, cols)
    w = (torch.randn(rows, cols, generator=seed) * mask(rows, cols, "2:4", seed)).to(dtype)
    bias = torch.randn(rows, generator=seed).to(dtype)
    return w, bias, *reference.dense_to_bitmap(w)


def packed_layer(
    dtype: torch.dtype = torch.float32,
    rows: int = 20,
    cols: int = 36,
    layout: str = "tile",
    put: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor, Packed]:
    """A 2:4 weight, and where `put` puts them a bias and the weight packed."""
    w, bias, values, bits = sparse_layer(dtype, rows, cols)
    return w, put(bias), ops.pack(put(values), put(bits), cols, layout)
