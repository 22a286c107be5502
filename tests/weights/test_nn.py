"""SparseLinear, on the CPU and on the GPU's kernels, emulated and real."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sparseprune.kernels import backend, native, ops
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.sparse_weight import SparseWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["2:4", "bitmap", "csr"]


@pytest.fixture(autouse=True)
def place(place):
    """Every test runs everywhere; where there is a real GPU, whatever names no device is there."""
    if place.device == "cpu":
        yield place
        return
    with torch.device(place.device):
        yield place


def dense_layer(rows=24, cols=40, form="2:4", bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(cols, rows, bias=bias)
    with torch.no_grad():
        if form == "2:4":
            linear.weight.view(-1, 4)[:, 2:] = 0
        else:
            linear.weight[torch.rand(rows, cols) < 0.6] = 0
    return linear.to(dtype)


def close(actual, expected):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_layers(form, dtype, bias):
    linear = dense_layer(form=form, bias=bias, dtype=dtype)
    layer = SparseLinear.from_dense(linear, form)
    for shape in [(40,), (1, 40), (2, 3, 40), (0, 40), (33, 40)]:
        x = torch.randn(shape).to(dtype)
        close(layer(x), linear(x))
    assert torch.equal(layer.weight, linear.weight)
    assert (layer.in_features, layer.out_features, layer.dtype) == (40, 24, dtype)
    assert layer.bias is linear.bias
    assert str(layer.format) == form


def test_round_trip_to_dense():
    linear = dense_layer().eval()
    back = SparseLinear.from_dense(linear).to_dense()
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert not back.training
    assert (back.in_features, back.out_features) == (40, 24)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 40)
    with torch.no_grad():
        conv.weight[::2] = 0
        conv.bias.normal_()
    layer = SparseLinear.from_dense(conv, "2:4")
    x = torch.randn(3, 40)
    close(layer(x), conv(x))


def test_from_dense_refuses_other_modules_and_weights():
    with pytest.raises(TypeError, match="must be an nn.Linear or a transformers Conv1D, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="row 0 holds 4 in columns 0 to 3; prune it to 2:4"):
        SparseLinear.from_dense(nn.Linear(8, 8), "2:4")
    weight = SparseWeight.from_dense(torch.zeros(3, 4), "2:4")
    with pytest.raises(ValueError, match=r"bias: shape must be \(3,\) for a weight of 3 x 4, got \(4,\)"):
        SparseLinear.from_weight(weight, torch.zeros(4))


def test_the_weight_is_no_parameter_and_gradients_reach_input_and_bias():
    linear = dense_layer()
    layer = SparseLinear.from_dense(linear)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(5, 40, requires_grad=True)
    layer(x).square().sum().backward()
    sparse_grads = x.grad.clone(), layer.bias.grad.clone()
    x.grad = layer.bias.grad = None
    linear(x).square().sum().backward()
    close(sparse_grads[0], x.grad)
    close(sparse_grads[1], layer.bias.grad)


def test_state_dict_is_canonical_and_loads_into_a_zero_layer():
    layer = SparseLinear.from_dense(dense_layer())
    state = layer.state_dict()
    assert list(state) == ["weight.values", "weight.mask", "weight.spec", "bias"]
    assert state["weight.values"].shape == (24 * 20,)
    assert state["weight.mask"].shape == (24, 5)
    zero = SparseLinear(40, 24)
    assert zero(torch.ones(40)).count_nonzero() == 0
    assert zero.load_state_dict(state).missing_keys == []
    x = torch.randn(2, 40)
    assert torch.equal(zero(x), layer(x))


def test_load_state_dict_takes_the_format_over_and_casts_to_the_layers_dtype():
    linear = dense_layer(form="bitmap")
    state = SparseLinear.from_dense(linear, "bitmap").state_dict()
    layer = SparseLinear(40, 24, format="2:4", dtype=torch.bfloat16)
    layer.load_state_dict(state)
    assert (str(layer.format), layer.dtype) == ("bitmap", torch.bfloat16)
    assert torch.equal(layer.weight, linear.weight.bfloat16())
    layer.load_state_dict(state, assign=True)
    assert layer.dtype == torch.float32


def test_load_state_dict_inside_a_model_on_the_meta_device():
    model = nn.Sequential(SparseLinear.from_dense(dense_layer()), nn.ReLU())
    twin = nn.Sequential(SparseLinear(40, 24, device="meta"), nn.ReLU())
    twin.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 40)
    assert torch.equal(twin(x), model(x))


def test_load_state_dict_is_strict_and_says_what_is_wrong():
    layer = SparseLinear.from_dense(dense_layer())
    good, before = layer.state_dict(), layer.weight
    for missing in ("weight.values", "weight.mask", "weight.spec", "bias"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            layer.load_state_dict({key: value for key, value in good.items() if key != missing})
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight.scale"'):
        layer.load_state_dict({**good, "weight.scale": torch.ones(1)})
    with pytest.raises(
        RuntimeError,
        match=r"weight.values: shape must be \(480,\) for a weight of 24 x 40 whose mask keeps 480",
    ):
        layer.load_state_dict({**good, "weight.values": good["weight.values"][1:]})
    with pytest.raises(RuntimeError, match=r"weight.spec: the layer is 8 x 40, got 24 x 40"):
        SparseLinear(40, 8, bias=False).load_state_dict({k: v for k, v in good.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight.values".*\n.*Unexpected key.*"weight"'):
        layer.load_state_dict(dense_layer().state_dict())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast(form, dtype):
    linear = dense_layer(form=form)
    model = nn.Sequential(SparseLinear.from_dense(linear, form))
    model.to(dtype)
    layer = model[0]
    assert (layer.dtype, layer.bias.dtype, layer.packed.dtype) == (dtype, dtype, torch.uint8)
    assert torch.equal(layer.weight, linear.weight.to(dtype))
    assert layer(torch.randn(2, 40).to(dtype)).dtype == dtype


def test_half_and_float_and_the_dtypes_that_are_refused():
    layer = SparseLinear.from_dense(dense_layer())
    assert layer.half().dtype == torch.float16
    assert layer.float().dtype == torch.float32
    with pytest.raises(
        ValueError, match="dtype: must be float32, bfloat16 or float16 for a sparse layer, got"
    ):
        layer.double()
    assert layer(torch.randn(1, 40)).shape == (1, 24)


def test_a_cast_that_underflows_keeps_the_pattern():
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1e-20, 1.0, 0.0, 0.0]]))
    layer = SparseLinear.from_dense(linear, "bitmap").half()
    assert layer.nnz == 2
    assert layer.state_dict()["weight.values"].tolist() == [0.0, 1.0]


def test_meta_and_to_empty_never_run_on_bytes_at_random(place):
    layer = SparseLinear.from_dense(dense_layer())
    state = layer.state_dict()
    for emptied in (
        copy.deepcopy(layer).to_empty(device=place.device),
        copy.deepcopy(layer).to("meta").to_empty(device=place.device),
    ):
        with pytest.raises((RuntimeError, ValueError), match="packed"):
            emptied(torch.randn(1, 40))
        emptied.load_state_dict(state)
        assert torch.equal(emptied.weight, layer.weight)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(3, 40, device="meta")).shape == (3, 24)
    with pytest.raises(RuntimeError, match="weight: the layer is on the meta device"):
        meta.state_dict()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        meta.to(place.device)


def test_to_the_same_dtype_and_device_keeps_the_packed_tensor(place):
    layer = SparseLinear.from_dense(dense_layer())
    packed = layer.packed
    assert layer.to(torch.float32).to(place.device).packed is packed


def test_deepcopy_is_independent_and_shares_within_one_copy():
    model = nn.ModuleList([SparseLinear.from_dense(dense_layer())])
    model.append(model[0])
    twin = copy.deepcopy(model)
    assert twin[0] is twin[1]
    assert twin[0] is not model[0]
    assert twin[0].packed.data_ptr() != model[0].packed.data_ptr()
    x = torch.randn(2, 40)
    assert torch.equal(twin[0](x), model[0](x))


def test_pickles_carry_the_canonical_form():
    layer = SparseLinear.from_dense(dense_layer()).eval()
    text = pickle.dumps(layer)
    assert "packed" not in layer.__getstate__()["_buffers"]
    again = pickle.loads(text)
    x = torch.randn(2, 40)
    assert torch.equal(again(x), layer(x))
    assert (again.format, again.nbytes, again.training) == (layer.format, layer.nbytes, False)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), layer(x))
    assert pickle.loads(pickle.dumps(copy.deepcopy(layer).to("meta"))).packed.is_meta


@pytest.mark.parametrize("form", FORMATS)
def test_compile_full_graph(form):
    torch._dynamo.reset()  # it counts how often one forward() is compiled, whichever layer's
    model = nn.Sequential(SparseLinear.from_dense(dense_layer(form=form), form), nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (1, 3):
        x = torch.randn(batch, 40, requires_grad=True)
        close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert x.grad.shape == x.shape


def test_repr_says_what_matters(place):
    text = repr(SparseLinear.from_dense(dense_layer(dtype=torch.bfloat16)))
    for part in (
        "in_features=40",
        "out_features=24",
        "bias=True",
        "format=2:4",
        "sparsity=0.500",
        "dtype=bfloat16",
        "isa=" if place.device == "cpu" else "device=cuda:0",
    ):
        assert part in text
    assert f"nbytes={SparseLinear.from_dense(dense_layer(dtype=torch.bfloat16)).nbytes} (" in text


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers_with_and_without_the_dispatcher(mode, bias):
    layer = SparseLinear.from_dense(dense_layer(bias=bias))
    x = torch.randn(3, 40)
    expected = ops.linear(x, layer.packed_weight, layer.bias)
    with mode():
        assert torch.equal(layer(x), expected)


def test_tracers_and_transforms_see_the_operation():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = SparseLinear.from_dense(dense_layer())
    x = torch.randn(3, 40)
    with torch.no_grad():
        traced = make_fx(layer)(x)
        assert "sparseprune.linear" in traced.code
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (3, 24)

        seen = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Recorder():
            layer(x)
        assert "sparseprune.linear.default" in seen
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_bad_input_is_refused_on_every_path(place, mode, bias):
    layer = SparseLinear.from_dense(dense_layer(bias=bias))
    refused = "^input: (must have|dtype must be)"
    if (
        place.name == "emulated" and not bias
    ):  # a blob on a GPU does not tell its columns, and the layer is on the CPU here
        refused += "|^packed: holds no weight of 24x4[01]"
    with mode():
        for x, error in [
            (torch.randn(2, 41), ValueError),
            (torch.randn(2, 40).double(), TypeError),
            (torch.randn(2, 40).half(), (TypeError, ValueError)),
            (torch.tensor(1.0), ValueError),
            (torch.ones(2, 40, dtype=torch.int64), TypeError),
        ]:
            with pytest.raises(error, match=refused):
                layer(x)
        with pytest.raises(
            (TypeError, ValueError, NotImplementedError), match="strided|SparseCPU|SparseCUDA"
        ):
            layer(torch.ones(2, 40).to_sparse())
        layer.register_parameter("bias", nn.Parameter(torch.zeros(3)))
        with pytest.raises(ValueError, match=r"bias: must have shape \[24\], got \(3,\)"):
            layer(torch.randn(2, 40))


@pytest.mark.parametrize("bias", [True, False])
def test_a_kernel_that_fails_once_is_seen(monkeypatch, bias):
    layer = SparseLinear.from_dense(dense_layer(bias=bias))
    where = (native, "_linear_of_tensors") if backend.cpu is native else (backend.cpu, "linear")
    calls, kernel = [], getattr(*where)

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("no memory for a panel")
        return kernel(*arguments)

    monkeypatch.setattr(*where, fails_once)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no memory for a panel"):
        layer(torch.randn(2, 40))
    assert len(calls) == 1


def test_autocast_over_a_float32_layer_blames_the_input():
    layer = SparseLinear.from_dense(dense_layer())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.nn.functional.linear(torch.randn(2, 8), torch.randn(40, 8))
        with pytest.raises(
            TypeError, match="input: dtype must be the weight's torch.float32, got torch.bfloat16"
        ):
            layer(x)
