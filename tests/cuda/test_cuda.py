"""What the package says and does about GPUs wherever it is: what is missing, which tensors go together, which op serves them."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.backends import GPUS, Fault, emulated, running
from helpers.shapes import sparse_layer
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseprune as sp
from sparseprune.kernels import _core, backend, cuda, native, ops
from sparseprune.kernels.packing import Packed, packing_code


def test_both_backends_have_the_same_functions():
    for name, function in inspect.getmembers(backend.Backend, inspect.isfunction):
        if name.startswith("__"):
            continue
        wanted = list(inspect.signature(function).parameters)[1:]
        for module in (native, cuda):
            found = list(inspect.signature(getattr(module, name)).parameters)
            assert found[: len(wanted)] == wanted, f"{module.__name__}.{name}"


def test_info_says_what_there_is():
    info = sp.cuda_info()
    assert set(info) == {"built", "toolkit", "targets", "missing", "devices"}
    assert info["built"] == hasattr(_core, "cuda")
    assert bool(info["targets"]) == bool(info["toolkit"]) == info["built"]
    assert bool(info["missing"]) == ("cuda" not in GPUS)
    assert len(info["devices"]) == torch.cuda.device_count()


def test_a_build_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_kernels", cuda._NotBuilt())
    assert "this build of sparseprune has no CUDA kernels; install a wheel that has them" in cuda.missing()
    x = torch.ones(2, 8)
    for call in (
        lambda: cuda.mask_bytes(x, x != 0),
        lambda: cuda.scan(x),
        lambda: cuda.linear(
            x, torch.zeros(2053, dtype=torch.uint8), None, 4, 8, packing_code("bitmap8", x.dtype)
        ),
        lambda: cuda.configs(packing_code("bitmap8", torch.float32)),
    ):
        with pytest.raises(
            RuntimeError, match="CUDA: this build of sparseprune has no CUDA kernels; .* on the CPU"
        ):
            call()


def test_a_build_with_kernels_says_which_driver_or_gpu_is_missing():
    """Of a machine without a GPU, on which a call must say so and the CPU's kernels run; of one with, nothing is missing."""
    if "cuda" in GPUS:
        assert cuda.missing() == ""
    elif hasattr(_core, "cuda"):
        assert "driver" in _core.cuda.missing() or "GPU" in _core.cuda.missing()
        with pytest.raises(RuntimeError, match="(driver|GPU).* keep the model on the CPU"):
            _core.cuda.mask_bytes(0, 0, 0, 0, 0, 1, 0)
    else:
        assert "no CUDA kernels" in cuda.missing()


def test_the_fake_path_serves_cuda_tensors_without_a_gpu():
    with FakeTensorMode():
        x = torch.empty(3, 36, dtype=torch.float16, device="cuda")
        bits = torch.empty(20, 5, dtype=torch.uint8, device="cuda")
        values = torch.empty(360, dtype=torch.float16, device="cuda")
        packing = packing_code("sparse24", torch.float16)
        packed = Packed(torch.empty(2401, dtype=torch.uint8, device="cuda"), 20, 36, packing)
        out = ops.linear(x, packed)
        assert (out.shape, out.device.type, out.dtype) == ((3, 20), "cuda", torch.float16)
        assert ops.pack_mask(x != 0).device.type == "cuda"
        with pytest.raises(
            ValueError, match=r"layout: must be one of \['sparse24', 'bitmap8'\] on cuda:0, got 'tile'"
        ):
            ops.pack(values, bits, 36, "tile")
        with pytest.raises(ValueError, match=r"packed: must lie on input's device cuda:0, got cpu; move it"):
            ops.linear(x, packed._replace(blob=torch.empty(2401, dtype=torch.uint8, device="cpu")))
        with pytest.raises(ValueError, match=r"bits: must lie on values's device cuda:0, got cpu"):
            ops.bitmap_to_dense(values, torch.empty(20, 5, dtype=torch.uint8, device="cpu"), 36)


def test_the_emulator_sees_what_the_bindings_are_given():
    """That the tests' own plumbing works: a range that is too short, or must not be written to, is a fault."""
    x, bits = torch.ones(40, 128), torch.ones(40, 16, dtype=torch.uint8)
    with emulated():
        for call, message in [
            (lambda: cuda.mask_bits(x, bits[:39], x), "out of bounds"),
            (lambda: cuda.mask_bits(x, bits, x[:39].clone()), "out of bounds"),
            (
                lambda: cuda.expand(torch.ones(5), bits, torch.arange(0, 41 * 128, 128), 128),
                "out of bounds",
            ),
        ]:
            with pytest.raises(Fault, match=message):
                call()
        source = cuda._source
        cuda._target, target = source, cuda._target
        try:
            with pytest.raises(Fault, match="writ|read-only"):
                cuda.mask_bits(x, bits)
        finally:
            cuda._target = target


def test_layers_on_a_real_gpu():
    """Moves, captures, compiles; all else that a real GPU does is in the tests that run everywhere."""
    if "cuda" not in GPUS:
        pytest.skip(f"no GPU: torch.cuda.is_available() is {torch.cuda.is_available()}; {cuda.missing()}")
    for form, encoding in (
        ("2:4", "plain"),
        ("bitmap", "plain"),
        ("dense", "int8"),
        ("dense", "int4_minimum"),
        ("2:4", "int4"),
    ):
        w, bias, _, _ = sparse_layer(torch.bfloat16, 200, 328)
        linear = torch.nn.Linear(328, 200).bfloat16()
        linear.load_state_dict({"weight": w, "bias": bias})
        layer = sp.SparseLinear.from_dense(linear, form, encoding)
        x = torch.randn(5, 328).bfloat16()
        expected = layer(x)
        layer.to("cuda")
        there = x.cuda()
        rounded = 0.0 if encoding == "plain" else 0.3  # activations, to int8, on the CPU
        torch.testing.assert_close(layer(there).cpu(), expected, rtol=0.02, atol=0.02 + rounded)
        with pytest.raises(ValueError, match="input"):
            layer(x)
        with torch.no_grad():
            eager = layer(there)
            for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    assert torch.equal(layer(there), eager)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(there)
            there.copy_(torch.ones_like(there))
            graph.replay()
            assert torch.equal(captured, layer(there))
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(there), captured)
        back = layer.to("cpu")
        assert torch.equal(back(x), expected)


@pytest.mark.parametrize("there", GPUS)
def test_layers_of_a_cpu_and_of_a_gpu_hold_the_same_weight(there):
    for dtype in (torch.float32, torch.float16):
        w = sparse_layer(dtype)[0]
        for form in ("2:4", "bitmap", "csr"):
            with running("cpu"):
                layer = sp.SparseLinear.from_weight(sp.SparseWeight.from_dense(w, form))
                weight = layer.sparse_weight()
            with running(there) as place:
                moved = sp.SparseLinear.from_weight(weight.to(device=place.device))
                layout = "sparse24" if form == "2:4" and dtype == torch.float16 else "bitmap8"
                assert moved.packed_weight.layout == layout
                again = moved.sparse_weight().to(device="cpu")
            assert (again.format, again.shape) == (weight.format, weight.shape)
            assert torch.equal(again.mask, weight.mask) and torch.equal(again.values, weight.values)
            with running("cpu"):
                assert torch.equal(again.pack().blob, layer.packed)
