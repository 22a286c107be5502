"""Timing on a GPU, with stand-ins for the device: what torch.cuda is asked, and what follows from its answers."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseprune.kernels import cuda
from sparseprune.measure import benchmark
from sparseprune.measure.benchmark import (
    ROTATED_BYTES,
    alternating_quartiles,
    bytes_past_caches,
    describe_device,
    time_model,
)
from sparseprune.weights.choose import options_for
from sparseprune.weights.format import Format


class Device:
    """A GPU's time, which calls and events move on."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(torch.cuda, "device", self.guard)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append(f"wait {device}"))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")

    @contextlib.contextmanager
    def guard(self, device):
        self.log.append(f"on {device}")
        yield

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run


def test_turns_on_a_gpu_are_several_calls_between_events(monkeypatch):
    device = Device(monkeypatch)
    calls = {"dense": [device.call("d", 0.002)], "2:4": [device.call("a", 0.001), device.call("b", 0.003)]}
    quartiles = alternating_quartiles(calls, 0.0, "cuda:1")
    assert quartiles == {"dense": pytest.approx(0.002), "2:4": pytest.approx(0.002)}
    turn = device.log[3:]  # after the warm-up
    each = benchmark._CUDA_CALLS
    assert turn[: each + 2] == ["on cuda:1", "wait cuda:1", *"d" * each]
    assert turn[each + 2 : 2 * each + 4] == ["on cuda:1", "wait cuda:1", *"ab" * (each // 2)]


def test_copies_on_a_gpu_are_past_its_l2(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(L2_cache_size={0: 6, 1: 126}[device.index] << 20),
    )
    assert bytes_past_caches("cpu") == bytes_past_caches("cuda:0") == ROTATED_BYTES
    assert bytes_past_caches("cuda:1") == 252 << 20


def test_a_device_is_named(monkeypatch):
    Device(monkeypatch)
    assert describe_device("cuda:3") == "card of cuda:3"
    assert describe_device("cpu").endswith(f"{benchmark.isa()} kernels")


def on_cuda(weight):
    """Looks as if it lay on a GPU, as far as `options_for` looks."""
    shown = weight.as_subclass(_OnCuda)
    assert shown.device.type == "cuda"
    return shown


class _OnCuda(torch.Tensor):
    @property
    def device(self):
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_formats_on_a_gpu(monkeypatch):
    torch.manual_seed(0)
    weight = torch.where(torch.rand(32, 64) < 0.1, torch.randn(32, 64), 0.0)
    monkeypatch.setattr(cuda, "missing", lambda: "")
    assert options_for(weight).formats == (Format("bitmap"), Format("csr"))
    assert options_for(on_cuda(weight)).formats == (Format("bitmap"),)
    monkeypatch.setattr(cuda, "missing", lambda: "no driver")
    assert options_for(on_cuda(weight)).reason == "on cuda:0: no driver"


def test_a_report_says_what_was_timed_on():
    model = nn.Sequential(nn.Linear(16, 16))
    machine = time_model(model, seconds=0.01, tokens=False).machine
    assert machine == f"{describe_device('cpu')}, torch {torch.__version__}"
