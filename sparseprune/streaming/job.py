"""One stream from its first check to its last file; `stream.py` says what it is asked to do."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparseprune import clock, processes
from sparseprune.calibration import CalibrationData
from sparseprune.io.checkpoint import header, save_config
from sparseprune.io.shards import STREAM_FILE
from sparseprune.memory import all_finite, peak_memory
from sparseprune.models import notes
from sparseprune.models.batches import trunk
from sparseprune.models.sites import WeightSite
from sparseprune.pruning.base import Method, Target
from sparseprune.pruning.report import LayerPruned
from sparseprune.pruning.rewrite import Rewriter
from sparseprune.pruning.sequential import prune_layer
from sparseprune.report import track
from sparseprune.statistics import overlap
from sparseprune.statistics.inputs import collect_in
from sparseprune.statistics.walk import Walk, capture, run_block
from sparseprune.streaming.activations import Activations
from sparseprune.streaming.batches import fingerprint
from sparseprune.streaming.plan import check_disk, check_memory, needs_of
from sparseprune.streaming.source import StreamedModel
from sparseprune.streaming.state import State
from sparseprune.streaming.writer import write_block, write_index, write_rest
from sparseprune.weights.format import Format

__all__ = ["Job"]

LOCK_FILE = ".lock"


class _Final(Rewriter):
    """Keeps no copy of what it changes: the weights are on the disk."""

    def remember(self, parameter: nn.Parameter) -> None:
        pass


class _Nowhere(list[Tensor]):
    """Where hidden states go that are known already."""

    def append(self, value: Tensor) -> None:
        pass


@dataclass
class Job:
    """What is to be done; see `prune_folder`. `layers` all lie in `blocks`; `targets`: what each is to become, by name."""

    streamed: StreamedModel
    blocks: Sequence[tuple[str, nn.Module]]
    layers: Sequence[WeightSite]
    method: Method
    targets: Mapping[str, Target]
    data: CalibrationData | None
    sequential: bool
    form: Format | None
    out: Path
    spill: Path
    progress: bool

    def __post_init__(self) -> None:
        self.state = State({})
        self.resumed_at: int | None = None
        self.activations = 0
        self._room = 0
        self._open = ExitStack()
        self._main = processes.rank() == 0

    @property
    def shards(self) -> int:
        return len(self.blocks) + 1

    def check(self, selection: dict[str, Any], memory: int | None) -> None:
        """All that can be known before the long work; finds the state to go on from.

        selection: what was asked for, among the settings that a resumed run must share.
        """
        self._check_model()
        self.state = State.find(self.out, self._settings(selection))
        self.resumed_at = self.state.done if (self.out / STREAM_FILE).is_file() else None
        batches = self.data.batches if self.data is not None else ()
        names = [name for name, _ in self.blocks]
        needs = needs_of(self.streamed, names, self.layers, self.method, batches, self._entrance())
        self._room = check_memory(needs, memory)
        left = 1 - self.state.done / self.shards
        check_disk({self.out: int(left * self._bytes_after()), self.spill: 2 * needs.activations})

    def run(self, begin: float) -> None:
        """Prunes the blocks that are left, a shard for each. `begin`: when the clock started."""
        before = self.state.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.spill.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._record(before, begin)
        if self.data is not None:
            overlap.remember(self.streamed.model, self.data)
        walk = hidden = None
        if self.data is not None and self.state.done < len(self.blocks):
            walk, hidden = self._enter(self.state.done)
            self.activations = hidden.nbytes
        left = range(self.state.done, len(self.blocks))
        for index in track(left, f"pruning ({self.method.name})", enabled=self.progress):
            following = self._prune_block(index, walk)
            self.state.done = index + 1
            if hidden is not None:
                self.state.spilled = max(self.state.spilled, hidden.spilled)
            processes.barrier()  # all processes have their next hidden states on the disk
            self._record(before, begin)
            processes.barrier()
            if walk is not None and hidden is not None:
                hidden.delete()
                if following is not None:
                    walk.hidden = hidden = following

    def finish(self, tokenizer: Any) -> None:
        """Writes what is outside of the blocks, and the files that make the folder a checkpoint; the index last."""
        if self._main:
            model = self.streamed.model
            name, infos = write_rest(
                self.out, (len(self.blocks), self.shards), self.streamed, [name for name, _ in self.blocks], self._header()
            )  # fmt: skip
            self._add(name, infos)
            if (self.streamed.folder / "generation_config.json").is_file():
                from transformers import GenerationConfig

                model.generation_config = GenerationConfig.from_pretrained(self.streamed.folder)
            save_config(model, self.out)
            if tokenizer is not None:
                tokenizer.save_pretrained(self.out)
            write_index(
                self.out, self.state.weight_map, self.state.nbytes, notes.to_metadata(self.state.notes)
            )
            (self.out / STREAM_FILE).unlink()
            (self.out / LOCK_FILE).unlink()
        processes.barrier()
        for path in self.spill.glob(f"hidden-*.{processes.rank()}*"):
            path.unlink()
        processes.barrier()
        if self._main:
            with contextlib.suppress(OSError):  # the user's folder may hold other files
                self.spill.rmdir()

    def close(self) -> None:
        """Closes the files that an error left open; they stay on the disk."""
        self._open.close()

    def rows(self) -> tuple[LayerPruned, ...]:
        """What happened to each layer, also in the runs before a kill."""
        return tuple(
            LayerPruned(**{**row, "shape": (row["shape"][0], row["shape"][1])}) for row in self.state.layers
        )

    def _prune_block(self, index: int, walk: Walk | None) -> Activations | None:
        """Prunes block `index` and writes its shard; gives the hidden states behind it."""
        name, block = self.blocks[index]
        layers = [layer for layer in self.layers if layer.name.startswith(f"{name}.")]
        last = index + 1 == len(self.blocks)
        following = None if walk is None or last else self._store(index + 1)
        with self.streamed.loaded(name), torch.no_grad():
            for layer in layers:
                if not all_finite(layer.weight):
                    raise ValueError(
                        f"{layer.name}: weights must be finite, got NaN or Inf; repair the checkpoint, or exclude it"
                    )
            statistics: dict[str, Any] = {}
            dense = following if not self.sequential else None
            if walk is not None and layers and self.method.statistic is not None:
                statistics = collect_in(
                    layers, lambda: _passes(block, walk, index, dense), self.method.statistic
                )
            self._prune_layers(layers, statistics)
            statistics.clear()
            if self._main:
                for layer in layers:
                    self.targets[layer.name].note(layer)
                shard, infos, choices = write_block(
                    self.out, (index, self.shards), self.streamed, name, layers, self.form, self._header()
                )
                self._add(shard, infos)
                self.state.notes |= notes.notes_of(self.streamed.model)
                for choice in choices:
                    reasons = self.state.formats.setdefault(str(choice.format or "dense"), {})
                    reasons[choice.reason] = reasons.get(choice.reason, 0) + 1
            if walk is not None and following is not None:
                if self.sequential or not layers:
                    for run, _ in _passes(block, walk, index, following):
                        run()
                following.seal()
        return following

    def _prune_layers(self, layers: Sequence[WeightSite], statistics: dict[str, Any]) -> None:
        """Each process prunes some of the layers, all get all of them."""
        size, rewriter = processes.world_size(), _Final()
        mine: dict[int, dict[str, Any]] = {}
        for position, layer in enumerate(layers):
            if position % size == processes.rank():
                row, _ = prune_layer(
                    layer, self.method, statistics.get(layer.name), self.targets[layer.name], rewriter
                )
                mine[position] = asdict(row)
        rows = [mine]
        if size > 1:
            for position, layer in enumerate(layers):
                processes.broadcast(layer.parameter.detach().view(torch.uint8), position % size)
            rows = [{} for _ in range(size)]
            dist.all_gather_object(rows, mine)
        everyone = {position: row for part in rows for position, row in part.items()}
        self.state.layers += [everyone[position] for position in range(len(layers))]

    def _enter(self, block: int) -> tuple[Walk, Activations]:
        """How the blocks are called, and the hidden states before `block`: computed for the first, else found again."""
        assert self.data is not None
        model, resumed = self.streamed.model, block > 0
        first, _ = self.blocks[0]
        hidden = self._store(0) if not resumed else None
        keys = self._entrance()
        with ExitStack() as stack:
            stack.enter_context(self.streamed.loaded(first))
            on_demand = self._on_demand()
            leave = frozenset(self.streamed.keys) - frozenset(keys)
            stack.enter_context(self.streamed.loaded("", leave))
            if on_demand is not None:
                stack.enter_context(self.streamed.rows_on_demand(model.get_input_embeddings(), on_demand))
            walk = capture(
                model,
                [module for _, module in self.blocks],
                self.data.batches,
                hidden if hidden is not None else _Nowhere(),
                self.progress,
            )
        if hidden is None:
            hidden = self._store(block, resumed)
            if len(hidden) != len(walk.masks):
                raise ValueError(
                    f"{hidden.path}: must hold {len(walk.masks)} hidden states, got {len(hidden)}; delete {self.out}"
                )
        else:
            hidden.seal()
        walk.hidden = hidden
        return walk, hidden

    def _lock(self) -> None:
        """Keeps a second process from writing to the same folder; a lock ends with its process, however that ends."""
        if not self._main:
            return
        file = self._open.enter_context((self.out / LOCK_FILE).open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"out: another process is writing to {self.out}; wait for it, or name another folder"
            ) from None

    def _entrance(self) -> list[str]:
        """The tensors that what runs before the blocks needs in memory."""
        if self.data is None or self.method.statistic is None:
            return []
        run = trunk(self.streamed.model, [module for _, module in self.blocks], self.data.batches)
        prefix = next(name for name, module in self.streamed.model.named_modules() if module is run)
        prefixes = tuple(f"{name}." for name, _ in self.blocks)
        on_demand = self._on_demand()
        return [
            key
            for key in self.streamed.keys
            if key.startswith(f"{prefix}." if prefix else "") and not key.startswith(prefixes) and key != on_demand
        ]  # fmt: skip

    def _on_demand(self) -> str | None:
        """The input embedding's weight, if rows of it are enough: nothing else that runs shares it."""
        model = self.streamed.model
        embedding = model.get_input_embeddings()
        assert self.data is not None
        run = trunk(model, [module for _, module in self.blocks], self.data.batches)
        users = [module for module in run.modules() if getattr(module, "weight", None) is embedding.weight]
        if not isinstance(embedding, nn.Embedding) or len(users) != 1:
            return None
        return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)

    def _check_model(self) -> None:
        if not self.blocks:
            raise ValueError(
                f"folder: {type(self.streamed.model).__name__} has no repeated blocks to stream; prune it in memory"
            )
        if not self.layers:
            raise ValueError(
                "folder: has no linear layer to prune in its blocks under these include and exclude"
            )
        prefixes = tuple(f"{name}." for name, _ in self.blocks)
        for alias, first in self.streamed.tied.items():
            if alias.startswith(prefixes) or first.startswith(prefixes):
                raise ValueError(
                    f"folder: {alias} is tied to {first}; blocks that share weights cannot be streamed, prune it in memory"
                )
        for layer in self.layers:
            self.targets[layer.name].pattern.check_shape(layer.out_features, layer.in_features, layer.name)

    def _settings(self, selection: dict[str, Any]) -> dict[str, Any]:
        from sparseprune.version import __version__

        settings = {
            "model": self.streamed.source.fingerprint(),
            "dtype": str(self.streamed.model.dtype),
            "method": self.method.name,
            "sequential": self.sequential,
            "format": "auto" if self.form is None else str(self.form),
            "calibration": None if self.data is None else fingerprint(self.data),
            **selection,
            # sums in another order, or another library, give other last bits
            "processes": processes.world_size(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sparseprune": __version__,
        }
        return dict(json.loads(json.dumps(settings)))

    def _bytes_after(self) -> int:
        total = self.streamed.nbytes(self.streamed.names(""))
        for layer in self.layers:
            size = layer.in_features * layer.out_features
            saved = size * self.targets[layer.name].sparsity * layer.weight.dtype.itemsize - size / 8
            total -= int(max(0.0, saved))
        return total

    def _header(self) -> dict[str, str]:
        return header(self.streamed.model, self.streamed.tied)

    def _add(self, shard: str, infos: Sequence[Any]) -> None:
        self.state.weight_map.update({info.name: shard for info in infos})
        self.state.nbytes += sum(info.nbytes for info in infos)

    def _record(self, before: float, begin: float) -> None:
        self.state.seconds = before + clock.now() - begin
        self.state.peak_memory = max(self.state.peak_memory, peak_memory())
        if self._main:
            self.state.write(self.out)

    def _store(self, block: int, resumed: bool = False) -> Activations:
        """The hidden states before `block`, to be written or found again."""
        path = self.spill / f"hidden-{block:05}.{processes.rank()}"
        store = (Activations.open if resumed else Activations)(path, self._room)
        self._open.callback(store.close)
        return store


def _passes(
    block: nn.Module, walk: Walk, index: int, outputs: Activations | None
) -> Iterator[tuple[Callable[[], None], Tensor | None]]:
    """The block's runs over the batches, with their masks; what a run gives goes to `outputs`."""

    def run(batch: int) -> None:
        made = run_block(block, walk.hidden[batch], walk.calls[index][batch])
        if outputs is None:
            return
        if batch < len(outputs):  # the passes are made anew when layers turn out not to share their inputs
            outputs[batch] = made
        else:
            outputs.append(made)

    for batch, mask in enumerate(walk.masks):
        yield (lambda batch=batch: run(batch)), mask  # type: ignore[misc]
