import copy
import weakref

import pytest
import torch
from torch import nn

from sparseprune import convert
from sparseprune.convert import sparsify
from sparseprune.measure.benchmark import LayerTiming, alternating_quartiles, time_layer
from sparseprune.weights.format import Format
from sparseprune.weights.linear import SparseLinear


def keep(linear, pattern):
    """Zeroes what the pattern does not keep: "2:4", or a fraction to keep."""
    weight = linear.weight.detach()
    if isinstance(pattern, float):
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) >= pattern] = 0
    else:
        n, m = map(int, pattern.split(":"))
        weight.view(-1, m)[:, n:] = 0
    return linear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 32)
        self.two = keep(nn.Linear(32, 64), "2:4")
        self.some = keep(nn.Linear(64, 64, bias=False), 0.5)
        self.tenth = keep(nn.Linear(64, 128, bias=False), 0.1)
        self.full = nn.Linear(128, 32)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.full(self.tenth(self.some(self.two(self.embed(ids))).relu())))


def by_name(report):
    return {layer.name: layer for layer in report.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_always_swaps_what_is_sparse_and_keeps_the_function(dtype):
    model = Net().to(dtype)
    dense = copy.deepcopy(model)
    report = sparsify(model, policy="always")
    layers = by_name(report)
    assert {name: layer.format for name, layer in layers.items()} == {
        "two": "2:4", "some": "bitmap", "tenth": layers["tenth"].format, "full": None,
    }  # fmt: skip
    assert layers["tenth"].format in ("bitmap", "csr")
    assert "too few zeros (0.0%)" in layers["full"].reason
    assert type(model.full) is nn.Linear
    assert model.head.weight is model.embed.weight
    assert not any(layer.speedups for layer in report.layers)
    ids = torch.arange(11)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(model(ids), dense(ids), rtol=tolerance, atol=tolerance)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        weight = dense.get_submodule(layer.name).weight
        assert layer.bytes_before == weight.nbytes
        assert layer.bytes_after == (module.nbytes if layer.format else weight.nbytes)
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()))
    assert (report.swapped, report.policy, report.batches) == (3, "always", (1,))


def test_always_takes_the_smallest():
    model = nn.Sequential(
        keep(nn.Linear(4096, 32, bias=False), 0.004), keep(nn.Linear(4096, 32, bias=False), 0.3)
    )
    report = sparsify(model, policy="always")
    assert [layer.format for layer in report.layers] == ["csr", "bitmap"]
    assert report.layers[0].reason.startswith("no pattern found in the weights; smallest (bitmap ")
    for module, other in zip(model, ("bitmap", "csr"), strict=True):
        assert module.nbytes < SparseLinear.from_dense(module.to_dense(), other).nbytes


@pytest.mark.parametrize("form", ["2:4", "bitmap", "csr"])
def test_an_explicit_format_is_used_or_the_reason_given(form):
    model = Net()
    report = sparsify(model, format=form, policy="always")
    layers = by_name(report)
    if form == "2:4":
        assert layers["two"].format == "2:4"
        assert layers["some"].format is None
        assert "2:4 was asked for and does not fit (row 0, group " in layers["some"].reason
    else:
        assert {layer.format for layer in report.layers} == {form}


def test_a_dense_layer_is_gone_before_the_next_is_converted(monkeypatch):
    model = nn.Sequential(*(keep(nn.Linear(16, 16), "2:4") for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive = []
    from_dense = SparseLinear.from_dense

    def counted(linear, form):
        alive.append(sum(weight() is not None for weight in dense))
        return from_dense(linear, form)

    monkeypatch.setattr(SparseLinear, "from_dense", counted)
    sparsify(model, policy="always")
    assert alive == [4, 3, 2, 1]
    assert not any(weight() for weight in dense)


def test_only_the_layers_asked_for():
    model = Net()
    report = sparsify(model, policy="always", include="t*", exclude="tenth")
    assert [layer.name for layer in report.layers] == ["two"]
    assert type(model.tenth) is nn.Linear


def test_shared_weights_stay_dense_and_a_shared_module_is_swapped_everywhere():
    model = nn.ModuleDict({"a": keep(nn.Linear(16, 16), "2:4"), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    report = sparsify(model, policy="always")
    assert by_name(report)["a"].reason == "weight shared with b"
    assert model["a"].weight is model["b"].weight
    model = nn.ModuleDict({"a": keep(nn.Linear(16, 16), "2:4")})
    model["again"] = model["a"]
    assert sparsify(model, policy="always").swapped == 1
    assert model["again"] is model["a"]
    assert isinstance(model["a"], SparseLinear)


def test_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).eval()
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            with torch.no_grad():
                module.weight[::2] = 0
            assert name.startswith("transformer.h.0")
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    report = sparsify(model, policy="always")
    assert {layer.format for layer in report.layers} == {"2:4"}
    assert report.swapped == 4
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def fake_timings(monkeypatch, ratios):
    """Makes the machine report these dense / sparse ratios: {format: {batch: ratio}}."""
    asked = []

    def timings(linear, formats, batches, **options):
        asked.append((tuple(linear.weight.shape), tuple(map(str, formats))))
        return [
            LayerTiming(batch, 1.0, {str(form): 1 / ratios[str(form)][batch] for form in formats})
            for batch in batches
        ]

    monkeypatch.setattr(convert, "time_layer", timings)
    return asked


def test_auto_keeps_dense_where_dense_wins_at_any_batch(monkeypatch):
    ratios = {"2:4": {1: 3.0, 8: 0.9}, "bitmap": {1: 2.0, 8: 1.5}, "csr": {1: 1.1, 8: 1.2}}
    asked = fake_timings(monkeypatch, ratios)
    model = Net()
    report = sparsify(model, batch=(1, 8))
    layers = by_name(report)
    assert layers["two"].format is None
    assert layers["two"].reason == "2:4 found in the weights; dense is faster than 2:4 at batch 8"
    assert layers["two"].speedups == {1: 3.0, 8: pytest.approx(0.9)}
    assert type(model.two) is nn.Linear
    assert layers["some"].format == "bitmap"
    assert layers["tenth"].format == "bitmap"
    assert (
        layers["tenth"].reason == "no pattern found in the weights; faster than dense and than csr 1.10/1.20"
    )
    assert asked == [((64, 32), ("2:4",)), ((64, 64), ("bitmap",)), ((128, 64), ("bitmap", "csr"))]
    assert report.swapped == 2


def test_auto_takes_a_format_that_never_loses_over_one_that_is_faster_on_the_whole(monkeypatch):
    fake_timings(monkeypatch, {"bitmap": {1: 9.0, 8: 0.99}, "csr": {1: 1.1, 8: 1.2}, "2:4": {1: 1.0, 8: 1.0}})
    layers = by_name(sparsify(Net(), batch=[1, 8]))
    assert layers["tenth"].format == "csr"
    assert layers["two"].format == "2:4"


def test_auto_measures_each_kind_of_layer_once(monkeypatch):
    asked = fake_timings(monkeypatch, {"2:4": {1: 2.0}})
    model = nn.Sequential(
        *(keep(nn.Linear(16, 16), "2:4") for _ in range(5)), keep(nn.Linear(16, 16, bias=False), "2:4")
    )
    assert sparsify(model).swapped == 6
    assert len(asked) == 2


def test_auto_on_this_machine_measures_for_real():
    model = nn.Sequential(keep(nn.Linear(512, 512), "2:4"))
    report = sparsify(model, batch=(1, 3), seconds=0.2)
    layer = report.layers[0]
    assert set(layer.speedups) == {1, 3}
    assert all(ratio > 0 for ratio in layer.speedups.values())
    assert (layer.format == "2:4") == (min(layer.speedups.values()) >= 1)
    assert isinstance(model[0], SparseLinear) == (layer.format is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "3-4"}, "format: must be"),
        ({"policy": None}, "policy: must be one of auto, always, got None"),
        ({"policy": "never"}, "policy: must be one of auto, always, got 'never'"),
        ({"policy": "always", "batch": 8}, 'batch: nothing is measured under policy="always", got 8'),
        ({"policy": "always", "seconds": 8}, "seconds: nothing is measured"),
        ({"batch": 0}, "batch: must be one or several whole numbers of at least 1, got 0"),
        ({"batch": ()}, "batch: must be one or several"),
        ({"batch": (1, 2.5)}, "batch: must be one or several"),
        ({"seconds": 0}, "seconds: must be above 0"),
        ({"include": "nothing"}, "include: 'nothing' matches no linear layer"),
        ({"exclude": "*"}, "has no linear layer to convert under include=None, exclude='\\*'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsify(Net(), **arguments)


def test_what_has_no_kernels_stays_dense():
    empty = nn.Linear(4, 4)
    empty.weight = nn.Parameter(torch.zeros(0, 4))
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta"), empty)
    reasons = [layer.reason for layer in sparsify(model, policy="always").layers]
    assert reasons == ["dtype torch.float64 has no kernels", "on the meta device: no data", "empty"]


def test_report_shows_like_layers_in_one_row():
    model = nn.ModuleDict({"blocks": nn.ModuleList(keep(nn.Linear(16, 16), "2:4") for _ in range(3))})
    report = sparsify(model, policy="always")
    text = str(report)
    assert "blocks.*" in text
    assert "3 of 3 layers are sparse" in text
    assert "blocks.1" in report.table(full=True).render()
    assert len(report.table().rows) == 1
    data = report.to_dict()
    assert data["swapped"] == 3
    assert [layer["name"] for layer in data["layers"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert data["bytes_after"] == sum(block.nbytes for block in model["blocks"])


def test_alternating_quartiles_takes_turns_and_rotates():
    order = []
    calls = {"a": [lambda: order.append("a0"), lambda: order.append("a1")], "b": [lambda: order.append("b")]}
    quartiles = alternating_quartiles(calls, seconds=1e-9)
    assert order == ["a0", "a1", "b", *["a0", "b", "a1", "b"] * 2, "a0", "b"]
    assert set(quartiles) == {"a", "b"}


def test_time_layer():
    linear = keep(nn.Linear(64, 64), "2:4").eval()
    before = linear.weight.detach().clone()
    timings = time_layer(linear, ["2:4", Format("csr")], batches=(1, 4), seconds=0.05)
    assert [timing.batch for timing in timings] == [1, 4]
    for timing in timings:
        assert timing.dense_seconds > 0
        assert set(timing.sparse_seconds) == {"2:4", "csr"}
        assert timing.speedup("csr") == timing.dense_seconds / timing.sparse_seconds["csr"]
    assert torch.equal(linear.weight, before)
