"""The benchmarks: a line of JSON for each cell, as soon as it is known. Started by run.py on the built package."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check.plan import DRY_SHAPES, SHAPES, Cell, cells, dry_cells
from gpu_check.timing import Call, CudaClock, HostClock, Timing, first_line, is_fatal, take_turns
from sparseprune.kernels import cuda, ops
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import SparseWeight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIN_COPIES, MAX_COPIES = 4, 64
CELL_SECONDS = (0.15, 1.5)
LOST_EXIT, AGAIN_EXIT = 3, 4
"""The device is lost to this process; the process has a broken capture behind it. Both ask for a fresh process."""

WAITING = ("dense_to_csr", "csr_to_dense", "to_sparse_csr")
"""What reads a number back from the device, and so cannot be captured."""

_WRONG = 1e-2  # relative error of a result, in the Frobenius norm, that no rounding explains
_SIDE = 8192
_DRY_SIDE = 96


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--until", type=float, required=True, help="seconds since the epoch: no cell begins later"
    )
    parser.add_argument("--first", type=int, default=0, help="the cell to begin with")
    parser.add_argument(
        "--eager", default="", help="candidates that cannot be captured, with semicolons between them"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU: the same way, no numbers worth a look"
    )
    arguments = parser.parse_args()
    eager = [name for name in arguments.eager.split(";") if name]
    bench = Bench("cpu" if arguments.dry_run else "cuda", emit, eager)
    plan = dry_cells() if arguments.dry_run else cells(list(SHAPES))
    return run(bench, plan, arguments.first, arguments.until - time.time())


def emit(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def run(bench: Bench, plan: Sequence[Cell], first: int, seconds: float) -> int:
    """Measures the cells of the plan from `first` on, for about `seconds`; 0, or why a fresh process should go on."""
    stop = bench.clock.now() + seconds
    bench.emit({"kind": "cells", "count": len(plan)})
    bench.emit({"kind": "device", **bench.device_record()})
    for index in range(first, len(plan)):
        cell = plan[index]
        left = stop - bench.clock.now()
        if left <= 0:
            bench.emit({"kind": "left out", "cells": [it.name for it in plan[index:]]})
            return 0
        bench.emit({"kind": "begin", "index": index, "cell": cell.name})
        share = min(
            CELL_SECONDS[1], max(CELL_SECONDS[0], left / (len(plan) - index) / 2)
        )  # half of it to make the weight
        try:
            bench.emit(bench.measure(cell, share))
        except Exception as error:  # whatever one cell meets, the others are worth having
            bench.emit(
                {"kind": "error", "cell": cell.name, "error": f"{type(error).__name__}: {error}"[:500]}
            )
            if is_fatal(error):
                return LOST_EXIT
            bench.forget()
        if bench.clock.failed:
            bench.emit({"kind": "eager", "names": sorted(bench.clock.failed)})
            return AGAIN_EXIT
    return 0


class Bench:
    """Measures cells on a device; keeps the layers of the last weight."""

    def __init__(
        self, device: str, emit: Callable[[dict[str, Any]], None], eager: Sequence[str] = ()
    ) -> None:
        self.device, self.emit = device, emit
        self.cuda = device == "cuda"
        self.clock = CudaClock([*WAITING, *eager]) if self.cuda else HostClock()
        self.shapes = SHAPES if self.cuda else DRY_SHAPES
        self.side = _SIDE if self.cuda else _DRY_SIDE
        self._key: Any = None
        self._layers: Layers | None = None

    def device_record(self) -> dict[str, Any]:
        """The card as torch sees it, and the rate of a copy: bytes read and bytes written."""
        if not self.cuda:
            return {
                "name": "CPU",
                "copy_gb_s": self._copy_rate(1 << 20),
                "peak_gb_s": None,
                "compute_capability": None,
            }
        properties = torch.cuda.get_device_properties(0)
        self._warm_up()
        clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        return {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "peak_gb_s": 2 * clock * 1e3 * width / 8 / 1e9 or None,  # two transfers a clock, in kHz
            "copy_gb_s": self._copy_rate(1 << 30),
        }

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        kinds = {
            "linear": self.linear,
            "choice": self.choice,
            "mask": self.mask,
            "conversion": self.conversion,
        }
        measure = kinds[cell.kind]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # torch's sparse layouts: "in beta state", "prototype"
            return measure(cell, seconds)

    def forget(self) -> None:
        """Lets go of the layers, and so of their memory."""
        self._key = self._layers = None
        if self.cuda:
            torch.cuda.empty_cache()

    def linear(self, cell: Cell, seconds: float) -> dict[str, Any]:
        layers = self._layers_of(cell)
        rows, cols = self.shapes[cell.layer]
        inputs = [
            torch.randn(cell.batch, cols, device=self.device).to(DTYPES[cell.dtype])
            for _ in layers.modules["dense"]
        ]
        calls = {
            name: [functools.partial(module, x) for module, x in zip(modules, inputs, strict=True)]
            for name, modules in layers.modules.items()
        }
        error = _relative_error(layers.modules["ours"][0](inputs[0]), layers.modules["dense"][0](inputs[0]))
        timings, errors = take_turns(calls, seconds, self.clock)
        ours, dense = (_needed(name, timings, errors) for name in ("ours", "dense"))
        vendors = {name: it for name, it in timings.items() if name.startswith("torch ")}
        item = DTYPES[cell.dtype].itemsize
        sparse: Any = layers.modules["ours"][0]
        moved = sparse.nbytes + (cols + rows) * cell.batch * item
        return {
            "kind": "linear", "layer": cell.layer, "shape": [rows, cols], "format": cell.form, "dtype": cell.dtype,
            "batch": cell.batch, "speedup": dense.median / ours.median, "gb_s": moved / ours.median / 1e9,
            "dense_gb_s": (rows * cols + (cols + rows) * cell.batch) * item / dense.median / 1e9,
            "dense_equivalent_tflop_s": 2 * rows * cols * cell.batch / ours.median / 1e12,
            "dense_tflop_s": 2 * rows * cols * cell.batch / dense.median / 1e12,
            "over_vendor": min(it.median for it in vendors.values()) / ours.median if vendors else None,
            "config": planned(sparse, cell.batch)[0] if self.cuda else None,
            "nbytes": sparse.nbytes, "of_dense": sparse.nbytes / (rows * cols * item), "copies": len(inputs),
            "error": error, "wrong": not error < _WRONG,
            "seconds": {name: asdict(it) for name, it in timings.items()}, "errors": {**layers.errors, **errors},
        }  # fmt: skip

    def choice(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """Every configuration of the kernel, with the splits that the plan has for it: is the plan's the fastest?"""
        layers = self._layers_of(cell)
        modules: Any = layers.modules["ours"]
        rows, cols = self.shapes[cell.layer]
        x = torch.randn(cell.batch, cols, device=self.device).to(DTYPES[cell.dtype])
        name, (config, splits) = planned(modules[0], cell.batch)
        names = cuda.configs(modules[0].packing)
        calls = {
            f"{other}, splits {parts}": [
                functools.partial(cuda.linear, x, it.packed, None, rows, cols, it.packing, (index, parts))
                for it in modules
            ]
            for index, other in enumerate(names)
            for parts in split_counts(splits if index == config else 1, cols)
        }
        timings, errors = take_turns(calls, seconds, self.clock)
        best = min(timings, key=lambda it: timings[it].median)
        return {
            "kind": "choice", "layer": cell.layer, "shape": [rows, cols], "format": cell.form, "dtype": cell.dtype,
            "batch": cell.batch, "planned": name, "best": best, "best_over_planned":
            timings[name].median / timings[best].median, "errors": errors,
            "seconds": {it: timings[it].median for it in sorted(timings, key=lambda it: timings[it].median)},
        }  # fmt: skip

    def mask(self, cell: Cell, seconds: float) -> dict[str, Any]:
        side, dtype = self.side, DTYPES[cell.dtype]
        copies = self._copies(side * side * dtype.itemsize)
        weights = [torch.randn(side, side, device=self.device).to(dtype) for _ in range(copies)]
        keep = torch.rand(side, side, device=self.device) < cell.sparsity
        bits, target = ops.pack_mask(keep), torch.empty_like(weights[0])
        expected = torch.where(keep, weights[0], torch.zeros_like(weights[0]))
        wrong = not torch.equal(ops.mask_apply_packed(weights[0], bits), expected)
        calls: dict[str, Sequence[Call]] = {
            "copy_": [functools.partial(target.copy_, it) for it in weights],
            "mask_apply_packed_": [functools.partial(ops.mask_apply_packed_, it, bits) for it in weights],
            "mask_apply_": [functools.partial(ops.mask_apply_, it, keep) for it in weights],
            "threshold_mask_": [functools.partial(ops.threshold_mask_, it, 0.5) for it in weights],
            "w.mul_(mask)": [functools.partial(it.mul_, keep) for it in weights],
        }
        timings, errors = take_turns(calls, seconds, self.clock)
        copy_seconds = _needed("copy_", timings, errors).median
        # Each reads and writes the weight once; the bool mask is read besides.
        extra = {"mask_apply_": 1 + 1 / (2 * dtype.itemsize)}
        shares = {
            name: copy_seconds * extra.get(name, 1.0) / it.median
            for name, it in timings.items()
            if name != "copy_"
        }
        return {
            "kind": "mask", "dtype": cell.dtype, "shape": [side, side], "copy_shares": shares, "wrong": wrong,
            "seconds": {name: asdict(it) for name, it in timings.items()}, "errors": errors,
        }  # fmt: skip

    def conversion(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """Dense to CSR: the least it can move is the dense matrix, read, and the triple, written. It waits for the count."""
        side, dtype = self.side // 2, DTYPES[cell.dtype]
        dense = torch.randn(side, side, device=self.device)
        dense = dense.masked_fill(torch.rand(side, side, device=self.device) < cell.sparsity, 0).to(dtype)
        copies = [dense.clone() for _ in range(self._copies(dense.nbytes))]
        crow, col, values = ops.dense_to_csr(dense)
        wrong = not torch.equal(ops.csr_to_dense(crow, col, values, side), dense)
        calls: dict[str, Sequence[Call]] = {
            "dense_to_csr": [functools.partial(ops.dense_to_csr, it) for it in copies],
            "csr_to_dense": [functools.partial(ops.csr_to_dense, crow, col, values, side)],
            "to_sparse_csr": [it.to_sparse_csr for it in copies],
        }
        timings, errors = take_turns(calls, seconds, self.clock)
        moved = dense.nbytes + crow.nbytes + col.nbytes + values.nbytes
        return {
            "kind": "conversion", "dtype": cell.dtype, "sparsity": cell.sparsity, "shape": [side, side], "wrong": wrong,
            "gb_s": {name: moved / it.median / 1e9 for name, it in timings.items()},
            "seconds": {name: asdict(it) for name, it in timings.items()}, "errors": errors,
        }  # fmt: skip

    def _layers_of(self, cell: Cell) -> Layers:
        key = (cell.layer, cell.form, cell.dtype)
        if key != self._key or self._layers is None:
            self.forget()
            self._layers = Layers(
                self.shapes[cell.layer], cell.form, DTYPES[cell.dtype], self.device, self._copies
            )
            self._key = key
        return self._layers

    def _copies(self, nbytes: int) -> int:
        """Copies of what takes `nbytes` that push each other out of the L2 cache."""
        if not self.cuda:
            return 2
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return min(MAX_COPIES, max(MIN_COPIES, math.ceil(2 * l2 / nbytes)))

    def _copy_rate(self, nbytes: int) -> float:
        source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timings, _ = take_turns({"copy": [functools.partial(target.copy_, source)]}, 0.3, self.clock)
        return 2 * nbytes / timings["copy"].median / 1e9

    def _warm_up(self) -> None:
        """Work for half a second: a card that was idle runs at a fraction of its clock."""
        x = torch.randn(4096, 4096, device=self.device).bfloat16()
        stop = self.clock.now() + 0.5
        while self.clock.now() < stop:
            for _ in range(8):
                x @ x
            torch.cuda.synchronize()


class Layers:
    """One weight (of codes, what they stand for) as dense layers, as ours, and as torch's two kinds of 2:4, a number of copies
    of each."""

    def __init__(
        self, shape: tuple[int, int], form: str, dtype: torch.dtype, device: str, copies: Callable[[int], int]
    ) -> None:
        kind, _, encoding = form.partition(" ")
        canonical = SparseWeight.from_dense(
            pruned_weight(*shape, kind, dtype, device), kind, encoding or "plain"
        )
        weight, ours = canonical.dense(), SparseLinear.from_weight(canonical)
        count = copies(ours.nbytes)
        self.modules: dict[str, list[Callable[[Tensor], Tensor]]] = {
            "dense": [dense_layer(weight.clone()) for _ in range(count)],
            "ours": [ours, *(copy.deepcopy(ours) for _ in range(count - 1))],
        }
        self.errors: dict[str, str] = {}
        if form == "2:4" and dtype != torch.float32 and device == "cuda":
            for name, kind in vendor_kinds().items():
                try:
                    self.modules[name] = [
                        functools.partial(nn.functional.linear, weight=kind.from_dense(weight))
                        for _ in range(count)
                    ]
                except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
                    self.errors[name] = first_line(error)


def split_counts(splits: int, cols: int) -> list[int]:
    """`splits`, more, and none; a split has 64 columns at least."""
    return sorted({min(parts, math.ceil(cols / 64)) for parts in (1, splits, 2 * splits, 4 * splits)})


def planned(layer: Any, batch: int) -> tuple[str, tuple[int, int]]:
    """The configuration and the splits that the plan has for a layer on a GPU, by name and by number."""
    blob, rows, cols, packing = layer.packed_weight
    config, splits, _ = cuda.plan(blob.get_device(), packing, rows, cols, batch)
    name = cuda.configs(packing)[config]
    return f"{name}, splits {splits}", (config, splits)


def vendor_kinds() -> dict[str, Any]:
    """torch's `to_sparse_semi_structured` makes one of these."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    return {
        "torch cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "torch cutlass": SparseSemiStructuredTensorCUTLASS,
    }


def pruned_weight(rows: int, cols: int, form: str, dtype: torch.dtype, device: str) -> Tensor:
    """Normal weights, the larger two of every four kept (2:4), or half of them anywhere (bitmap), or all (dense)."""
    weight = torch.randn(rows, cols, device=device)
    if form == "2:4":
        order = weight.abs().view(rows, cols // 4, 4).argsort(-1).argsort(-1).view(rows, cols)
        weight.masked_fill_(order < 2, 0)
    elif form == "bitmap":
        weight.masked_fill_(torch.rand(rows, cols, device=device) < 0.5, 0)
    return (weight / math.sqrt(cols)).to(dtype)


def dense_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _needed(name: str, timings: Mapping[str, Timing], errors: Mapping[str, str]) -> Timing:
    """Its timing; where it could not run there is nothing to compare the others with."""
    if name not in timings:
        raise RuntimeError(f"{name}: {errors[name]}")
    return timings[name]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


if __name__ == "__main__":
    sys.exit(main())
