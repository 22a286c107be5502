"""Where a test runs its operations: on the CPU, on the emulated GPU of tests/simt, on a real one where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from helpers import simt
from helpers.isa import LEVELS, forced, threads
from torch import Tensor

from sparseprune.kernels import backend, cuda, native

GPUS = ["emulated", *(["cuda"] if torch.cuda.is_available() and not cuda.missing() else [])]
LAYOUTS = {"cpu": ("tile", "csr"), "emulated": ("sparse24", "bitmap8"), "cuda": ("sparse24", "bitmap8")}


class Fault(AssertionError):
    """What the emulator found wrong. No RuntimeError: those, callers may take for a bad argument and try again."""


@dataclass(frozen=True)
class Place:
    """Where operations run now."""

    name: str  # "cpu" or an instruction set, "emulated", "cuda"
    device: str
    native: Any  # the backend's module

    @property
    def is_gpu(self) -> bool:
        return self.name in GPUS

    @property
    def layouts(self) -> tuple[str, ...]:
        return LAYOUTS[self.name if self.is_gpu else "cpu"]

    def put(self, x: Tensor) -> Tensor:
        """x on the device, with its strides and whatever lies between and around its elements."""
        if self.device == "cpu":
            return x
        base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return base.to(self.device).as_strided(x.shape, x.stride(), x.storage_offset())


def place_of(name: str) -> Place:
    gpu = name in GPUS
    return Place(name, "cuda" if name == "cuda" else "cpu", cuda if gpu else native)


@contextmanager
def running(name: str, seed: int | None = None) -> Iterator[Place]:
    """Operations on CPU tensors (of `cuda`: on CUDA tensors) run there: "cpu", an instruction set, or one of GPUS.

    seed: of the emulator's order of threads, so that an example of hypothesis fails again.
    """
    with ExitStack() as stack:
        if name in LEVELS:
            stack.enter_context(forced(name))
            stack.enter_context(threads(1))  # see test_linear.py
        elif name == "emulated":
            kernels = stack.enter_context(emulated())
            if seed is not None:
                kernels.set_seed(seed)
        yield place_of(name)


@contextmanager
def emulated(module: ModuleType | None = None) -> Iterator[ModuleType]:
    """The operations on CPU tensors run the GPU's kernels in the emulator (or in `module`, another build of it)."""
    kernels = module or simt.module()
    with ExitStack() as stack:
        for owner, name, value in [
            (backend, "cpu", cuda),
            (cuda, "_kernels", _Launches(kernels)),
            (cuda, "_source", _registering(kernels, writable=False)),
            (cuda, "_target", _registering(kernels, writable=True)),
            (cuda, "_empty", _poisoned),
            (cuda, "_stream", lambda index: 0),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield kernels


class _Launches:
    """The emulator's functions; what it did with kernels is added up in `count` and `seconds`."""

    count, seconds = 0, 0.0
    _LAUNCH_NOTHING = ("missing", "sm_count", "sections", "header_bytes", "header", "plan", "configs")

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        if name in self._LAUNCH_NOTHING:
            return function

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args)
            except RuntimeError as fault:
                raise Fault(str(fault)) from None
            finally:
                _Launches.seconds += time.perf_counter() - begin
                _Launches.count += 1
                self._module.clear()  # forgets the buffers: their memory may be another's by the next launch

        return call


def summary() -> str | None:
    """What the emulator did in this process; None if nothing."""
    if not _Launches.count:
        return None
    return f"emulated GPU: {_Launches.count} calls of kernels in {_Launches.seconds:.1f} s"


def _registering(module: ModuleType, writable: bool) -> Callable[[Tensor], int]:
    """`Tensor.data_ptr`, telling the emulator where the tensor ends."""

    def address(x: Tensor) -> int:
        if not x.numel():
            return 0
        reach = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        module.register(x.data_ptr(), reach * x.element_size(), writable)
        return x.data_ptr()

    return address


def _poisoned(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.empty`, filled with NaN, -1 or ones: what a kernel forgets to write shows."""
    x = torch.empty(*args, **kwargs)
    x.untyped_storage().fill_(0xFF)
    return x
