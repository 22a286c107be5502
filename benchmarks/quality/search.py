"""Allocations at equal size: uniform, OWL, sensitivity curves and a search, on text that none of them has seen.

python benchmarks/quality/search.py --calibration TEXT --text OTHER_TEXT --out docs/quality-search.json
"""

from __future__ import annotations

import copy
import time
from typing import Any

from protocol import arguments, read_results, setup, write_results

import sparseprune as sp
from sparseprune.models.sites import find_sites
from sparseprune.pruning.allocation import AllocationContext, Search
from sparseprune.pruning.allocation.search import layer_seconds, packed_bytes
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.patterns import Pattern
from sparseprune.report import Column, Table, human_bytes

ALLOCATIONS = ("uniform", "owl", "sensitivity", "search", "search by time")
"""The last one has the time of uniform's layers at batch 1 to spend, as measured here, not its bytes."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--allocations", nargs="*", default=ALLOCATIONS)
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="for a search, and for sensitivity curves"
    )
    options = parser.parse_args()
    protocol = setup(options)
    for method in options.methods:
        for allocation in options.allocations:
            results = read_results(options.out)
            cells = results.setdefault(f"{options.sparsity:.0%}", {}).setdefault(method, {})
            if allocation in cells:
                continue
            model = copy.deepcopy(protocol.model)
            begin = time.perf_counter()
            chosen: Any = allocation
            if allocation.startswith("search"):
                budget = uniform_seconds(model, options.sparsity) if allocation == "search by time" else None
                chosen = Search(minutes=options.minutes, seconds=budget)
            # minutes would bound the method as well: only what looks for an allocation is told
            limit = {"minutes": options.minutes} if allocation == "sensitivity" else {}
            report = sp.prune(
                model, "unstructured", method, sparsity=options.sparsity, calibration=protocol.calibration(), allocation=chosen,
                progress=True, **limit,
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            layers = find_sites(model)
            zeros = {
                layer.name: 1 - int(layer.weight.count_nonzero()) / layer.weight.numel() for layer in layers
            }
            cells[allocation] = {
                "perplexity": protocol.perplexity(model),
                "bytes": round(sum(packed_bytes(layer, zeros[layer.name]) for layer in layers)),
                "zeros": report.sparsity_after,
                "seconds": seconds,
                "layers": zeros,
                "losses": chosen.losses if isinstance(chosen, Search) else None,
            }
            write_results(options.out, results)
            print(table(results), flush=True)


def uniform_seconds(model: Any, sparsity: float) -> float:
    """One pass through all layers at batch 1, each in its fastest format, all of one sparsity."""
    context = AllocationContext(model, find_sites(model), find_method("wanda"), Pattern(), sparsity, "row")
    return sum(times[0] for times in layer_seconds(context, [sparsity], 1).values())


def table(results: dict[str, Any]) -> str:
    rows = []
    for sparsity, methods in results.items():
        for method, cells in methods.items():
            base = cells.get("uniform", {}).get("perplexity")
            for name, cell in cells.items():
                gain = None if base is None else cell["perplexity"] / base - 1
                minutes = cell["seconds"] / 60
                rows.append(
                    (sparsity, method, name, cell["perplexity"], gain, cell["zeros"], cell["bytes"], minutes)
                )
    columns: list[Column | str] = [
        "zeros asked", "method", "allocation", Column("perplexity", ".2f"), Column("against uniform", "+.1%"),
        Column("zeros", ".3%"), Column("packed", human_bytes), Column("minutes", ".1f"),
    ]  # fmt: skip
    return Table("Allocations at equal size", columns, rows).render()


if __name__ == "__main__":
    main()
