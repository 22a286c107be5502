"""What `recover` is asked for: how long, with which optimizer, where the run is kept. Towards what: `terms/`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from sparseprune.options import (
    option,
    require_above,
    require_among,
    require_at_least,
    require_path,
    require_share,
)

__all__ = ["Budget", "Checkpointing", "Training"]

_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Budget:
    """Steps or minutes, one of the two. Minutes are wall time, evaluations and checkpoints included."""

    steps: int | None = option(None, "How many steps to train; or --minutes.")
    minutes: float | None = option(None, "How long to train; or --steps.")

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            found = "neither" if self.steps is None else "both"
            raise ValueError(f"steps, minutes: one of the two must be given, got {found}")
        require_at_least(1, optional=True, steps=self.steps)
        require_above(0, minutes=self.minutes)

    def progress(self, step: int, seconds: float) -> float:
        """How much is used up before step `step` (from 0), `seconds` after the start; 1 or more is the end."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.minutes:g} minutes"


@dataclass(frozen=True)
class Training:
    """How weights are trained.

    Attributes:
        learning_rate: its peak: after a linear `warmup` (a fraction of the budget) a half cosine leads down to
            `final` times it. None: 1e-4, or what an optimizer of your own brings.
        windows: windows of text, or batches of data, in a step, over all processes.
        accumulate: parts that a step's windows are cut into, to save memory.
        clip: the largest norm of the gradient; None does not clip.
        optimizer: "adamw", "adam", "sgd", "adagrad", or a callable from parameters to an optimizer.
        train: "linears": all but embeddings and the output head; "all".
        lora: train adapters of this rank instead, and merge them at the end (`lora.py`): a hundredth of the
            optimizer's memory, the same time a step.
        autocast: "bfloat16" computes products in it, with float32 weights; None computes in the weights' dtype;
            "auto" is bfloat16 where the hardware multiplies it. Weights of another dtype are float32 while training.
        compile: `torch.compile` the blocks: needs a C++ compiler and half a minute, and saves a fifth of each step on a
            CPU.
        dropout: leave it on, where the model has any.
    """

    learning_rate: float | None = option(None, f"Its peak [default: {_LEARNING_RATE:g}].")
    _: KW_ONLY
    windows: int = option(2, "Windows of text in a step.")
    accumulate: int = option(1, "Parts that a step is cut into, to save memory.")
    warmup: float = option(0.05, "Fraction of the budget over which the learning rate rises.")
    final: float = option(0.0, "Fraction of the learning rate that is left at the end.")
    clip: float | None = 1.0
    optimizer: Any = option("adamw", '"adamw", "adam", "sgd" or "adagrad".', given=str)
    train: Literal["linears", "all"] = option(
        "linears", "linears: all but embeddings and the output head; or all."
    )
    lora: int | None = option(None, "Train adapters of this rank and merge them [default: the weights].")
    autocast: Literal["auto", "bfloat16"] | None = "auto"
    compile: bool = option(False, "Compile the blocks: half a minute, then a fifth faster. Needs g++.")
    dropout: bool = False

    def __post_init__(self) -> None:
        from sparseprune.recovery.optimizers import OPTIMIZERS

        require_at_least(1, windows=self.windows, accumulate=self.accumulate)
        require_at_least(1, optional=True, lora=self.lora)
        if self.windows % self.accumulate:
            raise ValueError(
                f"accumulate: must divide the {self.windows} windows of a step, got {self.accumulate}"
            )
        require_above(0, learning_rate=self.learning_rate)
        require_above(0, "pass None not to clip", clip=self.clip)
        require_share("pass a fraction of the budget", warmup=self.warmup)
        require_share("pass a fraction of learning_rate", whole=True, final=self.final)
        require_among(("linears", "all"), train=self.train)
        if self.autocast not in ("auto", "bfloat16", None):
            raise ValueError(f"autocast: must be 'auto', 'bfloat16' or None, got {self.autocast!r}")
        for name in ("compile", "dropout"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be True or False, got {getattr(self, name)!r}")
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer: must be one of {', '.join(OPTIMIZERS)} or a callable from parameters to an optimizer, "
                f"got {self.optimizer!r}"
            )
        if callable(self.optimizer) and self.learning_rate is not None:
            raise ValueError(
                f"learning_rate: an optimizer of your own brings it, got {self.learning_rate:g}; leave it out"
            )
        if self.lora is not None and self.train != "linears":
            raise ValueError(
                f'train: adapters are trained on the linears alone, got "{self.train}"; leave it or lora out'
            )

    @property
    def peak(self) -> float:
        """The learning rate of an optimizer by name."""
        return _LEARNING_RATE if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class Checkpointing:
    """Where the state of a run is kept, so that a run that was killed goes on from it.

    Attributes:
        folder: made if missing. A run that finds one there goes on from it, to the same result bit for bit under
            `steps`; under `minutes` with the time that was left.
        every: steps between two writings, by default five minutes; it is written at the end, too.
        resume: False begins again.
    """

    folder: str | Path
    _: KW_ONLY
    every: int | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        require_path(checkpoint=self.folder)
        if Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise NotADirectoryError(
                f"checkpoint: must be a folder, got the file {self.folder}; name another"
            )
        require_at_least(1, optional=True, every=self.every)
        if not isinstance(self.resume, bool):
            raise ValueError(f"resume: must be True or False, got {self.resume!r}")

    @classmethod
    def of(cls, checkpoint: str | Path | Checkpointing | None) -> Checkpointing | None:
        """A folder alone, with the defaults of the rest."""
        return checkpoint if checkpoint is None or isinstance(checkpoint, Checkpointing) else cls(checkpoint)
