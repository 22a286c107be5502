"""What torch asks of an operation, on the CPU and on the GPU's kernels, emulated and real: opcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch
from helpers import reference
from helpers.backends import Place
from helpers.codes import random_codes
from helpers.compare import assert_same_bits
from helpers.shapes import generator, mask, packed_layer

from sparseprune.kernels import ops, rounding  # noqa: F401 (its operations)


def assert_tuples(actual, expected) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e.cpu(), f"result {i}")


OPERATIONS = (
    "mask_apply", "mask_apply_", "mask_apply_packed", "mask_apply_packed_", "threshold_mask_", "pack_mask",
    "unpack_mask", "dense_to_bitmap", "dense_to_nm", "bitmap_to_dense", "dense_to_csr", "csr_to_dense", "pack",
    "unpack", "linear", "linear_grad_input", "lookup", "round_through", "round_through_gradients",
)  # fmt: skip


def op_arguments(place: Place) -> dict[str, list[tuple]]:
    """Arguments for each operation of the namespace."""
    x, keep = torch.randn(5, 12), torch.rand(5, 12) < 0.5
    bits, dense = reference.pack_mask(keep), torch.randn(5, 12) * mask(5, 12, "2:4", generator(17))
    values, value_bits = map(place.put, reference.dense_to_bitmap(dense))
    crow, col, csr_values = map(place.put, reference.dense_to_csr(dense))
    x, keep, bits, dense = map(place.put, (x, keep, bits, dense))
    _, bias, packed = packed_layer(layout=place.layouts[-1], put=place.put)
    blob, *how = packed
    a = place.put(torch.randn(3, 36))
    codes = random_codes(("quads", "int4"), 20, 36, 32).pack(torch.bfloat16, place.put)
    rounded = (torch.randn(5, 70), torch.rand(5, 3) + 0.1, torch.randn(5, 3), torch.rand(5, 70) < 0.5)
    return {
        "mask_apply": [(x, keep), (x.t(), keep.t()), (x.half(), keep)],
        "mask_apply_": [(x.clone(), keep)],
        "mask_apply_packed": [(x, bits), (x.bfloat16(), bits)],
        "mask_apply_packed_": [(x.clone(), bits)],
        "threshold_mask_": [(x.clone(), 0.5)],
        "pack_mask": [(keep,)],
        "unpack_mask": [(bits, 12)],
        "dense_to_bitmap": [(dense,)],
        "dense_to_nm": [(dense, 2, 4)],
        "bitmap_to_dense": [(values, value_bits, 12)],
        "dense_to_csr": [(dense,)],
        "csr_to_dense": [(crow, col, csr_values, 12)],
        "pack": [
            (values if layout != "sparse24" else values.half(), value_bits, 12, layout)
            for layout in place.layouts
        ],
        "unpack": [tuple(packed)],
        "linear": [
            (a, blob, None, *how),
            (a.requires_grad_(), blob, bias.requires_grad_(), *how),
            (place.put(torch.randn(2, 3, 36)), blob, bias.detach(), *how),
            (place.put(torch.randn(36)), blob, None, *how),
        ],
        "lookup": [
            (place.put(ids), *codes)
            for ids in (torch.tensor([[3, 0], [19, 3]]), torch.tensor(5, dtype=torch.int32))
        ],
        "round_through": [(*rounded, 32, "int4_minimum", torch.bfloat16)],
        "round_through_gradients": [(torch.randn(5, 70), *rounded, 32, "int4_minimum")],
        "linear_grad_input": [(place.put(torch.randn(3, 20)), *packed)],
    }


def test_every_operation_of_the_namespace_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in names if name.startswith("sparseprune::")}
    assert ours == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(place, name):
    for args in op_arguments(place)[name]:
        torch.library.opcheck(getattr(torch.ops.sparseprune, name).default, args)


@pytest.fixture
def compiled():
    """torch.compile without the C++ compiler: capture, fake tensors, functionalization and autograd are what matters."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_compile_linear(place, compiled):
    _, bias, blob = packed_layer(layout=place.layouts[-1], put=place.put)

    def layer(x, b):
        return torch.relu(ops.linear(x, blob, b)) * 2

    fast = compiled(layer)
    for shape in [(4, 36), (9, 36), (2, 5, 36)]:
        x, b = place.put(torch.randn(shape)).requires_grad_(), bias.clone().requires_grad_()
        fast(x, b).sum().backward()
        x2, b2 = x.detach().clone().requires_grad_(), bias.clone().requires_grad_()
        out = layer(x2, b2)
        out.sum().backward()
        assert_same_bits(fast(x, b), out.cpu())
        assert_same_bits(x.grad, x2.grad.cpu())
        assert_same_bits(b.grad, b2.grad.cpu())


def test_compile_masks(place, compiled):
    x, keep = place.put(torch.randn(6, 20)), place.put(torch.rand(6, 20) < 0.5)

    def f(x, keep):
        bits = ops.pack_mask(keep)
        y = x.clone()
        ops.mask_apply_packed_(y, bits)
        z = x.clone()
        ops.mask_apply_(z, ops.unpack_mask(bits, 20))
        t = x.clone()
        kept = ops.threshold_mask_(t, 0.5)
        return y, z, ops.mask_apply(x, keep), ops.mask_apply_packed(x, bits), t, kept

    assert_tuples(compiled(f)(x, keep), f(x, keep))


def test_compile_formats(place, compiled):
    dense = place.put(torch.randn(6, 20) * mask(6, 20, "2:4", generator(18)))

    def f(dense):
        values, bits = ops.dense_to_bitmap(dense)
        nm_values, nm_bits = ops.dense_to_nm(dense, 2, 4)
        crow, col, csr_values = ops.dense_to_csr(dense)
        return (
            ops.bitmap_to_dense(values, bits, 20),
            ops.bitmap_to_dense(nm_values, nm_bits, 20),
            ops.csr_to_dense(crow, col, csr_values, 20),
        )

    assert_tuples(compiled(f)(dense), f(dense))
