"""`sparseprune prune` on a checkpoint that is streamed, not loaded."""

from __future__ import annotations

from pathlib import Path

from sparseprune.cli import console
from sparseprune.cli.options import DType
from sparseprune.cli.windows import calibration_data
from sparseprune.options import Layers, Windowing
from sparseprune.pruning.options import Recipe
from sparseprune.weights.options import Conversion

__all__ = ["prune_streamed", "wanted"]


def wanted(model: Path, stream: bool | None, memory: str | None, spill: Path | None) -> bool:
    """Whether to stream MODEL: if asked for, or if its weights take more than half of the memory there is."""
    from sparseprune.io.shards import INDEX_FILE, WEIGHTS_FILE
    from sparseprune.memory import available_memory
    from sparseprune.report import human_bytes

    if stream is False and (memory is not None or spill is not None):
        raise ValueError("--memory, --spill: go with --stream, got --no-stream; leave them out")
    if stream is not None:
        return stream
    if memory is not None or spill is not None:
        return True
    folder = (model / "config.json").is_file() and any(
        (model / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)
    )
    available = available_memory()
    if not folder or available is None:
        return False
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if size <= available // 2:
        return False
    console.say(
        f"{model} has {human_bytes(size)} of weights, more than half of the {human_bytes(available)} available: it is "
        "streamed block by block (--no-stream loads it)"
    )
    return True


def prune_streamed(
    model: Path,
    out: Path,
    recipe: Recipe,
    windowing: Windowing,
    layers: Layers,
    *,
    text: str | None,
    conversion: Conversion,
    dtype: DType,
    memory: str | None,
    spill: Path | None,
    as_json: bool,
) -> None:
    """Prunes MODEL into OUT and shows the report; `text` is what it is calibrated on."""
    import torch

    from sparseprune.io.checkpoint import load_tokenizer
    from sparseprune.io.shards import STREAM_FILE
    from sparseprune.io.skeleton import read_config
    from sparseprune.memory import parse_size, spare_address_space
    from sparseprune.processes import rank
    from sparseprune.streaming import prune_folder

    unfit = {
        "--lm-head": layers.lm_head,
        "--reconstruct": recipe.reconstruction,
        "--minutes": recipe.minutes is not None,
        "--schedule": recipe.schedule != "one-shot",
        "--batch": conversion.batch is not None,
        "--seconds": conversion.seconds is not None,
    }
    given = [name for name, used in unfit.items() if used]
    if given:
        raise ValueError(f"{given[0]}: needs the whole model in memory; leave it out, or pass --no-stream")
    limit_bytes = None if memory is None else parse_size(memory)
    if not (model / "config.json").is_file():
        raise ValueError(f"MODEL: must be a Hugging Face folder to be streamed, {model} has no config.json")
    spare_address_space()  # before the tokenizer's threads
    tokenizer = load_tokenizer(model)
    data = None
    if text is not None:
        limit = getattr(read_config(model), "max_position_embeddings", None)
        data = calibration_data(text, tokenizer, windowing, recipe.seed, limit)
    first = rank() == 0
    try:
        report = prune_folder(
            model, out, recipe.pattern, method=recipe.method, sparsity=recipe.sparsity, calibration=data,
            include=layers.include, exclude=layers.exclude, allocation=recipe.allocation, scope=recipe.scope,
            sequential=recipe.sequential, seed=recipe.seed, format=conversion.format,
            dtype=None if dtype is DType.auto else getattr(torch, dtype.value), tokenizer=tokenizer,
            memory=limit_bytes, spill=spill, progress=first,
        )  # fmt: skip
    except KeyboardInterrupt:
        if (out / STREAM_FILE).is_file():
            console.say(f"interrupted; the same command goes on where it was, or delete {out}")
        raise
    if not first:
        return
    lines = [*report.pruned.table().footer, *report.footer(), f"saved in {out}"]
    console.out({**report.to_dict(), "saved": str(out)}, lambda: "\n".join(lines), as_json)
