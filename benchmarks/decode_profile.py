"""Where the time of one token goes: the kernels of the linears, the calls around them, and everything else by kind.

    python benchmarks/decode_profile.py MODEL          # a folder of sparseprune.save(), with a SparseLinear for each linear

A token is decoded once, and what each module was called with is kept. Then each kind of module is called again with that, in
turn with whole tokens, eager ones and compiled ones. What a module takes beside its submodules is the difference.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from layers import Watch, describe, machine_record
from llama_cpp.ours import CACHE_LENGTH
from results import to_json
from torch import nn

import sparseprune as sp
from sparseprune.kernels import native
from sparseprune.models.decoding import compile_decoding
from sparseprune.report import Column, Table
from sparseprune.weights.linear import SparseLinear

PROMPT = 16


class Call(NamedTuple):
    """A module and what it was called with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.module(*self.arguments, **self.options)


def main(
    model: Annotated[Path, typer.Argument(help="Folder that sparseprune.save() wrote.")],
    rounds: Annotated[int, typer.Option(help="Turns of each candidate.")] = 30,
    pause: Annotated[bool, typer.Option(help="Wait for a line on stdin when all is ready.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON in the place of the table.")] = False,
) -> None:
    """Milliseconds of one token, by what takes them."""
    with torch.inference_mode():
        candidates = _candidates(_loaded(model))
        if pause:
            input("READY: press Enter to measure\n")
        watch = Watch()
        medians = _in_turn(candidates, rounds)
        others = watch.others()
    run = {"machine": {**machine_record(), "others_cpu_share": others}, "milliseconds": shares(medians)}
    print(to_json(run) if json_ else table(run))


def _loaded(folder: Path) -> Any:
    """
    Raises:
        ValueError: a linear has no kernel of ours, and its time would count as that of what is around it.
    """
    model = sp.load(folder)
    dense = [name for name, it in model.named_modules() if isinstance(it, nn.Linear)]
    if dense:
        raise ValueError(
            f"model: every linear must be a SparseLinear, {dense[0]} of {folder} is dense; quantize it, and "
            "the head by embeddings='int8'"
        )
    return model


def _candidates(model: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by the names that `shares` knows."""
    from transformers import DynamicCache, StaticCache

    compiled = copy.deepcopy(model)
    compile_decoding(compiled)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    options = {"past_key_values": dynamic, "use_cache": True}
    model(input_ids=ids, **options)
    compiled(input_ids=ids, past_key_values=static, use_cache=True)

    def token() -> Any:
        return model(input_ids=ids[:, :1], **options)

    def compiled_token() -> Any:
        return compiled(input_ids=ids[:, :1], past_key_values=static, use_cache=True)

    compiled_token()
    calls = recorded(model, token)
    linears = [it for it in calls if isinstance(it.module, SparseLinear)]
    attention, mlp, norms = (
        [it for it in calls if _ends(it.module, of)] for of in ("attention", "mlp", "norm")
    )
    blocks = [it for it in calls if any(_ends(child, "attention") for child in it.module.children())]
    inside = _members(blocks)
    kinds: dict[str, Iterable[Callable[[], Any]]] = {
        "kernels": [kernel(it) for it in linears],
        "linears": linears,
        "linears in attention": [it for it in linears if id(it.module) in _members(attention)],
        "linears in mlp": [it for it in linears if id(it.module) in _members(mlp)],
        "attention": attention,
        "mlp": mlp,
        "norms": norms,
        "norms in blocks": [it for it in norms if id(it.module) in inside],
        "blocks": blocks,
        "head": [it for it in linears if id(it.module) not in inside],
    }
    timed = {name: functools.partial(_all, those) for name, those in kinds.items()}
    return {**timed, "token": token, "compiled": compiled_token}


def _ends(module: nn.Module, words: str) -> bool:
    return type(module).__name__.lower().endswith(words)


def _members(calls: Iterable[Call]) -> set[int]:
    """Ids of the modules called, and of all within them."""
    return {id(it) for call in calls for it in call.module.modules()}


def _all(calls: Iterable[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def recorded(model: nn.Module, call: Callable[[], Any]) -> list[Call]:
    """Every call of a submodule inside, in order."""
    found: list[Call] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(Call(module, arguments, options))

    handles = [it.register_forward_pre_hook(keep, with_kwargs=True) for it in model.modules()]
    call()
    for handle in handles:
        handle.remove()
    return [it for it in found if it.module is not model]


def kernel(call: Call) -> Callable[[], Any]:
    """The C++ function behind a call of a `SparseLinear`, its arguments looked up beforehand."""
    layer: Any = call.module
    x, bias, out = call.arguments[0], layer.bias, layer(*call.arguments)
    arguments = (
        layer.packed.data_ptr(), layer.packed.numel(), layer.out_features, layer.in_features, layer.packing, x.data_ptr(),
        x.numel() // layer.in_features, layer.in_features, 0 if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(), -1,
    )  # fmt: skip

    def run(held: Any = (layer.packed, x, bias, out)) -> None:  # what the addresses point to
        native._core.linear(*arguments)

    return run


def _in_turn(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(it) for name, it in times.items()}


def shares(medians: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of one token by what takes them; those of an eager one add up to "eager token"."""
    it = {name: seconds * 1e3 for name, seconds in medians.items()}
    attention, mlp = it["attention"] - it["linears in attention"], it["mlp"] - it["linears in mlp"]
    return {
        "kernels of the linears and the head": it["kernels"],
        "calls around them": it["linears"] - it["kernels"],
        "attention without its linears": attention,
        "MLP without its linears": mlp,
        "norms": it["norms"],
        "residuals and calls of blocks": it["blocks"] - it["attention"] - it["mlp"] - it["norms in blocks"],
        "the model around its blocks": it["token"]
        - it["blocks"]
        - it["head"]
        - (it["norms"] - it["norms in blocks"]),
        "eager token": it["token"],
        "compiled token": it["compiled"],
    }


def table(run: Mapping[str, Any]) -> Table:
    total = run["milliseconds"]["eager token"]
    columns = ["what", Column("ms", ".2f"), Column("of an eager token", ".0%")]
    rows = [(name, value, value / total) for name, value in run["milliseconds"].items()]
    return Table("One token", columns, rows, [describe(run["machine"])])


if __name__ == "__main__":
    typer.run(main)
