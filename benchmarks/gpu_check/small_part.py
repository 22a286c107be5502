"""Every operation once or twice on small awkward shapes: what compute-sanitizer watches, and the first sign of life.

Wrong results end it with 1, what the sanitizer finds with the exit code that it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from sparseprune.kernels import ops
from sparseprune.weights.sparse_weight import SparseWeight

SHAPES = ((40, 100), (130, 264))
BATCHES = (1, 9, 70)
CODES = (("dense", "int8"), ("dense", "int4"), ("dense", "int4_minimum"), ("2:4", "int8"), ("2:4", "int4"))


def two_of_four(rows: int, cols: int, dtype: torch.dtype, device: str, random: torch.Generator) -> Tensor:
    """Whole numbers, whose products and sums are exact in float32, two of every four columns."""
    weight = torch.randint(1, 5, (rows, cols), generator=random).float()
    order = torch.rand(rows, cols // 4, 4, generator=random).argsort(-1).reshape(rows, cols)
    return weight.masked_fill(order >= 2, 0).to(device, dtype)


def checks(device: str) -> list[tuple[str, Callable[[], bool]]]:
    """(name, whether it is right) for each operation, dtype and shape."""
    random = torch.Generator().manual_seed(0)
    found: list[tuple[str, Callable[[], bool]]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, cols in SHAPES:
            weight = two_of_four(rows, cols, dtype, device, random)
            name = f"{str(dtype).removeprefix('torch.')} {rows}x{cols}"
            found.append((f"masks {name}", lambda w=weight: _masks(w)))
            found.append((f"conversions {name}", lambda w=weight: _conversions(w)))
            for form in ("2:4", "bitmap"):
                found.append((f"linear {form} {name}", lambda w=weight, f=form: _linears(w, f)))
            if dtype == torch.float32:
                continue
            for form, encoding in CODES:
                found.append(
                    (f"linear {form} {encoding} {name}", lambda w=weight, c=(form, encoding): _codes(w, *c))
                )
    return found


def _masks(weight: Tensor) -> bool:
    keep = weight != 0
    bits = ops.pack_mask(keep)
    ones = torch.ones_like(weight)
    changed = weight.clone()
    kept = ops.threshold_mask_(changed, 1.5)
    return (
        torch.equal(ops.unpack_mask(bits, weight.shape[1]), keep)
        and torch.equal(ops.mask_apply(ones, keep), keep.to(weight.dtype))
        and torch.equal(ops.mask_apply_packed(ones, bits), keep.to(weight.dtype))
        and torch.equal(ops.unpack_mask(kept, weight.shape[1]), weight > 1.5)
        and torch.equal(changed, weight * (weight > 1.5))
    )


def _conversions(weight: Tensor) -> bool:
    cols = weight.shape[1]
    bitmap, nm, csr = ops.dense_to_bitmap(weight), ops.dense_to_nm(weight, 2, 4), ops.dense_to_csr(weight)
    return (
        torch.equal(ops.bitmap_to_dense(*bitmap, cols), weight)
        and torch.equal(ops.bitmap_to_dense(*nm, cols), weight)
        and torch.equal(ops.csr_to_dense(*csr, cols), weight)
    )


def _linears(weight: Tensor, form: str) -> bool:
    rows, cols = weight.shape
    canonical = SparseWeight.from_dense(weight, form)
    packed = canonical.pack()
    bias = torch.arange(rows, device=weight.device, dtype=weight.dtype) % 7
    back = SparseWeight.unpack(packed, canonical.spec).dense()
    right = torch.equal(back, weight)
    for batch in BATCHES:
        x = (torch.arange(batch * cols, device=weight.device) % 5 - 2).reshape(batch, cols).to(weight.dtype)
        expected = (x.double() @ weight.double().t() + bias.double()).to(weight.dtype)
        right &= torch.equal(ops.linear(x, packed, bias), expected)
    return right


def _codes(weight: Tensor, form: str, encoding: str) -> bool:
    """Within the rounding of activations to int8, which a CPU does and a GPU does not; and rows looked up."""
    rows, cols = weight.shape
    canonical = SparseWeight.from_dense(weight, form, encoding)
    packed, dense = canonical.pack(), canonical.dense()
    right = torch.equal(SparseWeight.unpack(packed, canonical.spec).dense(), dense)
    if form == "dense":
        indices = torch.arange(rows - 1, -1, -1, device=weight.device)
        right &= torch.equal(ops.lookup(indices, packed), dense[indices])
    for batch in BATCHES:
        x = (torch.arange(batch * cols, device=weight.device) % 7 - 3).reshape(batch, cols).to(weight.dtype)
        expected = x.double() @ dense.double().t()
        bias = torch.zeros(rows, device=weight.device, dtype=weight.dtype)
        error = (ops.linear(x, packed, bias).double() - expected).norm() / expected.norm()
        right &= float(error) < 0.02
    return right


def main(device: str = "cuda") -> int:
    wrong = [name for name, right in checks(device) if not right()]
    for name in wrong:
        print(f"wrong: {name}")
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
