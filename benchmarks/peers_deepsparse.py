"""Beside DeepSparse 1.8.0, a sparse inference engine for CPUs that has reached its end of life.

It wants an environment of its own (Python 3.11, numpy < 2):

    python3.11 -m venv deepsparse-env
    deepsparse-env/bin/pip install deepsparse==1.8.0 "numpy<2" onnx==1.14.1 sparsezoo==1.8.0
    python benchmarks/peers_deepsparse.py deepsparse-env/bin/python

Both run a chain of linears with different weights of the same sparsity, so that no weight stays in a core's cache;
they take turns, one stretch of calls each, while the other process sleeps.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from layers import Watch, describe, machine_record, pruned_weight
from results import to_json
from torch import nn

from sparseprune.report import Column, Table, track
from sparseprune.weights.linear import SparseLinear

CASES = (("2:4", 0.5, ("2:4",)), ("70%", 0.7, ("bitmap",)), ("90%", 0.9, ("bitmap", "csr")))
"""Zeros, their share, and our formats for them."""

BATCHES = (1, 8, 32, 128)
LIMIT = 1.05
"""Seconds over DeepSparse's to stay below."""

_SETTLE = 0.02  # seconds: idle threads of the other process spin a while before they sleep
_STRETCH = 0.15  # seconds of calls in one turn


def main(
    python: Annotated[Path, typer.Argument(help="The python of the environment that has deepsparse.")],
    side: Annotated[int, typer.Option(help="Weights are [side, side].")] = 4096,
    layers: Annotated[int, typer.Option(help="Length of the chain.")] = 8,
    turns: Annotated[int, typer.Option(help="Stretches of calls for each.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Milliseconds a layer, fp32, of DeepSparse and of this package at the same sparsity."""
    torch.manual_seed(0)
    watch, records = Watch(), []
    machine = machine_record()
    worker = Worker(python)
    try:
        cells = [(case, batch) for case in CASES for batch in BATCHES]
        chains: dict[str, nn.Sequential] = {}
        for (name, sparsity, forms), batch in track(cells, "DeepSparse and ours"):
            if batch == BATCHES[0]:
                chains = {form: _chain(form, sparsity, side, layers) for form in forms}
            worker.ask(
                task="compile", form=name, sparsity=sparsity, side=side, layers=layers, batch=batch,
                threads=torch.get_num_threads(),
            )  # fmt: skip
            records += _compete(worker, chains, name, batch, side, layers, turns)
    finally:
        version = worker.close()
    machine["others_cpu_share"] = watch.others()
    run = {"machine": machine, "deepsparse": version, "layers": layers, "records": records}
    print(table(run))
    if out is not None:
        out.write_text(to_json(run))


def table(run: dict[str, Any]) -> Table:
    columns: list[Column | str] = [
        "zeros", "our format", "shape", "B", Column("DeepSparse ms", ".3f"), Column("ours ms", ".3f"), Column("speed-up", ".2f"),
        "reached",
    ]  # fmt: skip
    rows = [
        (
            it["zeros"],
            it["format"], tuple(it["shape"]), it["batch"], it["deepsparse_seconds"] * 1e3, it["sparse_seconds"] * 1e3,
            it["speedup"], "yes" if it["speedup"] >= 1 / LIMIT else "NO",
        )
        for it in run["records"]
    ]  # fmt: skip
    footer = [
        f"{run['deepsparse']}; a chain of {run['layers']} fp32 layers, medians a layer",
        describe(run["machine"]),
    ]
    return Table("DeepSparse beside ours", columns, rows, footer)


@torch.no_grad()
def _compete(
    worker: Worker,
    chains: dict[str, nn.Sequential],
    name: str,
    batch: int,
    side: int,
    layers: int,
    turns: int,
) -> list[dict[str, Any]]:
    x = torch.randn(batch, side)
    theirs: list[float] = []
    ours: dict[str, list[float]] = {form: [] for form in chains}
    for _ in range(turns):
        time.sleep(_SETTLE)
        theirs += worker.ask(task="run", seconds=_STRETCH)
        time.sleep(_SETTLE)
        for form, chain in chains.items():
            ours[form] += _stretch(functools.partial(chain, x))
    other = statistics.median(theirs) / layers
    records = []
    for form, times in ours.items():
        sparse = statistics.median(times) / layers
        records.append(
            {
                "zeros": name, "format": form, "shape": [side, side], "batch": batch, "deepsparse_seconds": other,
                "sparse_seconds": sparse, "speedup": other / sparse, "calls": [len(theirs), len(times)],
            }
        )  # fmt: skip
    return records


def _stretch(call: Any, seconds: float = _STRETCH) -> list[float]:
    """Seconds of each call; the first is not counted, the cache is the other's then."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _chain(form: str, sparsity: float, side: int, layers: int) -> nn.Sequential:
    chain = nn.Sequential()
    scale = (side * (1 - sparsity)) ** -0.5  # values keep their size along the chain
    for index in range(layers):
        linear = nn.Linear(side, side, bias=False)
        linear.weight.data = pruned_weight(side, side, torch.float32, form, sparsity, seed=index) * scale
        chain.append(SparseLinear.from_dense(linear, form))
    return chain


class Worker:
    """The other environment's process, which speaks lines of JSON."""

    def __init__(self, python: Path) -> None:
        environment = {**os.environ, "NM_DISABLE_ANALYTICS": "1"}
        environment.pop("PYTHONPATH", None)
        script = Path(__file__).with_name("_deepsparse_worker.py")
        self._process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._version: str = self._answer()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> str:
        self._process.communicate()
        return self._version

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"python: the DeepSparse process ended with code {self._process.wait()}; see above"
            )
        return json.loads(line)


if __name__ == "__main__":
    typer.run(main)
