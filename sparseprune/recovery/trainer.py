"""`recover()`: train what pruning left, around its zeros, towards the dense model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparseprune.calibration import CalibrationData
from sparseprune.hardware import fast_bfloat16
from sparseprune.models.batches import Batch
from sparseprune.models.losses import Evaluate
from sparseprune.models.modules import device_of, mode, require_module
from sparseprune.models.sites import find_sites
from sparseprune.options import Layers, require_made
from sparseprune.processes import join
from sparseprune.pruning.zeros import Zeros
from sparseprune.recovery.codes import open_codes
from sparseprune.recovery.compiled import compiled_blocks
from sparseprune.recovery.data import Sampler, as_sampler, batches_of
from sparseprune.recovery.loop import Loop, Options
from sparseprune.recovery.lora import adapters
from sparseprune.recovery.objective import Objective
from sparseprune.recovery.optimizers import make_optimizer, trained_parameters
from sparseprune.recovery.options import Budget, Checkpointing, Training
from sparseprune.recovery.report import RecoveryReport
from sparseprune.recovery.terms import Distillation
from sparseprune.statistics.overlap import remember
from sparseprune.weights.encoding import PLAIN
from sparseprune.weights.module import SparseModule

__all__ = ["recover"]


def recover(
    model: nn.Module,
    data: Sampler | CalibrationData | Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    distillation: Distillation | None = None,
    training: Training | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint: str | Path | Checkpointing | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> RecoveryReport:
    """Trains a pruned model in place; every zero of its linear layers stays exactly zero.

    Args:
        data: `TokenStream(text, tokenizer)`, `CalibrationData`, or batches. Each step reads `training.windows` samples
            of it, in an order that `seed` decides.
        teacher: the dense model. Without one the model learns from the text alone. A float32 teacher is copied to
            the dtype of `training.autocast`.
        steps, minutes: the budget, one of the two. Minutes count evaluations and checkpoints.
        distillation: the losses and their weights; by default the KL to the teacher, or the cross-entropy without one.
        training: the learning rate and all else that an optimizer goes by.
        evaluate: called with the model, for the report, at the beginning, every `evaluate_every` steps, at the end.
        checkpoint: the folder where the state of the run is kept (or a `Checkpointing`, with options): a run that finds
            one there goes on from it.
        include, exclude, lm_head: which layers' zeros are kept, see `sparseprune.models.sites.find_sites`.
        seed: decides the order of the samples and what adapters start from.
        progress: show a bar on stderr.

    Runs on several processes where `torchrun` or `accelerate launch` started them (`processes.py`): `training.windows`
    is theirs together, and the result is that of one process up to rounding.

    Raises:
        ValueError: an argument out of range, a model that is not dense, a checkpoint of another run; a loss that is
            not finite, where the model keeps its last finite weights, and codes are what they were at the beginning.
    """
    training = Training() if training is None else training
    distillation = Distillation() if distillation is None else distillation
    require_made(Training, training=training)
    require_made(Distillation, distillation=distillation)
    options = Options(
        budget=Budget(steps, minutes),
        training=training,
        checkpoint=Checkpointing.of(checkpoint),
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        seed=seed,
        progress=progress,
    )
    _check(model, teacher, distillation)
    given = Layers(include, exclude, lm_head)
    sampler = as_sampler(data)
    device = device_of(model)
    dtype = _autocast_dtype(training.autocast, device)
    group = join(device)
    with ExitStack() as stack:
        codes = stack.enter_context(open_codes(model, training.train, given))
        stack.enter_context(_float32(model))
        stack.enter_context(mode(model, training.dropout))
        layers = find_sites(model, **vars(given))
        if training.lora is not None and codes.count():
            raise ValueError(
                f"lora: adapters cannot be merged into codes, which the model has in {sum(codes.count().values())} layers; "
                "leave it out, and the codes are trained"
            )
        zeros = Zeros(model, [layer for layer in layers if layer not in codes])
        stack.enter_context(codes.training)
        if training.lora is None:
            parameters = trained_parameters(model, training.train)
        else:
            parameters = stack.enter_context(adapters(layers, training.lora, seed=seed))
        stack.enter_context(_only_trained(model, parameters.values()))
        made = make_optimizer(training.optimizer, list(parameters.values()), training.peak)
        if training.lora is None:  # adapters have the mask built in, and the weights rest
            stack.enter_context(zeros.held(made))
        taught = _lower(teacher, dtype)
        if training.compile:
            stack.enter_context(compiled_blocks(model, *([] if taught is None else [taught])))
        objective = Objective(model, taught, distillation, autocast=dtype)
        settings = {
            **options.settings(),
            "learning_rate": made.param_groups[0]["lr"],
            "optimizer": type(made).__name__,
            **{it.name: getattr(distillation, it.name) for it in fields(distillation)},
            **{name: term.weight for name, term in objective.terms.items()},
            "loss": getattr(distillation.loss, "__qualname__", None),
            "train": training.train if training.lora is None else None,
            "lora": training.lora,
            "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
            "compile": training.compile,
            "dropout": training.dropout,
            "data": sampler.source,
            "codes": codes.count(),
        }
        loop = Loop(options, group, objective, sampler, made, parameters)
        resumed = loop.restore(
            {**settings, "zeros": zeros.digest() + codes.digest(), "samples": sampler.digest()}
        )
        loop.run()
        seconds = loop.seconds
    remember(model, batches_of(sampler))
    masked, of = codes.zeros()
    return RecoveryReport(
        losses=tuple(loop.losses),
        evaluations=tuple(loop.evaluations),
        seconds=seconds,
        tokens=loop.tokens,
        weights=zeros.weights + of,
        zeros_before=zeros.count + masked,
        zeros_after=zeros.count_now() + masked,
        settings=settings,
        titles={name: term.title for name, term in objective.terms.items()},
        resumed_at=resumed,
    )


def _check(model: nn.Module, teacher: nn.Module | None, distillation: Distillation) -> None:
    require_module(model=model, **({} if teacher is None else {"teacher": teacher}))
    sharded = any(hasattr(it, "to_local") for it in model.parameters())  # DTensor
    if sharded or isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: must be the plain model in each process, it is wrapped for parallel training (FSDP and its shards are "
            "not supported); pass the model itself, recover averages the gradients"
        )
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) and module.encoding == PLAIN:
            raise ValueError(
                f"model: {name} must be dense to be trained, or int8 or int4 codes, it is a {type(module).__name__} of "
                "plain values; call sparseprune.recovery.to_dense(model) first"
            )
    terms = distillation.terms(teacher is not None)
    if teacher is None:
        return
    if teacher is model or {id(it) for it in teacher.parameters()} & {id(it) for it in model.parameters()}:
        raise ValueError(
            "teacher: must be another model, it shares weights with the one to train; load the dense model again, or "
            "copy.deepcopy it before pruning"
        )
    for term in terms.values():
        if term.weight and term.needs_teacher:
            term.check(model, teacher)


def _autocast_dtype(autocast: str | None, device: torch.device) -> torch.dtype | None:
    if autocast == "auto":
        # without instructions for it, a CPU is slower in bfloat16 than in float32
        return torch.bfloat16 if fast_bfloat16(device) else None
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
