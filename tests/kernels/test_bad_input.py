"""Bad input of the operations: each error names the argument, the rule, the value and the remedy; no damaged header of
a packed weight gets past its checks.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import reference
from helpers.backends import running
from helpers.compare import assert_same_bits
from helpers.isa import DTYPES
from helpers.shapes import packed_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.kernels import backend, ops
from sparseprune.kernels.packing import Packed, packing_code

LAYOUTS = ("tile", "csr")


def any_layout() -> str:
    """One that the backend in force has."""
    return list(backend.cpu.LAYOUTS)[-1]


X = torch.ones(3, 12)
KEEP = torch.ones(3, 12, dtype=torch.bool)
BITS = reference.pack_mask(KEEP)
VALUES = torch.ones(36)
CROW, COL = torch.tensor([0, 12, 24, 36]), torch.arange(12, dtype=torch.int32).repeat(3)
PACKED = ops.pack(VALUES, BITS, 12, "tile")
BLOB = PACKED.blob
PADDED = torch.tensor([[0xFF, 0x1F]] * 3, dtype=torch.uint8)

ERRORS = {
    "mask dtype": (lambda: ops.mask_apply(X, KEEP.int()), TypeError, r"mask: must be bool, got torch\.int32"),
    "mask shape": (
        lambda: ops.mask_apply(X, KEEP[:2]),
        ValueError,
        r"mask: .*shape \(3, 12\), got \(2, 12\)",
    ),
    "mask input dtype": (
        lambda: ops.mask_apply(X.double(), KEEP),
        TypeError,
        r"input: must be float32, bfloat16 or float16, got torch\.float64; convert it with \.to",
    ),
    "in place strides": (
        lambda: ops.mask_apply_(torch.ones(12, 3).t(), KEEP),
        ValueError,
        r"input: must be contiguous .* got strides \(1, 3\); use the out-of-place operation",
    ),
    "in place mask": (lambda: ops.mask_apply_(X, KEEP.float()), TypeError, "mask: must be bool"),
    "packed in place strides": (
        lambda: ops.mask_apply_packed_(torch.ones(3, 24)[:, ::2], BITS),
        ValueError,
        "input: must be contiguous",
    ),
    "threshold strides": (lambda: ops.threshold_mask_(X.t(), 1.0), ValueError, "input: must be contiguous"),
    "threshold negative": (
        lambda: ops.threshold_mask_(X, -1.0),
        ValueError,
        "threshold: .* at least 0, got -1.0",
    ),
    "threshold nan": (lambda: ops.threshold_mask_(X, math.nan), ValueError, "threshold: .*, got nan"),
    "threshold dims": (
        lambda: ops.threshold_mask_(X[0], 1.0),
        ValueError,
        r"input: must be a matrix .*\(12,\)",
    ),
    "packed dims": (lambda: ops.mask_apply_packed(X[0], BITS), ValueError, r"input: must be a matrix"),
    "packed bits shape": (
        lambda: ops.mask_apply_packed(X, BITS[:, :1]),
        ValueError,
        r"bits: must have shape \[3, 2\] for 12 columns, got \(3, 1\); make it with pack_mask",
    ),
    "packed bits dtype": (
        lambda: ops.mask_apply_packed(X, KEEP),
        TypeError,
        r"bits: must be uint8, got torch\.bool",
    ),
    "pack_mask dtype": (lambda: ops.pack_mask(X), TypeError, r"mask: must be bool, got torch\.float32"),
    "pack_mask dims": (lambda: ops.pack_mask(KEEP[0]), ValueError, r"mask: must be a matrix .* \(12,\)"),
    "unpack_mask cols": (
        lambda: ops.unpack_mask(BITS, 17),
        ValueError,
        r"bits: .*\[rows, 3\] for 17 columns",
    ),
    "unpack_mask negative": (
        lambda: ops.unpack_mask(BITS, -1),
        ValueError,
        "cols: must not be negative, got -1",
    ),
    "bitmap dims": (lambda: ops.dense_to_bitmap(X[0]), ValueError, "dense: must be a matrix"),
    "bitmap dtype": (lambda: ops.dense_to_bitmap(X.int()), TypeError, r"dense: .* got torch\.int32"),
    "nm range": (
        lambda: ops.dense_to_nm(X, 5, 4),
        ValueError,
        r"n, m: .*1 <= n <= m <= 32, got 5:4; use the bitmap",
    ),
    "nm zero": (lambda: ops.dense_to_nm(X, 0, 4), ValueError, "n, m: .*got 0:4"),
    "nm too wide": (lambda: ops.dense_to_nm(X, 1, 33), ValueError, "n, m: .*got 1:33"),
    "nm columns": (
        lambda: ops.dense_to_nm(X, 4, 8),
        ValueError,
        "dense: columns must be a multiple of 8 for 4:8, got 12; pad them or use the bitmap format",
    ),
    "nm full": (
        lambda: ops.dense_to_nm(
            torch.tensor([[0.0] * 12, [0, 1, 1, 0, 0, 0, 2, 0, 3, 0, math.nan, 4]]), 2, 4
        ),
        ValueError,
        r"dense: must hold at most 2 .* row 1 holds 3 in columns 8 to 11; prune it to 2:4 or use the bitmap",
    ),
    "values count": (
        lambda: ops.bitmap_to_dense(VALUES[1:], BITS, 12),
        ValueError,
        "values: must hold one value for each of the 36 bits set, got 35",
    ),
    "values dims": (
        lambda: ops.bitmap_to_dense(X, BITS, 12),
        ValueError,
        r"values: must have one dimension.*\(3, 12\)",
    ),
    "values dtype": (
        lambda: ops.bitmap_to_dense(VALUES.long(), BITS, 12),
        TypeError,
        "values: must be float32",
    ),
    "padding bits": (
        lambda: ops.bitmap_to_dense(torch.ones(39), PADDED, 12),
        ValueError,
        "bits: the bits past column 12 must be zero, row 0 has one set",
    ),
    "pack padding bits": (
        lambda: ops.pack(torch.ones(39), PADDED, 12, any_layout()),
        ValueError,
        "bits past column 12",
    ),
    "pack values count": (
        lambda: ops.pack(torch.ones(37), BITS, 12, any_layout()),
        ValueError,
        "36 bits set, got 37",
    ),
    "pack layout": (
        lambda: ops.pack(VALUES, BITS, 12, "coo"),
        ValueError,
        r"layout: must be one of \['tile', 'csr'\] on cpu, got 'coo'",
    ),
    "csr dims": (lambda: ops.dense_to_csr(X[0]), ValueError, "dense: must be a matrix"),
    "crow dtype": (
        lambda: ops.csr_to_dense(CROW.int(), COL, VALUES, 12),
        TypeError,
        "crow: must be torch.int64",
    ),
    "crow empty": (lambda: ops.csr_to_dense(CROW[:0], COL, VALUES, 12), ValueError, "crow: must have rows"),
    "crow end": (
        lambda: ops.csr_to_dense(CROW[:3], COL, VALUES, 12),
        ValueError,
        "crow: must run from 0 to the number of values 36, got 0 to 24",
    ),
    "crow start": (lambda: ops.csr_to_dense(CROW + 1, COL, VALUES, 12), ValueError, "got 1 to 37"),
    "crow falls": (
        lambda: ops.csr_to_dense(torch.tensor([0, 24, 12, 36]), COL, VALUES, 12),
        ValueError,
        "crow: must not decrease, but falls from 24 to 12 at row 1",
    ),
    "crow far": (
        lambda: ops.csr_to_dense(torch.tensor([0, 2**62, -(2**62), 36]), COL, VALUES, 12),
        ValueError,
        "crow: must not decrease",
    ),
    "col dtype": (
        lambda: ops.csr_to_dense(CROW, COL.long(), VALUES, 12),
        TypeError,
        "col: must be torch.int32",
    ),
    "col length": (
        lambda: ops.csr_to_dense(CROW, COL[1:], VALUES, 12),
        ValueError,
        r"col: .* values \(36\), got 35",
    ),
    "col range": (
        lambda: ops.csr_to_dense(CROW, COL, VALUES, 11),
        ValueError,
        r"col: must be ascending within a row and in \[0, 11\), got 11 at position 11",
    ),
    "col negative": (
        lambda: ops.csr_to_dense(torch.tensor([0, 1]), COL[:1] - 1, VALUES[:1], 12),
        ValueError,
        r"col: .*got -1 at position 0",
    ),
    "col twice": (
        lambda: ops.csr_to_dense(torch.tensor([0, 2]), COL[[3, 3]], VALUES[:2], 12),
        ValueError,
        "col: .*got 3 at position 1",
    ),
    "csr cols": (
        lambda: ops.csr_to_dense(CROW, COL, VALUES, -1),
        ValueError,
        r"cols: must be in \[0, 2\^31\), got -1",
    ),
    "unpack dtype": (
        lambda: ops.unpack(PACKED._replace(blob=X[0])),
        TypeError,
        r"packed: must be torch\.uint8, got torch\.float32",
    ),
    "unpack dims": (
        lambda: ops.unpack(PACKED._replace(blob=BITS)),
        ValueError,
        "packed: must have one dimension",
    ),
    "unpack strides": (
        lambda: ops.unpack(PACKED._replace(blob=BLOB[::2])),
        ValueError,
        "packed: must be contiguous",
    ),
    "unpack other dtype": (
        lambda: ops.unpack(PACKED._replace(packing=packing_code("tile", torch.float16))),
        ValueError,
        r"packed: holds a weight of 3x12 float32 in layout tile, the call is for 3x12 float16 in layout tile",
    ),
    "unpack no packing": (
        lambda: ops.unpack(PACKED._replace(packing=0xFFFF)),
        ValueError,
        r"packing: must be a number that packing.* gives, got 65535",
    ),
    "linear scalar": (
        lambda: ops.linear(torch.tensor(1.0), PACKED),
        ValueError,
        "input: .* got a scalar",
    ),
    "linear dtype": (
        lambda: ops.linear(X.double(), PACKED),
        TypeError,
        r"input: .* got torch\.float64",
    ),
    "linear other dtype": (
        lambda: ops.linear(X.half(), PACKED),
        TypeError,
        "input: dtype must be the weight's torch.float32, got torch.float16; cast the input",
    ),
    "linear cols": (
        lambda: ops.linear(X[:, :11], PACKED),
        ValueError,
        r"input: must have 12 columns .*, got shape \(3, 11\); check the layer before",
    ),
    "linear rows": (
        lambda: ops.linear(X, PACKED._replace(rows=4)),
        ValueError,
        r"packed: holds a weight of 3x12 float32 in layout tile, the call is for 4x12 float32",
    ),
    "linear bias dtype": (
        lambda: ops.linear(X, PACKED, torch.ones(3).half()),
        TypeError,
        r"bias: must have the input's dtype torch\.float32, got torch\.float16",
    ),
    "linear bias shape": (
        lambda: ops.linear(X, PACKED, torch.ones(4)),
        ValueError,
        r"bias: must have shape \[3\], got \(4,\)",
    ),
    "linear blob dtype": (
        lambda: ops.linear(X, PACKED._replace(blob=BLOB.int())),
        TypeError,
        r"packed: must be torch\.uint8",
    ),
    "linear blob strides": (
        lambda: ops.linear(X, PACKED._replace(blob=BLOB[::2])),
        ValueError,
        "packed: must be contiguous",
    ),
    "grad cols": (
        lambda: torch.ops.sparseprune.linear_grad_input(torch.ones(2, 3), BLOB, 3, 10**6, PACKED.packing),
        ValueError,
        r"packed: holds a weight of 3x12 float32 in layout tile, the call is for 3x1000000",
    ),
    "grad scalar": (
        lambda: torch.ops.sparseprune.linear_grad_input(torch.tensor(1.0), *PACKED),
        ValueError,
        "grad: .* got a scalar",
    ),
    "other device": (
        lambda: ops.mask_apply(X, KEEP.to("meta")),
        ValueError,
        r"mask: must lie on input's device cpu, got meta; move it with .to\(device\)",
    ),
    "linear other device": (
        lambda: ops.linear(X, PACKED, torch.ones(3, device="meta")),
        ValueError,
        "bias: must lie on input's device cpu, got meta",
    ),
    "pack layout of the GPU": (
        lambda: ops.pack(VALUES, BITS, 12, "bitmap8"),
        ValueError,
        r"layout: must be one of \['tile', 'csr'\] on cpu, got 'bitmap8'",
    ),
    "grad rows": (
        lambda: torch.ops.sparseprune.linear_grad_input(torch.ones(2, 4), *PACKED),
        ValueError,
        r"grad: must have 3 columns .*, got shape \(2, 4\)",
    ),
    "grad dtype": (
        lambda: torch.ops.sparseprune.linear_grad_input(torch.ones(2, 3).half(), *PACKED),
        TypeError,
        "grad: dtype must be the weight's torch.float32, got torch.float16",
    ),
}


# Packed weights are another matter on a GPU: test_linear_cuda.py.
OF_CPU = ("linear", "grad", "unpack ", "pack layout")


@pytest.mark.parametrize(
    ("place", "name"),
    [("cpu", name) for name in ERRORS]
    + [("emulated", name) for name in ERRORS if not name.startswith(OF_CPU)],
)
def test_error(place, name):
    call, kind, message = ERRORS[name]
    with running(place), pytest.raises(kind, match=message):
        call()


def test_errors_are_the_same_for_shapes_alone():
    """The checks of the fake path are those of the real one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, keep = mode.from_tensor(X), mode.from_tensor(KEEP)
        with pytest.raises(ValueError, match=r"mask: must have the input's shape \(3, 12\), got \(2, 12\)"):
            ops.mask_apply(x, keep[:2])
        with pytest.raises(ValueError, match="dense: columns must be a multiple of 8 for 4:8, got 12"):
            ops.dense_to_nm(x, 4, 8)
        with pytest.raises(ValueError, match="input: must be contiguous"):
            ops.mask_apply_(x.t(), keep.t())


def test_a_failed_in_place_operation_changes_nothing():
    x = torch.randn(3, 12)
    before = x.clone()
    for call in (
        lambda: ops.mask_apply_(x, KEEP[:2]),
        lambda: ops.mask_apply_packed_(x, BITS[:2]),
        lambda: ops.threshold_mask_(x, -1.0),
    ):
        with pytest.raises(ValueError, match="must"):
            call()
    assert_same_bits(x, before)


# --- damaged blobs ----------------------------------------------------------------------------------------------------

READERS = {
    "unpack": ops.unpack,
    "linear": lambda it: ops.linear(torch.ones(2, it.cols, dtype=it.dtype), it),
    "gradient": lambda it: torch.ops.sparseprune.linear_grad_input(
        torch.ones(2, it.rows, dtype=it.dtype), *it
    ),
}
HEADER = 64


def assert_refused(packed: Packed) -> None:
    for read in READERS.values():
        with pytest.raises(ValueError, match="packed: "):
            read(packed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_of_a_header_is_found(layout, dtype):
    for rows, cols in [(16, 32), (1, 64), (20, 36)]:
        good = packed_layer(dtype, rows, cols, layout)[2]
        for bit in range(8 * HEADER):
            blob = good.blob.clone()
            blob[bit // 8] ^= 1 << bit % 8
            assert_refused(good._replace(blob=blob))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_and_extended_blobs_are_refused(layout):
    packed = packed_layer(layout=layout)[2]
    good = packed.blob
    for size in [0, 1, 8, 63, 64, 65, 128, len(good) // 2, len(good) - 64, len(good) - 1]:
        assert_refused(packed._replace(blob=good[:size].clone()))
    assert_refused(packed._replace(blob=torch.cat([good, good[:1]])))
    with pytest.raises(
        ValueError, match="must hold a header of 64 bytes, got 63 bytes; make packed weights with ops.pack"
    ):
        ops.unpack(packed._replace(blob=good[:63].clone()))
    with pytest.raises(
        ValueError, match="does not fit the size of 100 bytes; the weight is damaged, pack it again"
    ):
        ops.unpack(packed._replace(blob=good[:100].clone()))


def test_foreign_bytes_are_refused():
    packed = packed_layer()[2]
    assert_refused(packed._replace(blob=torch.zeros(1000, dtype=torch.uint8)))
    assert_refused(packed._replace(blob=torch.randint(0, 256, (1000,), dtype=torch.uint8)))
    text = torch.tensor(list(b'{"metadata": "safetensors"}' * 10), dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="not a packed weight of version 1; make packed weights with ops.pack"
    ):
        ops.unpack(packed._replace(blob=text))


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=12),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(16, 32), (1, 64), (20, 36), (3, 4)]),
)
def test_any_bytes_in_a_header_are_refused(edits, layout, dtype, shape):
    good = packed_layer(dtype, *shape, layout)[2]
    blob = good.blob.clone()
    for at, value in edits:
        blob[at] = value
    if not torch.equal(blob, good.blob):
        assert_refused(good._replace(blob=blob))
