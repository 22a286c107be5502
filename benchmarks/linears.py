"""Linears of the benchmark's cases against torch's dense layer, and torch.sparse CSR where the case is CSR."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from layers import DTYPES, SHAPES, Samples, copies_of, pruned_weight, take_turns
from targets import TARGETED_MODEL, Case
from torch import Tensor, nn

from sparseprune.kernels import native
from sparseprune.weights.linear import SparseLinear

Calls = list[Callable[[], Any]]


@torch.no_grad()
def measure(
    cases: Sequence[Case],
    model: str,
    layer: str,
    dtype: str,
    batches: Sequence[int],
    seconds: float,
    read_gb_s: float,
) -> Iterator[list[dict[str, Any]]]:
    """One record per case for each batch size; `cases` are of one dtype and take turns with one dense layer.

    `read_cap` is the speed-up of a kernel that only reads its weight, at `read_gb_s`.
    """
    rows, cols = SHAPES[model][layer]
    dense = _dense_layer(torch.randn(rows, cols).to(DTYPES[dtype]))
    copies = copies_of(dense.weight.nbytes)
    layers: dict[str, list[nn.Module]] = {"dense": _copies(dense, copies)}
    csr: list[Tensor] = []
    for case in cases:
        weight = pruned_weight(rows, cols, DTYPES[dtype], case.format, case.sparsity)
        layers[case.name] = _copies(SparseLinear.from_dense(_dense_layer(weight), case.format), copies)
        if case.format == "csr":
            csr = [_torch_csr(weight) for _ in range(2 * copies)]
    for batch in batches:
        x = torch.randn(batch, cols).to(DTYPES[dtype])
        calls: dict[str, Calls] = {
            name: [functools.partial(it, x) for it in its] for name, its in layers.items()
        }
        if csr:
            calls["torch.sparse mm"] = [functools.partial(torch.matmul, w, x.t()) for w in csr[::2]]
            if batch == 1:  # on other copies: what mm has just read would lie in the cache
                calls["torch.sparse mv"] = [functools.partial(torch.mv, w, x[0]) for w in csr[1::2]]
        samples = take_turns(calls, seconds)
        yield [_record(case, model, layer, batch, layers[case.name][0], samples, read_gb_s) for case in cases]


def _record(
    case: Case,
    model: str,
    layer: str,
    batch: int,
    sparse: nn.Module,
    samples: dict[str, Samples],
    read_gb_s: float,
) -> dict[str, Any]:
    rows, cols = SHAPES[model][layer]
    dense, ours = samples["dense"], samples[case.name]
    peers = {name: it for name, it in samples.items() if name.startswith("torch.sparse")}
    record: dict[str, Any] = {
        "case": case.name, "format": case.format, "sparsity": case.sparsity, "dtype": case.dtype,
        "model": model, "layer": layer, "shape": [rows, cols], "batch": batch,
        "strategy": native.strategy(sparse.packed, batch),
        "nbytes": sparse.nbytes, "of_dense": sparse.nbytes / (rows * cols * sparse.dtype.itemsize),
        "dense_seconds": asdict(dense), "sparse_seconds": asdict(ours),
        "speedup": dense.median / ours.median,
        "gb_s": sparse.nbytes / ours.median / 1e9,
        "read_share": sparse.nbytes / ours.median / 1e9 / read_gb_s,
        "read_cap": dense.median * read_gb_s * 1e9 / sparse.nbytes,
        "dense_read_share": rows * cols * sparse.dtype.itemsize / dense.median / 1e9 / read_gb_s,
        "gflop_s": 2 * batch * sparse.nnz / ours.median / 1e9,
        "dense_equivalent_gflop_s": 2 * batch * rows * cols / ours.median / 1e9,
        "dense_gflop_s": 2 * batch * rows * cols / dense.median / 1e9,
    }  # fmt: skip
    if case.format == "csr":
        record["torch_csr_seconds"] = {name: asdict(it) for name, it in peers.items()}
        record["over_torch_csr"] = min(it.median for it in peers.values()) / ours.median
    if model == TARGETED_MODEL and batch in case.speedups:
        wanted = {
            "speedup": case.speedups[batch],
            "read_share": case.read_shares.get(batch),
            "over_torch_csr": case.over_torch_csr.get(batch),
        }
        record["targets"] = {key: value for key, value in wanted.items() if value is not None}
        record["reached"] = all(record[key] >= value for key, value in record["targets"].items())
    return record


def _dense_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _copies(layer: nn.Module, count: int) -> list[nn.Module]:
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def _torch_csr(weight: Tensor) -> Tensor:
    """int32 indices: what MKL's kernels take without a conversion, the fastest torch.sparse there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        csr = weight.to_sparse_csr()
    parts = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
    return torch.sparse_csr_tensor(*parts, csr.shape, check_invariants=False)


def groups(
    cases: Sequence[Case], shapes: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, str, list[Case]]]:
    """(model, layer, dtype, cases): what shares a dense layer, and so is timed together."""
    for (model, layer), dtype in itertools.product(shapes, DTYPES):
        members = [case for case in cases if case.dtype == dtype]
        if members:
            yield model, layer, dtype, members
