"""Masks, conversions, bytes and the price of a call, each against what a user has without this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import scipy.sparse
import torch
from layers import DTYPES, Samples, copies_of, pruned_weight, take_turns
from safetensors.torch import save
from targets import BYTES_OF_DENSE, CALL_OF_DENSE, CSR_OVER_PEERS, MASK_COPY_SHARE, MASK_OVER_MUL
from torch import nn

from sparseprune.kernels import ops
from sparseprune.weights.linear import SparseLinear

_CALLS = 200  # in one sample, of a layer that takes microseconds


def _seconds(samples: dict[str, Samples]) -> dict[str, Any]:
    return {name: asdict(it) for name, it in samples.items()}


def masks(seconds: float, side: int = 8192) -> list[dict[str, Any]]:
    """A mask that keeps half, applied in place to [side, side]."""
    records = []
    for dtype in ("fp32", "bf16"):
        weight = torch.randn(side, side).to(DTYPES[dtype])
        source, copied = weight.clone(), torch.empty_like(weight)
        mask = torch.rand(side, side) < 0.5
        bits = ops.pack_mask(mask)
        calls: dict[str, list[Callable[[], Any]]] = {
            "w.mul_(mask)": [functools.partial(weight.mul_, mask)],
            "mask_apply_": [functools.partial(ops.mask_apply_, weight, mask)],
            "mask_apply_packed_": [functools.partial(ops.mask_apply_packed_, weight, bits)],
            "copy_": [functools.partial(copied.copy_, source)],
        }
        samples = take_turns(calls, seconds)
        mul, packed, copy = (samples[name].median for name in ("w.mul_(mask)", "mask_apply_packed_", "copy_"))
        records.append(
            {
                "dtype": dtype, "shape": [side, side], "seconds": _seconds(samples),
                "bool_over_mul": mul / samples["mask_apply_"].median, "packed_over_mul": mul / packed,
                # both read and write the weight once
                "copy_share": copy / packed,
                "targets": {"packed_over_mul": MASK_OVER_MUL, "copy_share": MASK_COPY_SHARE},
                "reached": mul / packed >= MASK_OVER_MUL and copy / packed >= MASK_COPY_SHARE,
            }
        )  # fmt: skip
    return records


def conversions(seconds: float, side: int = 4096) -> list[dict[str, Any]]:
    """Dense to CSR, [side, side]; scipy has no bf16."""
    records = []
    for dtype, sparsity in (("fp32", 0.5), ("fp32", 0.9), ("bf16", 0.9)):
        dense = pruned_weight(side, side, DTYPES[dtype], "bitmap", sparsity)
        copies = [dense.clone() for _ in range(copies_of(dense.nbytes))]
        calls: dict[str, list[Callable[[], Any]]] = {
            "dense_to_csr": [functools.partial(ops.dense_to_csr, it) for it in copies],
            "to_sparse_csr": [it.to_sparse_csr for it in copies],
        }
        if dtype == "fp32":
            calls["scipy"] = [functools.partial(scipy.sparse.csr_matrix, it.numpy()) for it in copies]
        samples = take_turns(calls, seconds)
        ours = samples["dense_to_csr"].median
        over = {name: it.median / ours for name, it in samples.items() if name != "dense_to_csr"}
        records.append(
            {
                "dtype": dtype, "sparsity": sparsity, "shape": [side, side], "seconds": _seconds(samples),
                "over": over, "targets": {"over": CSR_OVER_PEERS},
                "reached": min(over.values()) >= CSR_OVER_PEERS,
            }
        )  # fmt: skip
    return records


def sizes(rows: int = 4096, cols: int = 4096) -> list[dict[str, Any]]:
    """Bytes of a weight over bytes of the dense one: in memory as packed, and as saved."""
    records = []
    for form, sparsity, dtype in (("2:4", 0.5, "bf16"), ("bitmap", 0.5, "bf16"), ("bitmap", 0.7, "bf16"),
                                  ("bitmap", 0.9, "bf16"), ("2:4", 0.5, "fp32"), ("csr", 0.9, "fp32")):  # fmt: skip
        linear = nn.Linear(cols, rows, bias=False, dtype=DTYPES[dtype])
        linear.weight.data = pruned_weight(rows, cols, DTYPES[dtype], form, sparsity)
        sparse = SparseLinear.from_dense(linear, form)
        memory = sparse.nbytes / linear.weight.nbytes
        saved = len(save(sparse.state_dict())) / len(save(linear.state_dict()))
        record = {"format": form, "sparsity": sparsity, "dtype": dtype, "shape": [rows, cols],
                  "memory": memory, "saved": saved}  # fmt: skip
        if (form, dtype) == ("2:4", "bf16"):
            record["targets"] = {"memory": BYTES_OF_DENSE, "saved": BYTES_OF_DENSE}
            record["reached"] = max(memory, saved) <= BYTES_OF_DENSE
        records.append(record)
    return records


def calls(seconds: float, side: int = 64) -> list[dict[str, Any]]:
    """Seconds of a call of a [side, side] layer on one row: there the call is all there is."""
    records = []
    for dtype in ("fp32", "bf16"):
        linear = nn.Linear(side, side, dtype=DTYPES[dtype]).requires_grad_(False)
        linear.weight.data = pruned_weight(side, side, DTYPES[dtype], "2:4", 0.5)
        sparse = SparseLinear.from_dense(linear, "2:4")
        x = torch.randn(1, side).to(DTYPES[dtype])
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                samples = take_turns(
                    {"nn.Linear": [_repeat(linear, x)], "SparseLinear": [_repeat(sparse, x)]}, seconds
                )
            per_call = {
                name: {**asdict(it), **{key: asdict(it)[key] / _CALLS for key in ("median", "low", "high")}}
                for name, it in samples.items()
            }
            ratio = samples["SparseLinear"].median / samples["nn.Linear"].median
            record = {"dtype": dtype, "shape": [side, side], "grad_mode": gradients, "seconds": per_call,
                      "of_dense": ratio}  # fmt: skip
            if not gradients:
                record["targets"] = {"of_dense": CALL_OF_DENSE}
                record["reached"] = ratio <= CALL_OF_DENSE
            records.append(record)
    return records


def _repeat(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        for _ in range(_CALLS):
            layer(x)

    return call
