"""Beside llama.cpp, on the same cores: tokens per second, bytes and perplexity of its files and of our forms.

    python benchmarks/peers_llama_cpp.py ~/.cache/llama_cpp --out docs/benchmarks-llama-cpp.json

Everything is built, quantized and compiled first (the first time 8 minutes for llama.cpp, and about as much for our forms;
all of it is kept in the cache folder). Then llama-bench and ours take turns, one after the other in each round, and the medians
are recorded. llama.cpp's files of SmolLM2 but the shipped one are made from that one, by its own llama-quantize.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from layers import Watch, describe, machine_record
from llama_cpp import build, ours, shapes, tools
from results import to_json

import sparseprune as sp
from sparseprune.demo import demo_texts
from sparseprune.io.checkpoint import WEIGHTS_FILE, load_tokenizer
from sparseprune.io.inspection import memory_bytes
from sparseprune.models.loading import demo_model_path
from sparseprune.report import Column, Table, track

KINDS = ("Q8_0", "Q4_0", "Q3_K_M", "Q2_K")
"""What the shipped Q4_1 file is made into, too."""

PROMPT, NEW = 512, 64
WINDOW, WINDOWS = 1024, 8

MODELS = {"SmolLM2": "SmolLM2-135M-Instruct", "Llama-1B": "Llama-3.2-1B's shape, random weights"}


def main(
    cache: Annotated[Path, typer.Argument(help="Folder for all that is downloaded, built and quantized.")],
    model: Annotated[Literal["SmolLM2", "Llama-1B"], typer.Option(help="Which one to measure.")] = "SmolLM2",
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.")] = 3,
    quality: Annotated[bool, typer.Option(help="Perplexities, too (SmolLM2 only).")] = True,
    pause: Annotated[bool, typer.Option(help="Wait for a line on stdin when all is ready.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON in the place of the table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; the other model's results in it are kept.")
    ] = None,
) -> None:
    """Tokens per second at batch 1, of a prompt of 512, bytes and perplexity: llama.cpp and this package."""
    folder = build.build(cache)
    threads = torch.get_num_threads()
    prepare = _smollm2 if model == "SmolLM2" else _random_llama
    files, candidates, records = prepare(folder, cache, quality, threads)
    if pause:
        input("READY: press Enter to measure\n")
    watch = Watch()
    _measure(folder, files, candidates, records, rounds, threads)
    others = watch.others()
    machine = {**machine_record(), "others_cpu_share": others}
    run = {"llama_cpp": build.version(cache), "machine": machine, "rounds": rounds, "records": records}
    if out is not None:
        kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        out.write_text(to_json({**kept, model: run}), encoding="utf-8")
    print(to_json({model: run}) if json_ else table(MODELS[model], run))


Records = list[dict[str, Any]]


def _smollm2(
    folder: Path, cache: Path, quality: bool, threads: int
) -> tuple[dict[str, Path], dict[str, ours.Candidate], Records]:
    source = demo_model_path()
    files = {
        "Q4_1, as shipped": source,
        **{it: tools.requantize(folder, source, it, cache) for it in KINDS},
    }
    text = cache / "held_out.txt"
    text.write_text(demo_texts()[1], encoding="utf-8")
    records, candidates = [], {}
    for name, file in track(list(files.items()), "llama.cpp's files"):
        record = _record("llama.cpp", name, file.stat().st_size)
        if quality:
            record["perplexity"] = tools.perplexity(
                folder, file, text, threads=threads, window=WINDOW, windows=WINDOWS
            )
        records.append(record)
    for form in track(ours.FORMS, "our forms"):
        place = ours.made(form, source, cache)
        model = sp.load(place)
        record = _record("sparseprune", form.name, (place / WEIGHTS_FILE).stat().st_size)
        if quality:
            tokenizer = load_tokenizer(place)
            record["perplexity"] = ours.second_halves(model, text.read_text(), tokenizer, WINDOW, WINDOWS)
        records.append(record)
        candidates[form.name] = ours.Candidate(model)
    return files, candidates, records


def _random_llama(
    folder: Path, cache: Path, quality: bool, threads: int
) -> tuple[dict[str, Path], dict[str, ours.Candidate], Records]:
    file = shapes.write_gguf(cache / "llama-1b.Q4_0.gguf", shapes.LLAMA_1B)
    records, candidates = [_record("llama.cpp", "Q4_0", file.stat().st_size)], {}
    dense = shapes.random_model(shapes.LLAMA_1B)
    for form in track(ours.SHAPE_FORMS, "our forms"):
        model = ours.in_form(dense, form)
        records.append(_record("sparseprune", form.name, memory_bytes(model)))
        candidates[form.name] = ours.Candidate(model)
    del dense
    gc.collect()
    return {"Q4_0": file}, candidates, records


def _record(by: str, form: str, size: int) -> dict[str, Any]:
    return {"by": by, "form": form, "bytes": size}


def _measure(
    folder: Path,
    files: Mapping[str, Path],
    candidates: Mapping[str, ours.Candidate],
    records: Records,
    rounds: int,
    threads: int,
) -> None:
    """Adds medians in tokens per second to the records; the extremes, too."""
    samples: dict[tuple[str, str, str], list[float]] = {}

    def add(by: str, form: str, **speeds: float) -> None:
        for what, speed in speeds.items():
            samples.setdefault((by, form, what), []).append(speed)

    for _ in track(range(rounds), "tokens per second"):
        for name, file in files.items():
            decode, prompt = tools.speeds(folder, file, threads=threads, prompt=PROMPT, new=NEW)
            add("llama.cpp", name, decode=decode, prompt=prompt)
        for name, it in candidates.items():
            decode, compiled, prompt = it.generated(NEW), it.compiled(NEW), it.prompt(PROMPT)
            add("sparseprune", name, decode=decode, compiled=compiled, prompt=prompt)
    for record in records:
        for what in ("decode", "compiled", "prompt"):
            values = samples.get((record["by"], record["form"], what))
            if values:
                record[what] = statistics.median(values)
                record[f"{what}_range"] = [min(values), max(values)]


def table(title: str, run: Mapping[str, Any]) -> Table:
    """One row for each file and form; ours have two speeds of decoding."""

    def cell(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda it: it.get(key)

    columns = [
        Column("by", value=cell("by")),
        Column("weights", value=cell("form")),
        Column("MB", ".0f", lambda it: it["bytes"] / 1e6),
        Column("perplexity", ".2f", cell("perplexity")),
        Column("tokens/s", ".1f", cell("decode")),
        Column("compiled", ".1f", cell("compiled")),
        Column("prompt of 512", ".0f", cell("prompt")),
    ]
    footer = [
        f"llama.cpp of {run['llama_cpp']}, llama-bench; medians of {run['rounds']} rounds in turn, tokens per second at batch 1",
        describe(run["machine"]),
    ]
    return Table.of(title, columns, run["records"], footer)


if __name__ == "__main__":
    typer.run(main)
