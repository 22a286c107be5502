"""Which form serves a weight? The one answer: `sparsify`, streaming, `bench`, `inspect` and the searches ask here.

Nothing is measured here: a caller that measures takes the fastest of the candidates, one that does not the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprune.kernels import cuda
from sparseprune.weights.format import Format, detect_nm
from sparseprune.weights.spec import DTYPES

__all__ = ["Candidates", "candidates", "packed_bits", "smallest"]

_CSR_DENSITY = 0.35  # above it CSR, a column number for each value, is never the smaller or the faster
_MOST_M = 32  # of the N:M formats


@dataclass(frozen=True)
class Candidates:
    """The formats that can hold a weight and make it smaller, none where it has to stay dense; and why."""

    formats: tuple[Format, ...]
    reason: str


def candidates(weight: Tensor, asked: Format | None = None, pruned_to: str | None = None) -> Candidates:
    """The formats worth a try for `weight` [out, in] where it lies.

    Args:
        asked: only this one.
        pruned_to: the pattern that the weight was pruned to ("2:4", "unstructured", "16x1"), if that is known; what is
            not known is looked for in the weight. A pattern that the weight no longer fits is not believed.
    """
    missing = _no_kernels(weight)
    if missing:
        return Candidates((), missing)
    if asked is not None:
        problem = asked.misfit(weight)
        return Candidates((), problem) if problem is not None else Candidates((asked,), "asked for")
    stale = ""
    if pruned_to is not None and (form := _format_of(pruned_to)) is not None:
        problem = form.misfit(weight)
        if problem is None:
            return Candidates((form,), f"pruned to {pruned_to}")
        stale = f"; was pruned to {pruned_to}, which it no longer fits: {problem}"
    if (pruned_to is None or stale) and (found := detect_nm(weight)) is not None:
        return Candidates((found,), f"found in the weights{stale}")
    density = int(weight.count_nonzero()) / weight.numel()
    bits = weight.dtype.itemsize * 8
    if 1 - density <= 1 / bits:  # a bitmap spends one bit a weight to save `bits` for each zero
        return Candidates((), f"too few zeros ({1 - density:.1%}): no sparse format would be smaller{stale}")
    formats = [Format("bitmap")]
    if density <= _CSR_DENSITY and weight.device.type == "cpu":  # on a GPU one layout serves both
        formats.append(Format("csr"))
    known = f"pruned to {pruned_to}" if pruned_to is not None and not stale else "found in the weights"
    return Candidates(tuple(formats), known + stale)


def smallest(weight: Tensor, asked: Format | None = None, pruned_to: str | None = None) -> Candidates:
    """The one of the candidates that takes the fewest bytes once packed; none where the weight stays dense."""
    found = candidates(weight, asked, pruned_to)
    if len(found.formats) < 2:
        return found
    density = int(weight.count_nonzero()) / max(1, weight.numel())
    sizes = {form: packed_bits(form, density, weight.dtype, weight.shape[1]) for form in found.formats}
    best, *others = sorted(sizes, key=lambda form: sizes[form])
    compared = ", ".join(f"{form} {sizes[form]:.2f}" for form in others)
    return Candidates((best,), f"smallest: {sizes[best]:.2f} bits a weight ({compared})")


def packed_bits(form: Format, density: float, dtype: torch.dtype, cols: int) -> float:
    """Bits per weight of the packed form on a CPU, values and index, for a density of kept weights."""
    value = 8 * dtype.itemsize
    if form.kind == "csr":
        return density * (value + (16 if cols <= 1 << 16 else 32))
    return 1 + value * (form.n / form.m if form.kind == "nm" else density)


def _no_kernels(weight: Tensor) -> str:
    if weight.is_meta:
        return "on the meta device: no data"
    if weight.device.type == "cuda":
        if missing := cuda.missing():
            return f"on {weight.device}: {missing}"
    elif weight.device.type != "cpu":
        return f"on {weight.device}: there are kernels for the CPU and for CUDA"
    if weight.dtype not in DTYPES:
        return f"dtype {weight.dtype} has no kernels"
    return "empty" if weight.numel() == 0 else ""


def _format_of(pattern: str) -> Format | None:
    """The N:M format of a pattern, if it is one that a format can have."""
    n, colon, m = pattern.partition(":")
    return Format("nm", int(n), int(m)) if colon and int(m) <= _MOST_M else None
