"""`native.plain_linear`: what C++ reads without Python gives the same bits, and what is not plain it leaves alone."""

from __future__ import annotations

import pytest
import torch
from helpers.isa import DTYPES
from helpers.shapes import generator, packed_layer

from sparseprune.kernels import native


def layer(dtype=torch.bfloat16):
    _, bias, blob = packed_layer(dtype, 48, 64)
    return blob, bias


def test_it_is_there_where_torch_has_the_exchange():
    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__") == native.READS_TENSORS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (0, 64), (1, 1, 64), (2, 1, 3, 64)])
@pytest.mark.parametrize("wrapped", [lambda bias: None, lambda bias: bias, torch.nn.Parameter])
def test_same_bits(dtype, shape, wrapped, monkeypatch):
    blob, bias = layer(dtype)
    x = torch.randn(shape, generator=generator(3)).to(dtype)
    arguments = x, blob.blob, wrapped(bias), *blob[1:]
    made = native.plain_linear(*arguments)
    assert (made is None) != native.READS_TENSORS
    monkeypatch.setattr(native, "_linear_of_tensors", lambda *_: None)
    expected = native.linear(*arguments)
    assert made is None or (made.dtype, made.shape) == (dtype, expected.shape)
    assert made is None or torch.equal(made, expected)


def test_what_is_not_plain_is_left_alone():
    blob, bias = layer()
    x, packed, how = torch.randn(4, 64).bfloat16(), blob.blob, blob[1:]
    for wrong in (
        (x.float(), packed, None),
        (x[:, :63], packed, None),
        (torch.randn(4, 128).bfloat16()[:, ::2], packed, None),
        (torch.nn.Parameter(x), packed, None),
        (x.to("meta"), packed, None),
        (torch.tensor(1.0).bfloat16(), packed, None),
        (x.to_sparse(), packed, None),
        (x, packed.view(torch.int8), None),
        (x, packed[None], None),
        (x, packed, bias.float()),
        (x, packed, bias[:47]),
        (x, packed, torch.cat([bias, bias])[::2]),
        ([1.0], packed, None),
    ):
        assert native.plain_linear(*wrong, *how) is None


def test_a_foreign_blob_is_refused():
    blob, _ = layer()
    x = torch.randn(4, 64).bfloat16()
    with pytest.raises(ValueError, match="packed"):
        native.linear(x, blob.blob, None, 49, 64, blob.packing)
    with pytest.raises(ValueError, match="packed"):
        native.linear(x, blob.blob[:32], None, *blob[1:])
