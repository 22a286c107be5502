"""`prune_folder()`: prune a checkpoint that does not fit into memory, block by block, from file to file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from sparseprune import clock
from sparseprune.calibration import CalibrationData, as_data
from sparseprune.io.checkpoint import check_tokenizer
from sparseprune.memory import spare_address_space
from sparseprune.models.batches import Batch
from sparseprune.models.blocks import find_blocks
from sparseprune.models.modules import max_length
from sparseprune.models.sites import WeightSite, find_sites
from sparseprune.options import require_at_least, require_path
from sparseprune.pruning.allocation import AllocationContext, allocation_name, resolve_allocation
from sparseprune.pruning.base import Method
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.options import Recipe
from sparseprune.pruning.patterns import Pattern, Scope
from sparseprune.pruning.report import PruneReport
from sparseprune.streaming.batches import clamp
from sparseprune.streaming.job import Job
from sparseprune.streaming.report import StreamReport
from sparseprune.streaming.source import Source, StreamedModel
from sparseprune.weights.format import Format

__all__ = ["prune_folder"]

SPILL_FOLDER = ".activations"
AUTO = "admm"
"""What `method="auto"` stands for."""


def prune_folder(
    folder: str | Path,
    out: str | Path,
    pattern: str | Pattern = "2:4",
    *,
    method: str | Method = "magnitude",
    sparsity: float | None = None,
    calibration: CalibrationData | Iterable[Batch] | None = None,
    allocation: str | Mapping[str, float | str] = "uniform",
    scope: Scope | None = None,
    sequential: bool | None = None,
    format: str | Format = "auto",
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    memory: int | None = None,
    spill: str | Path | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> StreamReport:
    """Prunes the Hugging Face checkpoint in `folder` and writes it to `out`, for `sparseprune.load`.

    Memory: the weights of one block, the statistics of its layers, the work on one layer, and as many of the calibration
    batches' hidden states as `memory` leaves room for. Every hidden state is on the disk too: after a kill, the same
    call goes on at the block it was in, and the result is the same to the last bit. The weights are those that `prune`
    and `save` give for the same arguments.

    Args:
        folder: config.json and safetensors, in one file or in shards with an index.
        out: made if missing; one shard for each block, one for the rest, an index, config.json and the tokenizer.
        pattern, method, sparsity, calibration, scope, sequential, include, exclude: as for `sparseprune.prune`. Only
            layers in blocks are pruned. Windows longer than the model's positions are cut, and the report says so.
            "auto" is ADMM, without the reconstruction of blocks that it does in memory. Methods that rank by gradients
            need the whole model.
        allocation: "uniform", or a mapping from layer names (or shell patterns) to sparsities or patterns.
        format: of the sparse layers: "auto" is what `sparsify` takes under policy "always": N:M for its pattern, else
            bitmap or CSR, whichever is smaller when packed; a layer stays dense where neither is. Nothing is measured.
        dtype: of the weights; None keeps what the folder states.
        tokenizer: whose files to save along.
        memory: bytes that the process may take; by default three quarters of what is available now.
        spill: folder for the hidden states, by default in `out`; deleted when the stream is finished.
        seed: of what a method draws at random.
        progress: show bars with the time left on stderr.

    Where `torch.distributed` runs several processes, each reads its share of the calibration batches and prunes its
    share of a block's layers; the first one writes.

    Raises:
        ValueError: an argument out of range; a model that has no blocks, or is not a chain of them; a layer that the pattern
            does not fit; a limit on memory too small for a block; an `out` with a model or another run's half.
        CheckpointError: a shard missing or damaged, or a checkpoint that is not that of its config.json.
        OSError: not enough space on the disk.
    """
    begin = clock.now()
    spare_address_space()
    require_path(folder=folder, out=out)
    require_path(optional=True, spill=spill)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype: must be a floating-point torch.dtype, got {dtype}; pass torch.bfloat16, say"
        )
    require_at_least(1, optional=True, memory=memory)
    check_tokenizer(tokenizer)
    folder, out = Path(folder), Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: must be a folder, got the file {out}; name another")
    notes = []
    if method == "auto":
        method = AUTO
        notes.append(f"auto: {AUTO}, the best solver; blocks are reconstructed in memory only")
    recipe = Recipe(
        pattern,
        method,
        sparsity=sparsity,
        allocation=allocation,
        scope=scope,
        sequential=sequential,
        seed=seed,
    )
    pattern, method = Pattern.parse(pattern), find_method(method, seed)
    removed = pattern.resolve_sparsity(sparsity)
    ranked = method.scope if scope is None else scope
    if method.statistic is not None and method.statistic.whole_model:
        raise ValueError(
            f"method: must do without the whole model to be streamed, got {method.name}, whose statistic needs "
            "it; pass wanda, ria, sparsegpt or admm, or prune in memory"
        )
    if method.prepare is not None:
        raise ValueError(
            f"method: must prune each block by itself to be streamed, got {method.name}, whose +permute looks at the whole "
            "model; leave +permute out, or prune in memory"
        )
    if not (allocation == "uniform" or isinstance(allocation, Mapping)):
        raise ValueError(
            f'allocation: must be "uniform" or a mapping to be streamed, got {allocation!r}; others look at the whole model'
        )
    form = None if format == "auto" else Format.parse(format)
    data = None if calibration is None else as_data(calibration)
    recipe.check_calibration(data is not None)
    if spill is not None and method.statistic is None:
        raise ValueError(
            f"spill: is for hidden states, and method {method.name} looks at weights only, got {spill}; leave it out"
        )
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype)
        if data is not None:
            data, cut = clamp(data, max_length(streamed.model))
            notes += [cut] if cut is not None else []
        blocks = find_blocks(streamed.model)
        prefixes = tuple(f"{name}." for name, _ in blocks)
        found = find_sites(streamed.model, include=include, exclude=exclude)
        layers = [layer for layer in found if layer.name.startswith(prefixes)]
        context = AllocationContext(streamed.model, layers, method, pattern, removed, ranked, data)
        targets = resolve_allocation(allocation, context)
        notes += _left_out(found, layers, streamed.unused)
        job = Job(
            streamed, blocks, layers, method, targets, data,
            method.changes_weights if sequential is None else sequential,
            form, out, _spill_folder(out, spill), progress,
        )  # fmt: skip
        with closing(job):
            selection = {"include": include, "exclude": exclude, "allocation": allocation, "seed": seed}
            job.check({"pattern": str(pattern), "sparsity": removed, "scope": ranked, **selection}, memory)
            job.run(begin)
            job.finish(tokenizer)
    pruned = PruneReport.of(
        streamed.model, job.rows(), method, pattern, data, ranked,
        sparsity=removed,
        allocation=allocation_name(allocation),
        inputs=None if data is None else ("sequential" if job.sequential else "dense"),
        notes=tuple(notes),
        seconds=job.state.seconds,
    )  # fmt: skip
    return StreamReport(
        pruned,
        blocks=len(blocks),
        resumed_at=job.resumed_at,
        shards=job.shards,
        bytes_before=source.nbytes,
        bytes_after=job.state.nbytes,
        peak_memory=job.state.peak_memory,
        memory=memory,
        activations=job.activations,
        spilled=job.state.spilled,
        formats=job.state.formats,
        seconds=job.state.seconds,
    )


def _spill_folder(out: Path, spill: str | Path | None) -> Path:
    # one for each output: streams may share a fast disk
    own = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return out / SPILL_FOLDER if spill is None else Path(spill) / f"sparseprune-{own}"


def _left_out(found: Sequence[WeightSite], layers: Sequence[WeightSite], unused: Sequence[str]) -> list[str]:
    notes = []
    outside = [layer.name for layer in found if layer not in layers]
    if outside:
        notes.append(
            f"{len(outside)} linear layers outside of the blocks stay dense, the first is {outside[0]}"
        )
    if unused:
        notes.append(
            f"{len(unused)} tensors of the checkpoint have no place in the model, the first is {unused[0]}"
        )
    return notes
