"""No argument is accepted and ignored: for each one of every public function and class there is a call that shows it counts.

A new argument without an entry in the tables fails `test_each_argument_has_an_entry`, and an entry is executed: the call
must refuse the value, or give something else than without it.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType

import pytest
import torch
from helpers import checkpoints, tiny
from helpers.arguments import Call, Changes, Made, Refused, Shows, check
from helpers.clocks import ticking
from helpers.codes import random_codes
from helpers.recovery import peaked, pruned_pair, stream
from helpers.words import TEXT, tiny_tokenizer
from torch import nn

import sparseprune as sp
from sparseprune.kernels import ops
from sparseprune.measure.benchmark import time_model
from sparseprune.measure.fidelity import fidelity, layer_errors
from sparseprune.models.sites import EmbeddingSite
from sparseprune.pruning import Pattern
from sparseprune.pruning import allocation as allocations
from sparseprune.pruning.allocation import Search
from sparseprune.pruning.schedules import Gradual, Greedy, LotteryTicket
from sparseprune.recovery import Checkpointing, Distillation, TokenStream, Training
from sparseprune.report import Report

LLAMA = Made(lambda folder: tiny.llama())
DATA = Made(lambda folder: [tiny.ids(2, 16, seed=it) for it in range(3)])
PRUNED = Made(lambda folder: pruned_pair()[0])
TEACHER = Made(lambda folder: peaked())
STREAM = Made(lambda folder: stream())
NONE = Made(lambda folder: nn.ReLU())
CHECKPOINT = Made(lambda folder: checkpoints.save(tiny.llama(), folder / "in"))
SAVED = Made(lambda folder: saved(folder / "in"))
HALF = {"pattern": "unstructured", "sparsity": 0.5}
EXACT = Training(autocast=None)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(folder):
    model = tiny.llama()
    sp.prune(model)
    sp.sparsify(model, policy="always")
    sp.save(model, folder, tiny_tokenizer())
    return folder


def loss(model):
    with torch.no_grad():
        return float(model(tiny.ids()).logits.square().mean())


def nudge(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def own_loss(output, batch):
    return output.logits.square().mean()


def held(**arguments):
    """`hold_zeros`, and a loop inside that would move them."""
    model = arguments["model"]
    with sp.pruning.hold_zeros(**arguments) as zeros:
        nudge(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    return zeros.count


LAYERS = {"include": Refused("nothing"), "exclude": Refused("nothing"), "lm_head": Changes(True)}
WANDA = {"method": "wanda", "calibration": DATA}

CUT = {
    "calibration": Refused(None, beside={"criterion": "obs"}),
    "include": Refused("nothing"),
    "exclude": Refused("nothing"),
    "loss": Refused(own_loss),
    "seed": Changes(1, {"criterion": "random"}),
    "progress": Shows({"criterion": "taylor", "calibration": DATA}),
}
REMOVE = CUT | {
    "model": Refused(Made(lambda folder: nn.Conv2d(3, 3, 3)), "Conv2d"),
    "criterion": Refused("magnitude"),
    "compensate": Refused(True),
    "sequential": Refused(True),
}

FUNCTIONS = {
    sp.prune: Call(
        sp.prune,
        {"model": LLAMA, **HALF},
        {
            "model": Refused(NONE),
            "pattern": Refused("3:2"),
            "method": Refused("wonder"),
            "sparsity": Refused(1.5),
            "calibration": Refused("a text", beside={"method": "wanda"}),
            **LAYERS,
            "scope": Changes("row"),
            "allocation": Refused("fair"),
            "sequential": Refused(True),
            "reconstruction": Refused("yes"),
            "schedule": Refused("nonsense"),
            "recover": Refused(nudge),
            "evaluate": Refused(loss),
            "minutes": Refused(5),
            "seed": Changes(1, {"method": "random"}),
            "progress": Shows(),
        },
    ),
    sp.cut: Call(
        sp.cut,
        {"model": LLAMA, "structure": "heads", "fraction": 0.5},
        CUT
        | {
            "model": Refused(Made(lambda folder: tiny.lstm_classifier())),
            "structure": Refused("tails"),
            "fraction": Refused(1.5),
            "criterion": Refused("influence"),
        },
    ),
    sp.surgery.remove_neurons: Call(
        sp.surgery.remove_neurons,
        {"model": LLAMA, "fraction": 0.5, "criterion": "l1"},
        REMOVE | {"fraction": Refused(0), "multiple_of": Changes(1, {"fraction": 0.4})},
    ),
    sp.surgery.remove_heads: Call(
        sp.surgery.remove_heads,
        {"model": LLAMA, "fraction": 0.5, "criterion": "l1"},
        REMOVE | {"model": Refused(Made(lambda folder: tiny.lstm_classifier())), "fraction": Refused(0), "unit": Changes("query")},
    ),
    sp.surgery.remove_layers: Call(
        sp.surgery.remove_layers,
        {"model": LLAMA, "count": 1, "criterion": "l1"},
        {name: it for name, it in REMOVE.items() if name != "sequential"}
        | {
            "model": Refused(Made(lambda folder: tiny.lstm_classifier())),
            "calibration": Refused(None, beside={"criterion": "influence"}),
            "count": Refused(7),
            "shortlist": Refused(1),
        },
    ),
    sp.recover: Call(
        sp.recover,
        {"model": PRUNED, "data": STREAM, "steps": 2, "training": EXACT},
        {
            "model": Refused(Made(lambda folder: sp.load(saved(folder / "in")))),
            "data": Refused("some text", "TokenStream"),
            "teacher": Changes(TEACHER),
            "steps": Changes(3),
            "minutes": Refused(1.0),
            "distillation": Refused(0.5),
            "training": Refused(0.5),
            "include": Refused("nothing"),
            "exclude": Refused("nothing"),
            "lm_head": Changes(True, {"model": Made(lambda folder: with_zeros_in_the_head())}),
            "evaluate": Changes(loss),
            "evaluate_every": Changes(1, {"evaluate": loss}),
            "checkpoint": Changes(Made(lambda folder: folder / "run")),
            "seed": Changes(1),
            "progress": Shows(),
        },
    ),
    sp.sparsify: Call(
        sp.sparsify,
        {"model": PRUNED, "policy": "always"},
        {
            "model": Refused(NONE),
            "format": Changes("bitmap"),
            "policy": Refused("never"),
            "batch": Refused(8),
            **LAYERS,
            "seconds": Refused(1.0),
            "progress": Shows(),
        },
    ),
    sp.quantize: Call(
        sp.quantize,
        {"model": LLAMA, "method": "nearest"},
        {
            "model": Refused(NONE),
            "encoding": Changes("int8"),
            "method": Refused("gptq", "calibration"),
            "group_size": Changes(32, {"model": Made(lambda folder: tiny.llama(intermediate_size=256))}),
            "scale_dtype": Changes("bfloat16"),
            "calibration": Refused(DATA),
            "keep": Refused("no/such/file"),
            "embeddings": Changes("int8"),
            "reconstruction": Changes(True, {"method": "gptq", "calibration": DATA}),
            "minutes": Refused(1.0, "minutes: bounds what is solved"),
            **LAYERS,
            "progress": Shows(),
        },
    ),
    sp.compress: Call(
        lambda **arguments: compress_by_ticks(**arguments),
        {"model": TEACHER, "budget": "12 bits", "calibration": DATA, "minutes": 0.05},
        {
            "model": Refused(NONE),
            "budget": Changes("10 bits"),
            "calibration": Refused([tiny.ids(1, 16)], "at least 2 batches"),
            "minutes": Refused(0),
            "keep": Refused("no/such/file"),
            "include": Refused("nothing"),
            "exclude": Refused("nothing"),
            "seed": Changes(1),
            "progress": Shows(),
        },
    ),
    sp.save: Call(
        sp.save,
        {"model": LLAMA, "directory": Made(lambda folder: folder / "out")},
        {
            "model": Refused(Made(lambda folder: nn.Linear(2, 2).to("meta"))),
            "directory": Refused(__file__),
            "tokenizer": Changes(tiny_tokenizer()),
            "progress": Refused(lambda: None, "positional"),
        },
    ),
    sp.load: Call(
        sp.load,
        {"directory": SAVED},
        {
            "directory": Refused(Made(lambda folder: folder / "nowhere"), "no such folder"),
            "model": Refused(Made(lambda folder: tiny.llama(layers=3))),
            "progress": Refused(lambda: None, "positional"),
        },
    ),
    sp.perplexity: Call(
        sp.perplexity,
        {"model": LLAMA, "tokenizer": tiny_tokenizer(), "text": TEXT, "window": 32, "max_windows": 4},
        {
            "model": Changes(TEACHER),
            "tokenizer": Refused(None),
            "text": Changes(TEXT[40:]),
            "window": Changes(16),
            "max_windows": Changes(2),
            "stride": Changes(8),
            "text_name": Changes("the cat"),
            "progress": Shows(),
        },
    ),
    sp.tasks.zero_shot: Call(
        sp.tasks.zero_shot,
        {"model": LLAMA, "tokenizer": tiny_tokenizer(), "tasks": "tiny_choice"},
        {
            "model": Refused(NONE),
            "tokenizer": Refused(None),
            "tasks": Refused([]),
            "shots": Refused(-1),
            "limit": Refused(0),
            "batch_size": Refused(0),
            "folder": Refused("nowhere/at/all"),
        },
    ),
    sp.streaming.prune_folder: Call(
        sp.streaming.prune_folder,
        {"folder": CHECKPOINT, "out": Made(lambda folder: folder / "out"), **HALF},
        {
            "folder": Refused(Made(lambda folder: folder / "nowhere"), "must hold model.safetensors"),
            "out": Refused(__file__),
            "pattern": Refused("3:2"),
            "method": Refused("wonder"),
            "sparsity": Refused(1.5),
            "calibration": Refused("a text", beside={"method": "wanda"}),
            "include": Refused("nothing"),
            "exclude": Refused("nothing"),
            "allocation": Refused("owl"),
            "scope": Changes("row"),
            "sequential": Refused(True),
            "seed": Changes(1, {"method": "random"}),
            "format": Changes("csr"),
            "dtype": Changes(torch.bfloat16),
            "tokenizer": Changes(tiny_tokenizer()),
            "memory": Refused(1000),
            "spill": Refused(__file__, "spill|File exists|Not a directory"),
            "progress": Shows(),
        },
    ),
    sp.calibration.windows: Call(
        sp.calibration.windows,
        {"text": TEXT, "tokenizer": tiny_tokenizer(), "length": 16, "count": 2},
        {
            "text": Changes(TEXT[40:]),
            "tokenizer": Refused(None),
            "length": Refused(0),
            "count": Refused(10**6, "windows of"),
            "seed": Changes(1),
        },
    ),
    sp.calibration.token_ids: Call(
        sp.calibration.token_ids,
        {"text": TEXT, "tokenizer": tiny_tokenizer()},
        {"text": Changes(TEXT[40:]), "tokenizer": Refused(None)},
    ),
    sp.calibration.as_data: Call(
        sp.calibration.as_data, {"calibration": DATA}, {"calibration": Refused("a text")}
    ),
    sp.models.compile_decoding: Call(
        sp.models.compile_decoding, {"model": LLAMA}, {"model": Refused(NONE, "must be a language model")}
    ),
    sp.models.find_blocks: Call(
        sp.models.find_blocks, {"model": LLAMA}, {"model": Changes(Made(lambda folder: tiny.llama(layers=3)))}
    ),
    sp.models.find_sites: Call(
        sp.models.find_sites,
        {"model": LLAMA},
        {
            "model": Changes(NONE),
            "include": Refused("nothing"),
            "exclude": Refused("nothing"),
            "lm_head": Changes(True),
            "kinds": Changes([EmbeddingSite]),
        },
    ),
    sp.models.load_dense: Call(
        sp.models.load_dense,
        {"path": CHECKPOINT},
        {"path": Refused("nowhere/at/all", "nowhere"), "dtype": Refused(torch.int8)},
    ),
    sp.pruning.hold_zeros: Call(
        held,
        {"model": PRUNED},
        {
            "model": Refused(LLAMA),
            "optimizer": Refused("adamw"),
            "layers": Refused([], "model"),
        },
    ),
    sp.pruning.mask_from_scores: Call(
        sp.pruning.mask_from_scores,
        {"scores": torch.rand(4, 8), "pattern": "unstructured", "sparsity": 0.5},
        {
            "scores": Refused(torch.ones(3)),
            "pattern": Refused("3:2"),
            "sparsity": Refused(1.5),
            "scope": Refused("model"),
        },
    ),
    sp.recovery.to_dense: Call(
        sp.recovery.to_dense, {"model": LLAMA}, {"model": Changes(Made(lambda folder: sp.load(saved(folder / "in"))))}
    ),
    allocations.allocation_name: Call(
        allocations.allocation_name, {"allocation": "owl"}, {"allocation": Changes({"*": 0.5})}
    ),
    allocations.check_allocation: Call(
        allocations.check_allocation,
        {"allocation": "owl", "pattern": Pattern()},
        {"allocation": Refused("fair"), "pattern": Refused(Pattern.parse("2:4"))},
    ),
    allocations.needs_calibration: Call(
        allocations.needs_calibration, {"allocation": "std"}, {"allocation": Changes("owl")}
    ),
    allocations.searches: Call(allocations.searches, {"allocation": "std"}, {"allocation": Changes("search")}),
    allocations.resolve_allocation: Call(
        allocations.resolve_allocation,
        {"allocation": "uniform", "context": Made(lambda folder: context(0.5))},
        {"allocation": Refused("fair"), "context": Changes(Made(lambda folder: context(0.25)))},
    ),
    time_model: Call(
        time_model,
        {"model": PRUNED, "seconds": 0.01, "tokens": False},
        {
            "model": Changes(NONE),
            "format": Refused("3-4"),
            "batch": Refused(0),
            "seconds": Refused(0),
            "tokens": Refused(True, beside={"model": Made(lambda folder: tiny.lstm_classifier())}),
            "progress": Shows(),
        },
    ),
    fidelity: Call(
        fidelity,
        {"model": PRUNED, "reference": TEACHER, "tokenizer": tiny_tokenizer(), "text": TEXT, "window": 32, "max_windows": 4},
        {
            "model": Changes(TEACHER),
            "reference": Changes(PRUNED),
            "tokenizer": Refused(None),
            "text": Changes(TEXT[40:]),
            "window": Changes(16),
            "max_windows": Changes(2),
            "stride": Changes(8),
            "text_name": Changes("the cat"),
            "progress": Shows(),
        },
    ),
    layer_errors: Call(
        layer_errors,
        {"model": PRUNED, "reference": TEACHER, "batches": DATA},
        {
            "model": Changes(TEACHER),
            "reference": Changes(PRUNED),
            "batches": Refused([]),
            "progress": Shows(),
        },
    ),
}  # fmt: skip


def context(sparsity):
    model = tiny.llama()
    method = sp.pruning.METHODS["magnitude"]
    return allocations.AllocationContext(
        model, sp.models.find_sites(model), method, Pattern(), sparsity, "row"
    )


def with_zeros_in_the_head():
    model, _ = pruned_pair()
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    return model


def recovered(**training):
    return sp.recover(
        pruned_pair(tiny.gpt2)[0], stream(), steps=3, training=Training(**{"autocast": None} | training)
    )


def distilled(teacher=True, **weights):
    model, dense = pruned_pair()
    return [sp.recover(model, stream(), teacher=dense if teacher else None, steps=2, training=EXACT, distillation=Distillation(**weights)), model]  # fmt: skip


def kept(folder, **options):
    """Two runs with one checkpoint: what the second found."""
    model, _ = pruned_pair()
    where = Checkpointing(folder, **options)
    for _ in range(2):
        report = sp.recover(pruned_pair()[0], stream(), steps=2, training=EXACT, checkpoint=where)
    return report.resumed_at, model


def pruned_by(**recipe):
    model = tiny.llama()
    recipe = sp.pruning.Recipe(**recipe)
    return [
        sp.prune(model, **vars(recipe), calibration=DATA.make(None) if recipe.reads_calibration else None),
        model,
    ]


def reconstructed(**options):
    model = tiny.llama()
    how = sp.pruning.Reconstruction(**options)
    return [sp.prune(model, "2:4", reconstruction=how, calibration=DATA.make(None)), model]


def quantized(**options):
    model = tiny.llama()
    return [sp.quantize(model, **vars(sp.quantization.Quantization(**options))), model]


def compress_by_ticks(**arguments):
    with ticking(0.1):
        return sp.compress(**arguments)


def compressed(**options):
    model = peaked()
    given = vars(sp.compression.Compression(**options))
    return [compress_by_ticks(model=model, calibration=DATA.make(None), **given), model]


def scheduled(schedule):
    model = tiny.llama()
    return [sp.prune(model, **HALF, schedule=schedule, evaluate=loss, recover=nudge), model]


def ticket(**options):
    model = tiny.lstm_classifier()
    seen = []
    LotteryTicket(**options).run(model, lambda it, start, stop: (seen.append((start, stop)), nudge(it)), 0.5)
    return [seen, model]


def searched(**options):
    model = tiny.llama()
    data = [tiny.ids(8, 32, seed=it) for it in range(4)]
    return [sp.prune(model, **HALF, allocation=Search(**{"trials": 8} | options), calibration=data), model]


CLASSES = {
    Training: Call(
        recovered,
        {},
        {
            "learning_rate": Changes(1e-2),
            "windows": Changes(3),
            "accumulate": Refused(3),
            "warmup": Changes(0.9),
            "final": Changes(1.0),
            "clip": Changes(1e-3),
            "optimizer": Changes("sgd"),
            "train": Changes("all"),
            "lora": Changes(2),
            "autocast": Changes("bfloat16"),
            "compile": Refused("yes"),
            "dropout": Changes(True),
        },
    ),
    Distillation: Call(
        distilled,
        {},
        {
            "cross_entropy": Changes(0.5),
            "logits": Changes(0.5),
            "temperature": Changes(2.0),
            "hidden": Changes(0.5),
            "loss": Changes(own_loss),
        },
    ),
    Checkpointing: Call(
        kept,
        {"folder": Made(lambda folder: folder.with_name(f"{folder.name} run"))},
        {"folder": Refused(__file__, "checkpoint: must be a folder"), "every": Refused(0), "resume": Changes(False)},
    ),
    sp.recovery.Budget: Call(
        sp.recovery.Budget, {"steps": 1}, {"steps": Refused(0), "minutes": Refused(1.0)}
    ),
    TokenStream: Call(
        TokenStream,
        {"text": TEXT, "tokenizer": tiny_tokenizer()},
        {"text": Changes(TEXT[40:]), "tokenizer": Refused(None), "length": Refused(1)},
    ),
    sp.calibration.CalibrationData: Call(
        sp.calibration.CalibrationData,
        {"batches": DATA},
        {"batches": Refused([]), "source": Changes("a text")},
    ),
    sp.pruning.Recipe: Call(
        pruned_by,
        HALF,
        {
            "pattern": Changes("16x1"),
            "method": Changes("wanda"),
            "sparsity": Changes(0.25),
            "allocation": Changes({"*.mlp.*": 0.25}),
            "scope": Changes("row"),
            "sequential": Changes(True, {"method": "wanda"}),
            "reconstruction": Changes(True),
            "schedule": Refused("nonsense"),
            "minutes": Refused(5),
            "seed": Changes(1, {"method": "random"}),
        },
    ),
    sp.pruning.Reconstruction: Call(
        reconstructed,
        {"epochs": 1},
        {"epochs": Changes(2), "learning_rate": Changes(0.001), "batch": Changes(2), "seed": Changes(1)},
    ),
    sp.surgery.Cutting: Call(
        lambda **options: sp.cut(tiny.llama(), **vars(sp.surgery.Cutting(**options))),
        {"structure": "heads", "fraction": 0.5},
        {
            "structure": Changes("neurons"),
            "fraction": Refused(1.5),
            "criterion": Changes("random"),
            "seed": Changes(1, {"criterion": "random"}),
        },
    ),
    sp.quantization.Quantization: Call(
        lambda **options: quantized(**options),
        {"method": "nearest"},
        {
            "encoding": Changes("int4_minimum"),
            "method": Refused("wonder"),
            "group_size": Refused(17),
            "scale_dtype": Changes("bfloat16"),
            "keep": Refused("no/such/file"),
            "embeddings": Changes("int8"),
            "reconstruction": Refused(True, "calibration: reconstruction needs some"),
            "minutes": Refused(1.0, "minutes: bounds what is solved"),
        },
    ),
    sp.compression.Compression: Call(
        lambda **options: compressed(**options),
        {"budget": "12 bits", "minutes": 0.05},
        {
            "budget": Changes("10 bits"),
            "minutes": Refused(0),
            "keep": Refused("no/such/file"),
        },
    ),
    Gradual: Call(
        lambda **options: scheduled(Gradual(**options)),
        {"steps": 3},
        {"steps": Changes(2), "initial": Changes(0.2), "power": Changes(1.0)},
    ),
    Greedy: Call(
        lambda **options: scheduled(Greedy(**options)),
        {"step": 0.5},
        {
            "step": Changes(0.25),
            "groups": Changes({"mlp": "*.mlp.*", "attention": "*self_attn*"}),
            "max_loss": Changes(0.0),
            "recover_trials": Changes(True),
            "lazy": Changes(False, {"step": 0.2}),
        },
    ),
    LotteryTicket: Call(
        ticket,
        {"steps": 4, "rounds": 2},
        {
            "steps": Changes(5),
            "rounds": Changes(3),
            "rewind": Changes(2),
            "scope": Changes("layer"),
            "include": Refused("nothing"),
            "exclude": Refused("nothing"),
        },
    ),
    Search: Call(
        searched,
        {},
        {
            "minutes": Refused(0),
            "trials": Refused(0),
            "bytes": Refused(1),
            "seconds": Refused(1e-9),
            "batch": Refused(8),
        },
    ),
    sp.SparseEmbedding: Call(
        lambda **options: repr(it := sp.SparseEmbedding(**options)) + str(it.packed.device),
        {"num_embeddings": 16, "embedding_dim": 8},
        {
            "num_embeddings": Changes(4),
            "embedding_dim": Changes(9),
            "padding_idx": Refused(16, "padding_idx"),
            "encoding": Refused("int3"),
            "dtype": Refused(torch.int64),
            "device": Changes("meta"),
        },
    ),
    sp.SparseLinear: Call(
        lambda **options: repr(layer := sp.SparseLinear(**options)) + str([layer.packed.device, layer.bias]),
        {"in_features": 16, "out_features": 8},
        {
            "in_features": Refused(15, "columns|in_features"),
            "out_features": Changes(4),
            "bias": Changes(False),
            "format": Refused("3-4"),
            "dtype": Refused(torch.int64),
            "device": Changes("meta"),
            "encoding": Refused("int3"),
        },
    ),
}  # fmt: skip

VALUES = {
    "Batch", "Format", "Method", "Pattern", "Pruned", "Sampler", "SparseWeight", "Target", "AllocationContext", "WeightSite", "Zeros", "METHODS",
    "CRITERIA", "LAYER_CRITERIA", "STRUCTURES", "FORMS", "Form", "Budget",
}  # fmt: skip
"""What functions are given, or give back, part by part: nothing takes arguments for later."""

MODULES = {sp.SparseEmbedding, sp.SparseLinear}
"""Constructed as torch's own of the same kind."""

RESULTS = {
    "LayerCompressed",
    "LayerQuantized",
    "PerplexityResult",
    "TaskScore",
    "StepLosses",
    "StructureCut",
    "LayerPruned",
    "ScheduleReport",
    "Step",
}
"""Classes that hold what a function found."""

PACKED = ops.pack(torch.ones(36), ops.pack_mask(torch.ones(3, 12, dtype=torch.bool)), 12, "tile")
CODES = random_codes(("quads", "int8"), 20, 132, 64).pack(torch.float32)
OPERANDS = {
    "input": Made(lambda folder: torch.ones(3, 12)), "dense": torch.eye(4, 8), "mask": torch.ones(3, 12, dtype=torch.bool), "cols": 12, "n": 2,
    "m": 4, "bits": ops.pack_mask(torch.ones(3, 12, dtype=torch.bool)), "values": torch.ones(36), "threshold": 0.5,
    "crow": torch.tensor([0, 12, 24, 36]), "col": torch.arange(12, dtype=torch.int32).repeat(3), "layout": "tile",
    "packed": PACKED, "bias": torch.ones(3), "indices": torch.tensor([0, 2]),
}  # fmt: skip


def public():
    """name -> function or class, of the package and of the modules that it shows."""
    found = {}
    waiting = {name: getattr(sp, name) for name in sp.__all__}
    while waiting:
        path, it = waiting.popitem()
        if isinstance(it, ModuleType):
            waiting |= {f"{path}.{name}": getattr(it, name) for name in names_of(it)}
        elif inspect.isfunction(it) or inspect.isclass(it):
            found[path] = it
    return {**found, **{it.__name__: it for it in (time_model, fidelity, layer_errors)}}


def names_of(module):
    own = [
        name
        for name, it in vars(module).items()
        if inspect.isfunction(it) and it.__module__ == module.__name__
    ]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def operation(it):
    """An operation on tensors: every argument is refused where its kind is another."""
    wrong = {"cols": -5, "n": 9, "m": 3, "layout": "brick", "packed": PACKED._replace(blob=PACKED.blob[:16])}
    names = arguments_of(it)
    operands = OPERANDS | ({"packed": CODES} if it is ops.lookup else {})
    shows = {name: Refused(wrong.get(name, torch.ones(2, 5, dtype=torch.complex64))) for name in names}
    if "m" in names:
        shows["m"] = Refused(3, "multiple of 3")
    return Call(
        it,
        {name: operands[name] for name in names},
        shows | ({"threshold": Changes(2.0)} if "threshold" in names else {}),
    )


def arguments_of(it):
    if dataclasses.is_dataclass(it):
        return {field.name for field in dataclasses.fields(it) if field.init}
    return set(inspect.signature(it).parameters)


PUBLIC = public()
TABLES = {**FUNCTIONS, **CLASSES} | {
    it: operation(it) for path, it in PUBLIC.items() if path.startswith("ops.")
}
NAMES = {it: path for path, it in PUBLIC.items()}


def is_result(it):
    return inspect.isclass(it) and (issubclass(it, (Report, Exception)) or it.__name__ in RESULTS)


def test_everything_public_has_a_table():
    missing = [
        path
        for path, it in PUBLIC.items()
        if it not in TABLES
        and path.rpartition(".")[2] not in VALUES
        and not is_result(it)
        and arguments_of(it)
    ]
    assert missing == [], "write down in FUNCTIONS or CLASSES what shows that each of its arguments counts"


def test_each_argument_has_an_entry():
    for it, call in TABLES.items():
        assert arguments_of(it) == set(call.shows), NAMES.get(it, it.__name__)


@pytest.mark.parametrize(
    ("it", "argument"),
    [
        pytest.param(it, argument, id=f"{NAMES.get(it, it.__name__)}-{argument}")
        for it, call in TABLES.items()
        for argument in call.shows
    ],
)
def test_it_counts(it, argument, tmp_path, capfd):
    check(TABLES[it], argument, tmp_path, capfd)


@pytest.mark.parametrize(
    "it",
    [it for it in TABLES if it is not sp.tasks.zero_shot],  # needs lm-eval: tests/measure/test_tasks.py
    ids=lambda it: NAMES.get(it, it.__name__),
)
def test_the_arguments_around_it_are_fine(it, tmp_path):
    """What is refused is refused for itself."""
    TABLES[it].outcome(tmp_path / "plain")


def test_an_argument_that_is_ignored_is_caught(tmp_path, capfd):
    def ignores(model, seed=0):
        return 1

    for entry in (Refused(-1), Changes(1), Shows()):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(
                Call(ignores, {"model": 0}, {"seed": entry}), "seed", tmp_path / type(entry).__name__, capfd
            )


def test_arguments_that_several_share_come_in_one_order():
    """Whoever knows `prune(..., calibration=, include=, ..., seed=, progress=)` knows the others."""
    orders = {}
    for path, it in PUBLIC.items():
        if not path.startswith("ops.") and not is_result(it):
            parameters = inspect.signature(it).parameters.values()
            names = [its.name for its in parameters if its.kind is its.KEYWORD_ONLY or it in MODULES]
            for place, first in enumerate(names):
                for second in names[place + 1 :]:
                    orders.setdefault((first, second), []).append(path)
    both = [(pair, paths, orders[pair[::-1]]) for pair, paths in orders.items() if pair[::-1] in orders]
    assert both == []


def test_at_most_three_arguments_by_place():
    """The model first, and in one order where there are others: (model, reference, tokenizer, text)."""
    order = ["model", "reference", "tokenizer", "text"]
    for path, it in PUBLIC.items():
        if path.startswith("ops.") or path.rpartition(".")[2] in VALUES or is_result(it) or it in MODULES:
            continue
        parameters = inspect.signature(it).parameters.values()
        names = [its.name for its in parameters if its.kind is its.POSITIONAL_OR_KEYWORD]
        assert len(names) <= 3, path
        if "model" in names and path != "load":  # what it loads comes first there
            assert [name for name in names if name in order] == [name for name in order if name in names], (
                path
            )
            assert names[0] == "model", path
