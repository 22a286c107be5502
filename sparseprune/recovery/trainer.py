"""`recover()`: train what pruning left, around its zeros, towards the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparseprune.calibration import CalibrationData
from sparseprune.hardware import fast_bfloat16
from sparseprune.models.batches import Batch
from sparseprune.models.losses import Evaluate, Loss
from sparseprune.models.modules import device_of
from sparseprune.models.sites import find_sites
from sparseprune.processes import join
from sparseprune.pruning.zeros import Zeros
from sparseprune.recovery.compiled import compiled_blocks
from sparseprune.recovery.data import Sampler, as_sampler, batches_of
from sparseprune.recovery.loop import Loop, Options
from sparseprune.recovery.lora import adapters
from sparseprune.recovery.objective import Objective
from sparseprune.recovery.optimizers import Train, make_optimizer, trained_parameters
from sparseprune.recovery.report import RecoveryReport
from sparseprune.recovery.schedule import Budget
from sparseprune.recovery.terms import Distillation
from sparseprune.statistics.overlap import remember
from sparseprune.weights.linear import SparseLinear

__all__ = ["recover"]


def recover(
    model: nn.Module,
    data: Sampler | CalibrationData | Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    learning_rate: float = 1e-4,
    batch: int = 2,
    distillation: Distillation | None = None,
    loss: Loss | None = None,
    optimizer: str | Callable[[Sequence[nn.Parameter]], Optimizer] = "adamw",
    train: Train = "linears",
    lora: int | None = None,
    warmup: float = 0.05,
    final: float = 0.0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    autocast: str | None = "auto",
    compile: bool = False,
    dropout: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> RecoveryReport:
    """Trains a pruned model in place; every zero of its linear layers stays exactly zero.

    Args:
        data: `TokenStream(text, tokenizer)`, `CalibrationData`, or batches. Each step reads `batch` samples of it,
            in an order that `seed` decides.
        teacher: the dense model. Without one the model learns from the text alone. A float32 teacher is copied to
            the dtype of `autocast`.
        steps, minutes: the budget, one of the two. Minutes count evaluations and checkpoints.
        batch: samples in a step, over all processes.
        learning_rate: its peak: after a linear `warmup` (a fraction of the budget) a half cosine leads down to
            `final` times it.
        distillation: the losses' weights; by default the KL to the teacher, or the cross-entropy without one.
        loss: stands in for the cross-entropy where a model is not a language model: (output, batch) -> mean loss.
        optimizer: "adamw", "adam", "sgd", "adagrad", or a callable from parameters to an optimizer, which brings
            its own learning rate.
        train: "linears": all but embeddings and the output head; "all".
        lora: train adapters of this rank instead, and merge them at the end (`lora.py`): a hundredth of the
            optimizer's memory, the same time a step.
        clip: the largest norm of the gradient; None does not clip.
        accumulate: parts that a step's batch is cut into, to save memory.
        autocast: "bfloat16" computes products in it, with float32 weights; None computes in the weights' dtype;
            "auto" is bfloat16 where the hardware multiplies it. Weights of another dtype are float32 while training.
        compile: `torch.compile` the blocks: needs a C++ compiler and half a minute, and saves a fifth of each step on a
            CPU.
        dropout: leave it on, where the model has any.
        include, exclude, lm_head: which layers' zeros are kept, see `sparseprune.models.sites.find_sites`.
        evaluate: called with the model, for the report, at the beginning, every `evaluate_every` steps, at the end.
        checkpoint: folder for the state of the run, written every `checkpoint_every` steps (default: every five
            minutes) and at the end. A run that finds one there goes on from it, to the same result bit for bit
            under `steps`; under `minutes` with the time that was left.
        resume: False begins again.

    Runs on several processes where `torchrun` or `accelerate launch` started them (`distributed.py`): `batch` is
    theirs together, and the result is that of one process up to rounding.

    Raises:
        ValueError: an argument out of range, a model that is not dense, a checkpoint of another run; a loss that is
            not finite, where the model keeps its last finite weights.
    """
    options = Options(
        Budget(steps, minutes),
        batch,
        accumulate,
        warmup,
        final,
        clip,
        seed,
        evaluate,
        evaluate_every,
        None if checkpoint is None else Path(checkpoint),
        checkpoint_every,
        progress,
    )
    sampler = as_sampler(data)
    if distillation is None:
        distillation = Distillation() if teacher is not None else Distillation(cross_entropy=1.0, logits=0.0)
    _check(model, teacher, distillation)
    device = device_of(model)
    dtype = _autocast_dtype(autocast, device)
    group = join(device)
    with ExitStack() as stack:
        stack.enter_context(_float32(model))
        stack.enter_context(_mode(model, dropout))
        layers = find_sites(model, include=include, exclude=exclude, lm_head=lm_head)
        zeros = Zeros(model, layers)
        if lora is None:
            parameters = trained_parameters(model, train)
        else:
            parameters = stack.enter_context(adapters(layers, lora, seed=seed))
        stack.enter_context(_only_trained(model, parameters.values()))
        made = make_optimizer(optimizer, list(parameters.values()), learning_rate)
        if lora is None:  # adapters have the mask built in, and the weights rest
            stack.enter_context(zeros.held(made))
        taught = _lower(teacher, dtype)
        if compile:
            stack.enter_context(compiled_blocks(model, *([] if taught is None else [taught])))
        objective = Objective(model, taught, distillation, loss, dtype)
        settings = {
            **options.settings(),
            "learning_rate": made.param_groups[0]["lr"],
            "optimizer": type(made).__name__,
            **asdict(distillation),
            "train": train if lora is None else None,
            "lora": lora,
            "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
            "compile": compile,
            "dropout": dropout,
            "data": sampler.source,
        }
        loop = Loop(options, group, objective, sampler, made, parameters)
        resumed = loop.restore({**settings, "zeros": zeros.digest(), "samples": sampler.digest()}, resume)
        loop.run()
        seconds = loop.seconds
    remember(model, batches_of(sampler))
    return RecoveryReport(
        losses=tuple(loop.losses),
        evaluations=tuple(loop.evaluations),
        seconds=seconds,
        tokens=loop.tokens,
        weights=zeros.weights,
        zeros_before=zeros.count,
        zeros_after=zeros.count_now(),
        settings=settings,
        titles={name: term.title for name, term in objective.terms.items()},
        resumed_at=resumed,
    )


def _check(model: nn.Module, teacher: nn.Module | None, distillation: Distillation) -> None:
    sharded = any(hasattr(it, "to_local") for it in model.parameters())  # DTensor
    if sharded or isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: must be the plain model in each process, it is wrapped for parallel training (FSDP and its shards are "
            "not supported); pass the model itself, recover averages the gradients"
        )
    sparse = next((name for name, module in model.named_modules() if isinstance(module, SparseLinear)), None)
    if sparse is not None:
        raise ValueError(
            f"model: {sparse} must be dense to be trained, it is a SparseLinear; call "
            "sparseprune.recovery.to_dense(model) first"
        )
    of_teacher = {name: term for name, term in distillation.terms().items() if term.needs_teacher}
    used = [term for term in of_teacher.values() if term.weight]
    if teacher is None:
        if used:
            weights = ", ".join(f"{name}={term.weight:g}" for name, term in of_teacher.items())
            raise ValueError(
                f"teacher: must be given for the losses {weights}, got None; or leave cross_entropy alone above 0"
            )
        return
    if teacher is model or {id(it) for it in teacher.parameters()} & {id(it) for it in model.parameters()}:
        raise ValueError(
            "teacher: must be another model, it shares weights with the one to train; load the dense model again, or "
            "copy.deepcopy it before pruning"
        )
    for term in used:
        term.check(model, teacher)


def _autocast_dtype(autocast: str | None, device: torch.device) -> torch.dtype | None:
    if autocast == "auto":
        # without instructions for it, a CPU is slower in bfloat16 than in float32
        return torch.bfloat16 if fast_bfloat16(device) else None
    if autocast not in ("bfloat16", None):
        raise ValueError(f"autocast: must be 'auto', 'bfloat16' or None, got {autocast!r}")
    return torch.bfloat16 if autocast else None


def _lower(teacher: nn.Module | None, dtype: torch.dtype | None) -> nn.Module | None:
    """The teacher in `dtype`: it is only read, and half the bytes are read in half the time."""
    first = None if teacher is None else next(teacher.parameters(), None)
    if teacher is None or dtype is None or first is None or first.dtype == dtype:
        return teacher
    return copy.deepcopy(teacher).to(dtype)


@contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    """Weights of 16 bits are float32 inside: a step is often smaller than their spacing, and would be lost."""
    short = {
        tensor: tensor.dtype
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    }
    for tensor in short:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in short.items():
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _only_trained(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for `trained` alone; the others would cost time. All as it was afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
