"""The training loop: steps, learning rate, evaluations, checkpoints, until the budget is used up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseprune import clock
from sparseprune.models.batches import Batch, check_batches, to_device
from sparseprune.models.losses import Evaluate, judged
from sparseprune.models.modules import device_of, evaluation_mode
from sparseprune.options import require_at_least, require_function
from sparseprune.processes import Processes
from sparseprune.recovery.data import Sampler, join
from sparseprune.recovery.objective import Objective
from sparseprune.recovery.options import Budget, Checkpointing, Training
from sparseprune.recovery.report import Evaluation, StepLosses
from sparseprune.recovery.schedule import learning_rate_factor
from sparseprune.recovery.state import load_run, save_run

__all__ = ["Loop", "Options"]

_CHECKPOINT_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `recover` was asked for, as far as the loop is concerned; see there."""

    budget: Budget
    training: Training
    checkpoint: Checkpointing | None
    evaluate: Evaluate | None
    evaluate_every: int | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        require_at_least(1, optional=True, evaluate_every=self.evaluate_every)
        require_at_least(0, seed=self.seed)
        require_function("of the model", evaluate=self.evaluate)
        if self.evaluate_every is not None and self.evaluate is None:
            raise ValueError("evaluate_every: needs evaluate, got None; pass a function of the model")

    @property
    def folder(self) -> Path | None:
        """Where the state of the run is kept, if it is."""
        return None if self.checkpoint is None else Path(self.checkpoint.folder)

    def settings(self) -> dict[str, Any]:
        """Those that decide what the weights become, JSON-ready."""
        names = ("windows", "accumulate", "warmup", "final", "clip")
        return {
            "budget": str(self.budget),
            **{name: getattr(self.training, name) for name in names},
            "seed": self.seed,
        }


class Loop:
    """One run. `losses`, `evaluations`, `tokens` and `seconds` grow with it, and go into its checkpoints."""

    def __init__(
        self,
        options: Options,
        group: Processes,
        objective: Objective,
        sampler: Sampler,
        optimizer: Optimizer,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self.options = options
        self.group = group
        self.objective = objective
        self.model = objective.student
        self.sampler = sampler
        self.optimizer = optimizer
        self.parameters = parameters
        self.device = device_of(self.model)
        self.rates = [float(part["lr"]) for part in optimizer.param_groups]
        self.losses: list[StepLosses] = []
        self.evaluations: list[Evaluation] = []
        self.tokens = 0
        self.identity: dict[str, Any] = {}
        self._before = 0.0  # seconds of the run that this one resumes
        self._began = clock.now()
        self._saved = self._began
        share = len(group.share(options.training.windows))
        if share % options.training.accumulate:
            raise ValueError(
                f"accumulate: must divide the {share} windows that a process reads in a step, got "
                f"{options.training.accumulate}"
            )

    @property
    def seconds(self) -> float:
        return self._before + clock.now() - self._began

    def restore(self, identity: dict[str, Any]) -> int | None:
        """Goes on from the checkpoint, if there is one and it may; gives the steps it had behind it."""
        self.identity = identity
        checkpoint = self.options.checkpoint
        if self.options.folder is None or checkpoint is None or not checkpoint.resume:
            return None
        saved = load_run(self.options.folder, self.parameters, self.optimizer, identity)
        if saved is None:
            return None
        self.losses = [StepLosses(**it) for it in saved["losses"]]
        self.evaluations = [Evaluation(**it) for it in saved["evaluations"]]
        self.tokens = saved["tokens"]
        self._before = saved["seconds"]
        return len(self.losses)

    def run(self) -> None:
        options = self.options
        wrapped = self.group.wrap(self.objective)
        if not self.losses and not self.evaluations:
            self._evaluate()
        with self._bar() as show:
            while (done := self._progress()) < 1:
                for part, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    part["lr"] = rate * learning_rate_factor(
                        done, options.training.warmup, options.training.final
                    )
                self._step(wrapped)
                step = len(self.losses)
                if options.evaluate_every is not None and step % options.evaluate_every == 0:
                    self._evaluate()
                self._save_if_due(step)
                show(self.losses[-1], self._progress())
        if not self.evaluations or self.evaluations[-1].step != len(self.losses):
            self._evaluate()
        self._save()

    def _progress(self) -> float:
        done = self.options.budget.progress(len(self.losses), self.seconds)
        return done if self.options.budget.minutes is None else self.group.agree(done, self.device)

    def _step(self, wrapped: nn.Module) -> None:
        options = self.options
        step = len(self.losses)
        parts = self._draw(step)
        counts = [self.objective.count(part) for part in parts]
        total = self.group.sum(torch.tensor([float(sum(counts))], device=self.device))
        world = self.group.world
        names = ("total", *self.objective.terms)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        with self._randomness(step):
            for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
                with self.group.unsynchronised(wrapped, last=index == len(parts) - 1):
                    losses = wrapped(part)
                    share = count / total[0]
                    (losses["total"] * (share * world).to(losses["total"].dtype)).backward()
                sums += torch.stack([losses[name].detach().double() for name in names]) * share
        self.group.sum(sums)
        means = dict(zip(names, sums.tolist(), strict=True))
        total_loss = means.pop("total")
        if not math.isfinite(total_loss):
            raise ValueError(
                f"learning_rate: the loss is {total_loss} at step {step}; lower the learning rate, or check the model"
            )
        if options.training.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), options.training.clip)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += int(total)
        self.losses.append(StepLosses(step + 1, self.seconds, total_loss, terms=means, learning_rate=rate))

    def _draw(self, step: int) -> list[Batch]:
        options = self.options
        windows = options.training.windows
        first = step * windows
        samples = [self.sampler.draw(first + index, options.seed) for index in self.group.share(windows)]
        size = len(samples) // options.training.accumulate
        parts = [
            to_device(batch, self.device)
            for start in range(0, len(samples), size)
            for batch in join(samples[start : start + size])
        ]
        check_batches(self.model, parts)
        return parts

    @contextmanager
    def _randomness(self, step: int) -> Iterator[None]:
        """Dropout of a step is a function of seed, step and rank: a resumed run draws the same."""
        if not self.model.training:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self.options.seed * 1_000_003 + step) * self.group.world + self.group.rank)
            yield

    def _evaluate(self) -> None:
        if self.options.evaluate is None:
            return
        with torch.no_grad(), evaluation_mode(self.model):
            value = judged(self.options.evaluate, self.model)
        self.evaluations.append(Evaluation(len(self.losses), self.seconds, value))

    def _save_if_due(self, step: int) -> None:
        every = None if self.options.checkpoint is None else self.options.checkpoint.every
        due = step % every == 0 if every else clock.now() - self._saved > _CHECKPOINT_SECONDS
        if due:
            self._save()

    def _save(self) -> None:
        if self.options.folder is None or not self.group.first:
            return
        state = {
            "settings": self.identity,
            "losses": [asdict(it) for it in self.losses],
            "evaluations": [asdict(it) for it in self.evaluations],
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        save_run(self.options.folder, self.parameters, self.optimizer, state)
        self._saved = clock.now()

    @contextmanager
    def _bar(self) -> Iterator[Callable[[StepLosses, float], None]]:
        """A progress bar on stderr, with the loss and the time left."""
        if not (self.options.progress and self.group.first):
            yield lambda losses, done: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("recovery", total=1.0, state="")

            def show(losses: StepLosses, done: float) -> None:
                speed = self.tokens / max(losses.seconds, 1e-9)
                text = f"step {losses.step}, loss {losses.total:.4f}, {speed:.0f} tokens/s"
                progress.update(task, completed=min(done, 1.0), state=text)

            yield show
