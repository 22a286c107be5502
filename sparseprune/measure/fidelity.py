"""How far a pruned model is from the dense one: in its predictions, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.measure.evaluate import PerplexityResult, Windows, logits_of, window_loss
from sparseprune.models.blocks import find_blocks
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.models.sites import find_sites, linear_shape
from sparseprune.report import Column, Report, Table, plain, track
from sparseprune.weights.linear import SparseLinear

__all__ = ["Fidelity", "LayerError", "LayerErrors", "divergence", "fidelity", "layer_errors"]

_ROWS = 128  # rows of logits that become float32 at a time


@dataclass(frozen=True)
class Fidelity:
    """Two models on one text; `str()` prints the protocol with the numbers.

    Attributes:
        kl: mean over the scored tokens of KL(dense || pruned), in nats: 0 for the same predictions.
        agreement: share of the scored tokens where both find the same token likeliest.
    """

    kl: float
    agreement: float
    model: PerplexityResult
    reference: PerplexityResult

    @property
    def protocol(self) -> str:
        ours, theirs = self.model.dtype, self.reference.dtype
        compared = "" if ours == theirs else f", compared with a {theirs} reference"
        return f"{self.model.protocol}{compared}; KL(reference || model) in nats a token, top-1 of the same tokens"

    def to_dict(self) -> dict[str, Any]:
        return dict(plain(self))

    def __str__(self) -> str:
        text = (
            f"KL {self.kl:.4g}, top-1 agreement {self.agreement:.1%}, perplexity {self.model.value:.4g} "
            f"against {self.reference.value:.4g} ({self.protocol})"
        )
        return text if self.model.warning is None else f"{text}\n{self.model.warning}"


def divergence(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """(sum over rows of KL(reference || logits), number of rows with the same largest entry), for [rows, classes]."""
    total, same = 0.0, 0
    for p_logits, q_logits in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True):
        p, q = p_logits.float().log_softmax(dim=-1), q_logits.float().log_softmax(dim=-1)
        # 0 x log(0/0) is 0 here: a class that both rule out
        terms = torch.where(p == -torch.inf, 0, p.exp() * (p - q))
        total += float(terms.sum(dtype=torch.float64))
        same += int((p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1)).sum())
    return total, same


def fidelity(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    *,
    text: str | Tensor,
    window: int = 1024,
    max_windows: int | None = None,
    stride: int | None = None,
    text_name: str = "text",
    progress: bool = False,
) -> Fidelity:
    """KL divergence from `reference` (the dense model) to `model`, top-1 agreement, and both perplexities.

    The text is read, and tokens are scored, as `sparseprune.measure.evaluate.perplexity` does; each window passes through both
    models.

    Raises:
        ValueError: as `perplexity`; models of different vocabularies.
    """
    windows = Windows.of(model, tokenizer, text, window, max_windows, stride, text_name)
    losses, kl, same = [0.0, 0.0], 0.0, 0
    with torch.inference_mode(), evaluation_mode(model), evaluation_mode(reference):
        for start, piece, first in track(windows, "model against reference", len(windows), enabled=progress):
            ours, theirs = logits_of(model, piece), logits_of(reference, piece)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"reference: must have the model's vocabulary, {ours.shape[-1]} tokens, got {theirs.shape[-1]}; "
                    "pass the dense model that it was pruned from"
                )
            for index, logits in enumerate((ours, theirs)):
                losses[index] += window_loss(logits, piece, first, start=start)
            part, agreed = divergence(theirs[first - 1 : -1], ours[first - 1 : -1].to(theirs.device))
            kl += part
            same += agreed
    results = [windows.result(it, loss) for it, loss in zip((model, reference), losses, strict=True)]
    return Fidelity(kl / windows.scored, same / windows.scored, *results)


@dataclass(frozen=True)
class LayerError:
    """||Y - Y'|| / ||Y|| of one module, Y being what the dense one gives on the dense model's inputs."""

    name: str
    kind: str
    """"layer" or "block"."""
    error: float


@dataclass(frozen=True)
class _Part:
    """A block, or a layer outside of all: its own error, and those of the layers in it."""

    name: str
    error: float | None
    layers: Sequence[LayerError]

    @property
    def mean(self) -> float | None:
        return sum(it.error for it in self.layers) / len(self.layers) if self.layers else None

    @property
    def worst(self) -> LayerError | None:
        return max(self.layers, key=lambda it: it.error, default=None)

    @property
    def worst_name(self) -> str | None:
        """Within the part."""
        if self.worst is None or self.worst.name == self.name:
            return None
        return self.worst.name.removeprefix(f"{self.name}.")


COLUMNS = (
    Column("part", value=lambda it: it.name),
    Column("block", ".3f", lambda it: it.error),
    Column("layers, mean", ".3f", lambda it: it.mean),
    Column("worst layer", value=lambda it: it.worst_name),
    Column("its error", ".3f", lambda it: it.worst and it.worst.error),
)


@dataclass(frozen=True)
class LayerErrors(Report):
    """Errors of single linear layers and of whole blocks; `print` shows one row per block."""

    rows: tuple[LayerError, ...]
    tokens: int

    def table(self) -> Table:
        """One row per block: its own error, and the worst layer in it; layers outside blocks in rows of their own."""
        blocks = {row.name: row.error for row in self.rows if row.kind == "block"}
        groups: dict[str, list[LayerError]] = {name: [] for name in blocks}
        for row in self.rows:
            if row.kind == "layer":
                owner = next((name for name in blocks if row.name.startswith(f"{name}.")), row.name)
                groups.setdefault(owner, []).append(row)
        parts = [_Part(name, blocks.get(name), layers) for name, layers in groups.items()]
        footer = [f"||Y - Y'|| / ||Y|| on the dense model's inputs, {self.tokens:,} tokens"]
        return Table.of("Output errors", COLUMNS, parts, footer)


def layer_errors(
    model: nn.Module, reference: nn.Module, batches: list[Tensor], *, progress: bool = False
) -> LayerErrors:
    """Runs `reference` (the dense model), and on each layer's and block's inputs its twin in `model` as well.

    So an error is a layer's own: those before it do not add to it. Layers and blocks are paired by name; what has no
    twin of the same shape (removed by structured pruning) is left out.

    Args:
        batches: token ids [batch, tokens].

    Raises:
        ValueError: no layer of `reference` has a twin in `model`, or no batch.
    """
    if not batches:
        raise ValueError("batches: must hold at least one, got none; pass token ids [batch, tokens]")
    pairs = _pairs(model, reference)
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in pairs}
    with ExitStack() as stack:
        for context in (torch.inference_mode(), evaluation_mode(model), evaluation_mode(reference)):
            stack.enter_context(context)
        for name, (module, twin, _) in pairs.items():
            hook = _comparing(twin, sums[name])
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for ids in track(batches, "layer errors", enabled=progress):
            reference(input_ids=ids.to(device_of(reference)), use_cache=False)
    rows = []
    for name, (_, _, kind) in pairs.items():
        error, size = sums[name]
        rows.append(LayerError(name, kind, (error / max(size, 1e-300)) ** 0.5))
    return LayerErrors(tuple(rows), sum(ids.numel() for ids in batches))


def _pairs(model: nn.Module, reference: nn.Module) -> dict[str, tuple[nn.Module, nn.Module, str]]:
    """name -> (dense module, its twin, kind)."""
    twins, own = dict(model.named_modules()), dict(reference.named_modules())
    pairs: dict[str, tuple[nn.Module, nn.Module, str]] = {}
    unpaired = []
    for name, block in find_blocks(reference):
        stack = name.rpartition(".")[0]
        # where a stack lost blocks, those left have moved up: equal names are different blocks
        if stack in twins and len(list(twins[stack].children())) == len(list(own[stack].children())):
            pairs[name] = (block, twins[name], "block")
        else:
            unpaired.append(f"{name}.")
    for layer in find_sites(reference):
        twin = twins.get(layer.name)
        if twin is None or layer.name.startswith(tuple(unpaired)):
            continue
        if linear_shape(twin) == (layer.out_features, layer.in_features):
            pairs[layer.name] = (layer.module, twin, "layer")
    if not any(kind == "layer" for _, _, kind in pairs.values()):
        raise ValueError(
            "reference: must be the dense model that the other was pruned from; no layer of this "
            f"{type(reference).__name__} has a twin of its name and shape"
        )
    return pairs


def _comparing(twin: nn.Module, sums: list[float]) -> Callable[..., None]:
    """A forward hook that adds ||Y - Y'||^2 and ||Y||^2 to `sums`."""
    dtype = twin.dtype if isinstance(twin, SparseLinear) else None
    for parameter in twin.parameters():
        dtype = dtype or parameter.dtype

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        dense = _first(output).float()
        error = dense - _first(twin(*_cast(args, dtype), **_cast(kwargs, dtype))).float()
        sums[0] += float(error.square().sum(dtype=torch.float64))
        sums[1] += float(dense.square().sum(dtype=torch.float64))

    return hook


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in `dtype`: the models may be of two."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value
