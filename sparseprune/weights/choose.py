"""Which form serves a weight: the one answer, for whoever swaps, writes, times or describes weights.

`options_for` lists what a weight can be held in here; `smallest` takes one without measuring, `fastest` by times that the
caller has measured. Where a weight was pruned to N:M it is held so; where nobody has noted what it was pruned to, N:M is
looked for in its zeros. The reasons that they give stand in every report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from sparseprune.kernels import backend, cuda, native
from sparseprune.kernels.packing import packing_code
from sparseprune.models.notes import Note, digest_of, kept_bits
from sparseprune.report import human_bytes
from sparseprune.weights.encoding import Encoding
from sparseprune.weights.format import Format, group_counts, popcounts
from sparseprune.weights.spec import DTYPES, WeightSpec

__all__ = [
    "Candidate", "Choice", "Options", "Recognised", "best_of", "fastest", "has_codes", "options_for", "packed_bytes",
    "recognise", "smallest", "smallest_bytes", "smallest_codes", "unstructured_forms",
]  # fmt: skip

_Form = TypeVar("_Form")

_GROUP_SIZES = (4, 8, 16, 32)
_WASTE = 0.1
"""Of the values kept (and at most half of that of all weights): explicit zeros that N:M may hold and still be taken for the
pattern that a weight's zeros follow. What is pruned to N:M has far fewer. Random zeros never passed in matrices of
128 x 128 and more, at densities from 0.001 to 0.9; a share of all weights instead took 1:32 for them at 0.001, with 73
times the values."""
_CSR_DENSITY = 0.45
"""CSR was faster than the bitmap up to a density of 0.45 with AVX2 (1.03 times; 1.17 at 0.40) and of 0.30 with AVX-512, for
1, 8 and 64 rows in bfloat16 and float32, and nowhere at 0.5 (benchmarks/csr_or_bitmap.py, 2 cores of an AMD EPYC)."""


@dataclass(frozen=True)
class Recognised:
    """What a weight's zeros follow: `form` is N:M, None where they may lie anywhere; `reason` says how that is known."""

    form: Format | None
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One form that a weight can be held in, and how many values it keeps (in N:M: explicit zeros among them)."""

    format: Format
    nnz: int


@dataclass(frozen=True)
class Options:
    """What a weight [out, in] can be held in on its device. No candidates: it stays dense, and `reason` says why."""

    candidates: tuple[Candidate, ...]
    reason: str
    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    """Zeros as a fraction of the weights; 0 where there is nothing to look at."""

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(candidate.format for candidate in self.candidates)


@dataclass(frozen=True)
class Choice:
    """The form that serves a weight, None where it stays dense, and why; `speedups` over dense by batch, if measured."""

    candidate: Candidate | None
    reason: str
    speedups: dict[int, float] = field(default_factory=dict)

    @property
    def format(self) -> Format | None:
        return None if self.candidate is None else self.candidate.format


def options_for(weight: Tensor, asked: Format | None = None, note: Note | None = None) -> Options:
    """What `weight` [out, in] can be held in.

    Args:
        asked: only this format, however much it saves.
        note: what the weight was pruned to, as far as that is known (`sparseprune.models.notes.recall`).
    """
    shape = (weight.shape[0], weight.shape[1])
    if weight.is_meta or weight.numel() == 0:
        return Options(
            (), "on the meta device: no data" if weight.is_meta else "empty", shape, weight.dtype, 0.0
        )
    bits = kept_bits(weight)
    kept = int(popcounts(bits).sum())
    sparsity = 1 - kept / weight.numel()
    forms: tuple[Format, ...] = ()
    if missing := _missing_kernels(weight):
        reason = missing
    elif asked is not None:
        problem = _misfit(asked, bits, shape[1])
        forms = () if problem else (asked,)
        reason = f"{asked} was asked for and does not fit ({problem})" if problem else "asked for"
    else:
        found = _recognise(bits, shape[1], note)
        forms = (found.form,) if found.form else unstructured_forms(1 - sparsity, weight.device)
        reason = found.reason
    candidates = tuple(Candidate(form, _values_in(form, shape, kept)) for form in forms)
    if asked is None and candidates:
        bits_dense = 8 * weight.dtype.itemsize
        # canonical or packed, a form spends a bit per weight to save a value for each that it does not keep
        candidates = tuple(
            it for it in candidates if it.nnz * bits_dense + weight.numel() < weight.numel() * bits_dense
        )
        if not candidates:
            reason = f"too few zeros ({sparsity:.1%}): no sparse format would be smaller"
    return Options(candidates, reason, shape, weight.dtype, sparsity)


def smallest(options: Options) -> Choice:
    """The candidate of the fewest bytes when packed. Nothing is measured."""
    if len(options.candidates) <= 1:
        return Choice(next(iter(options.candidates), None), options.reason)
    sizes = {it: packed_bytes(it.format, it.nnz, options.shape, options.dtype) for it in options.candidates}
    best = min(sizes, key=lambda it: sizes[it])
    others = ", ".join(f"{it.format} {human_bytes(size)}" for it, size in sizes.items() if it != best)
    return Choice(best, f"{options.reason}; smallest ({others})")


def fastest(options: Options, speedups: Mapping[Format, Mapping[int, float]]) -> Choice:
    """The fastest on the whole of the candidates that lose to dense at no batch size; dense where none is left.

    speedups: of every candidate's format, dense time over sparse time by batch size.
    """
    if not options.candidates:
        return Choice(None, options.reason)
    winners = [it for it in options.candidates if min(speedups[it.format].values()) >= 1]
    among = [it.format for it in winners or options.candidates]
    best = best_of({form: speedups[form] for form in among})
    chosen = next(it for it in options.candidates if it.format == best)
    if not winners:
        slower = ", ".join(str(batch) for batch, ratio in speedups[best].items() if ratio < 1)
        reason = f"dense is faster than {best} at batch {slower}"
        return Choice(None, f"{options.reason}; {reason}", dict(speedups[best]))
    others = [f"{form} {_ratios(speedups[form])}" for form in options.formats if form != best]
    reason = "faster than dense" + (f" and than {', '.join(others)}" if others else "")
    return Choice(chosen, f"{options.reason}; {reason}", dict(speedups[best]))


def best_of(speedups: Mapping[_Form, Mapping[int, float]]) -> _Form:
    """The fastest form, or name of one, over all batch sizes together."""
    return max(speedups, key=lambda form: math.prod(speedups[form].values()))


def unstructured_forms(density: float, device: torch.device) -> tuple[Format, ...]:
    """The formats worth a try on `device` for a weight whose zeros may lie anywhere."""
    if density <= _CSR_DENSITY and device.type == "cpu":  # on a GPU one layout serves both
        return Format("bitmap"), Format("csr")
    return (Format("bitmap"),)


def packed_bytes(form: Format, nnz: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a weight that keeps `nnz` values, packed for the CPU: it follows from these, nothing is packed."""
    layout = native.layout_for(form.kind, form.n, form.m, dtype)
    return native.packed_bytes(*shape, packing_code(layout, dtype), nnz)


def smallest_bytes(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> int:
    """What `smallest` would come to for a weight of this sparsity, packed for the CPU: its bytes, dense if that is less."""
    numel = shape[0] * shape[1]
    kept = round(numel * (1 - sparsity))
    sizes = [numel * dtype.itemsize]
    if dtype in DTYPES:
        forms = unstructured_forms(1 - sparsity, torch.device("cpu"))
        sizes += [packed_bytes(form, kept, shape, dtype) for form in forms]
    return min(sizes)


def smallest_codes(weight: Tensor, values: Encoding, note: Note | None = None) -> WeightSpec:
    """The spec of the fewest bytes for codes of `weight` [out, in]: dense, or the N:M that its zeros follow, or the bitmap, of
    those that the weight's device has kernels for.

    Sparse int4 has no minimums: its `values` are int4 where these are int4_minimum. `note` as for `options_for`.
    """
    shape = (weight.shape[0], weight.shape[1])
    bits = kept_bits(weight)
    form = _recognise(bits, shape[1], note).form or Format("bitmap")
    nnz = {Format("dense"): weight.numel(), form: _values_in(form, shape, int(popcounts(bits).sum()))}
    without = replace(values, kind=values.kind.removesuffix("_minimum"))
    specs = [
        WeightSpec(shape, weight.dtype, Format("dense"), values),
        WeightSpec(shape, weight.dtype, form, without),
    ]
    served = [spec for spec in specs if has_codes(spec.format, weight)]
    return min(served, key=lambda spec: spec.nbytes(nnz[spec.format]))


def has_codes(form: Format, where: Tensor) -> bool:
    """Whether there are kernels for codes in the format on the device of `where`: a GPU has them for dense and 2:4."""
    return bool(backend.of(where).layout_of_codes(form.kind, form.n, form.m))


def recognise(weight: Tensor, note: Note | None = None) -> Recognised:
    """What the zeros of `weight` [out, in], of any dtype and on any device, follow; `note` as for `options_for`."""
    return _recognise(kept_bits(weight), weight.shape[1], note)


def _recognise(bits: Tensor, cols: int, note: Note | None) -> Recognised:
    noted = None if note is None else _form_of(note.pattern)
    problem = None if noted is None else _misfit(noted, bits, cols)
    if note is not None and problem is None and note.digest == digest_of(bits):
        return Recognised(noted, str(note))
    found = _detect(bits, cols)
    zeros = popcounts(bits).sum() < bits.shape[0] * cols
    nothing = "no pattern found in the weights" if zeros else "no zeros"
    text = nothing if found is None else f"{found} found in the weights"
    if note is None:
        return Recognised(found, text)
    if found is not None and found == noted:  # trained since, or cast: a weight or two may have become zero
        return Recognised(found, str(note))
    changed = "its zeros are others now" if problem is None else f"no longer fits ({problem})"
    return Recognised(found, f"was {note}, {changed}" + ("" if found is None else f"; {text}"))


def _form_of(pattern: str) -> Format | None:
    """The format made for a pattern; None for blocks, "unstructured", and an M beyond what a format holds."""
    try:
        return Format.parse(pattern)
    except ValueError:
        return None


def _detect(bits: Tensor, cols: int) -> Format | None:
    """The N:M that zeros follow, None if there is none to be seen. N is the most that any group of M keeps.

    A pattern that would keep many explicit zeros is a coincidence, and not taken.
    """
    density = int(popcounts(bits).sum()) / max(1, bits.shape[0] * cols)
    for m in _GROUP_SIZES:
        if not bits.numel() or cols % m:
            continue
        n = int(group_counts(bits, cols, m).max())
        if 0 < n < m and n / m - density <= _WASTE * min(density, 0.5):
            return Format("nm", n, m)
    return None


def _misfit(form: Format, bits: Tensor, cols: int) -> str | None:
    """Why a weight with these non-zeros cannot be held in `form`, and where; None where it can."""
    if form.kind != "nm":
        return None
    if cols % form.m:
        return f"{cols} columns are not a multiple of {form.m}"
    counts = group_counts(bits, cols, form.m)
    over = (counts > form.n).flatten()
    if not bool(over.any()):
        return None
    row, group = divmod(int(over.to(torch.uint8).argmax()), cols // form.m)
    return f"row {row}, group {group} keeps {int(counts[row, group])}"


def _values_in(form: Format, shape: tuple[int, int], kept: int) -> int:
    return shape[0] * (shape[1] // form.m) * form.n if form.kind == "nm" else kept


def _missing_kernels(weight: Tensor) -> str:
    """Why nothing multiplies by a sparse twin of `weight`; empty where something does."""
    if weight.device.type == "cuda":
        if missing := cuda.missing():
            return f"on {weight.device}: {missing}"
    elif weight.device.type != "cpu":
        return f"on {weight.device}: there are kernels for the CPU and for CUDA"
    return "" if weight.dtype in DTYPES else f"dtype {weight.dtype} has no kernels"


def _ratios(speedups: Mapping[int, float]) -> str:
    return "/".join(f"{ratio:.2f}" for ratio in speedups.values())
