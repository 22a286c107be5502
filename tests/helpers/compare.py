"""Comparisons: bit for bit, and with float64 under the bound that float32 sums obey."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = {2: torch.int16, 4: torch.int32}


def words(x: Tensor) -> Tensor:
    """The bits of floats; other tensors as they are."""
    return x.contiguous().view(_WORD[x.element_size()]) if x.is_floating_point() else x


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal dtype, shape and bits: -0.0 is not +0.0, and NaN equals the same NaN. `actual` may be on another device."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    differ = words(actual) != words(expected)
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        count = int(differ.sum())
        raise AssertionError(f"{what}: {count} differ, first at {at}: {actual[at]} is not {expected[at]}")


def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w.T + bias in float64. A sum of nothing but -0.0 is +0.0, as it is for kernels, whose sums start there."""
    return x.double() @ w.double().t() + (0.0 if bias is None else bias.double())


def linear_bound(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """How far a linear with float32 sums may be from float64, for finite x [.., K] and w [rows, K].

    A float32 sum of n products in any order is within gamma(n) * sum |w||x| of the exact one [Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1]; n counts kept weights, and 8 more roundings serve the bias
    and the merging of partial sums. Then the result is rounded to the dtype. The bf16 instructions take subnormal
    inputs and products for 0.
    """
    unit = torch.finfo(torch.float32).eps / 2
    kept = (w != 0).sum(1).double()
    gamma = (kept + 8) * unit / (1 - (kept + 8) * unit)
    absolute = product(x.abs(), w.abs(), None if bias is None else bias.abs())
    flushed = 0.0
    if x.dtype == torch.bfloat16:
        largest = max((float(t.abs().max()) for t in (x, w) if t.numel()), default=0.0)
        flushed = kept * torch.finfo(torch.float32).tiny * 2 * (1 + largest)
    sums = gamma * absolute + flushed
    info = torch.finfo(x.dtype)
    return sums + info.eps / 2 * (product(x, w, bias).abs() + sums) + info.smallest_normal * info.eps


def assert_linear(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, what: str = "") -> None:
    """`out` is x @ w.T + bias, within the bound. `out` and bias may be on another device."""
    out, bias = out.cpu(), None if bias is None else bias.cpu()
    expected = product(x, w, bias)
    assert out.dtype == x.dtype and out.shape == expected.shape, f"{what}: {out.dtype} {tuple(out.shape)}"
    error, bound = (out.double() - expected).abs(), linear_bound(x, w, bias)
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} outside the bound, first at {at}: {out[at]} is not "
            f"{expected[at]}, off by {error[at]:.3e} > {bound[at]:.3e}"
        )
