"""The block before removed ones makes up for them, by least squares.

Let a [tokens, n] be the inputs of the down projection W of the last block before a run of removed ones, and D [tokens,
features] what the run adds to the hidden states. W + M with

    M = D^T a (a^T a + d I)^-1

gives the residual stream the part of D that is linear in a. (Shopkhoev et al. 2025, "ReplaceMe", fit a linear map of
the projection's outputs, which are a quarter to a third as many numbers as its inputs.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.calibration import CalibrationData
from sparseprune.models.batches import Batch, no_cache
from sparseprune.models.modules import evaluation_mode
from sparseprune.models.sites import WeightSite
from sparseprune.report import track
from sparseprune.surgery.compensation import damped, damping_fraction
from sparseprune.surgery.probe import find_neurons, run

__all__ = ["bridges", "hidden_in", "hidden_out"]


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    hidden = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(hidden, Tensor):
        raise ValueError(f"model: a block must take hidden states first, got {type(hidden).__name__}")
    return hidden


def hidden_out(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of a tuple."""
    hidden = output if isinstance(output, Tensor) else output[0]
    if not isinstance(hidden, Tensor):
        raise ValueError(f"model: a block must return hidden states first, got {type(hidden).__name__}")
    return hidden


def bridges(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    gone: Sequence[int],
    data: CalibrationData,
    batch: Batch,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Name of a down projection -> its new weight [out, in], float32, for each run of removed blocks that has one.

    A run has none at the start of the stack, or where what the block before it gives is not its input plus what the
    projection gives (a norm behind it).
    """
    runs = _runs(sorted(gone))
    groups = find_neurons(model, batch)
    found: list[tuple[int, int, WeightSite]] = []
    for first, last in runs:
        inside = [
            it.consumer for it in groups if first and it.consumer.name.startswith(f"{blocks[first - 1][0]}.")
        ]
        if len(inside) == 1 and _adds_up(model, blocks[first - 1][1], inside[0], batch):
            found.append((first, last, inside[0]))
    if not found:
        return {}
    sums = [_Sums(model, blocks[first][1], blocks[last][1], layer) for first, last, layer in found]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_cache(model))
        for it in sums:
            stack.enter_context(it)
        for part in track(data, "making up for layers", total=len(data), enabled=progress):
            run(model, part)
    return {it.layer.name: it.weight() for it in sums}


def _runs(gone: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for index in gone:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _adds_up(model: nn.Module, block: nn.Module, layer: WeightSite, batch: Batch) -> bool:
    """Whether what is added to the projection's output is added to the block's."""
    outputs: list[Tensor] = []
    noise: list[Tensor] = []

    def disturb(inputs: Tensor, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise.append(torch.randn(output.shape, generator=generator).to(output) * output.std())
        return output + noise[-1]

    with torch.no_grad(), evaluation_mode(model), no_cache(model), ExitStack() as stack:
        keep = block.register_forward_hook(lambda module, args, output: outputs.append(hidden_out(output)))
        stack.callback(keep.remove)
        run(model, batch)
        stack.enter_context(layer.on_outputs(disturb))
        run(model, batch)
    if outputs[0].numel() != noise[0].numel():
        return False
    difference = (outputs[1] - outputs[0]).float() - noise[0].reshape(outputs[0].shape).float()
    tolerance = 1e-3 if outputs[0].dtype in (torch.float32, torch.float64) else 5e-2
    scale = outputs[0].abs().max().float() + noise[0].abs().max().float()
    return bool(difference.abs().max() <= tolerance * scale)


class _Sums:
    """a^T a and a^T D of one run, summed by hooks while it is entered."""

    def __init__(self, model: nn.Module, first: nn.Module, last: nn.Module, layer: WeightSite) -> None:
        self.first, self.last, self.layer = first, last, layer
        device, inner, out = layer.weight.device, layer.in_features, layer.out_features
        self.gram = torch.zeros(inner, inner, device=device)
        self.cross = torch.zeros(inner, out, device=device)
        self.tokens = 0
        self._stack = ExitStack()
        self._a: Tensor | None = None
        self._before: Tensor | None = None

    def __enter__(self) -> None:
        hooks = [
            self.first.register_forward_pre_hook(self._keep_before, with_kwargs=True),
            self.last.register_forward_hook(self._add),
        ]
        for hook in hooks:
            self._stack.callback(hook.remove)
        self._stack.enter_context(self.layer.on_inputs(self._keep_a))

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _keep_a(self, inputs: Tensor) -> None:
        self._a = inputs.reshape(-1, self.layer.in_features).float()

    def _keep_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = hidden_in(args, kwargs)

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._a is not None and self._before is not None  # they lie before in the stack
        added = (hidden_out(output).float() - self._before.float()).reshape(-1, self.layer.out_features)
        self.gram.addmm_(self._a.t(), self._a)
        self.cross.addmm_(self._a.t(), added)
        self.tokens += len(added)

    def weight(self) -> Tensor:
        """W + M, float32 [out, in]."""
        if not self.cross.isfinite().all():
            raise ValueError(f"batches: what {self.layer.name} reads must be finite, got NaN or Inf")
        _, factor = damped(self.gram, damping_fraction(len(self.gram), self.tokens))
        added = torch.cholesky_solve(self.cross.double(), factor).t()
        return (self.layer.weight.double() + added).float()
