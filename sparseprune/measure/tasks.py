"""Zero-shot tasks, by EleutherAI's lm-evaluation-harness (the package `lm-eval`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparseprune.measure.evaluate import dtype_name
from sparseprune.models.modules import evaluation_mode, max_length
from sparseprune.report import Column, Report, Table

__all__ = ["TaskScore", "TaskScores", "zero_shot"]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task (or group of tasks, where `samples` is None)."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int | None


COLUMNS = (
    Column("task", value=lambda it: it.task),
    Column("metric", value=lambda it: it.metric),
    Column("value", ".4f", lambda it: it.value),
    Column("standard error", ".4f", lambda it: it.standard_error),
    Column("samples", value=lambda it: it.samples),
)


@dataclass(frozen=True)
class TaskScores(Report):
    """What the harness measured; `print` shows a table with the protocol under it."""

    scores: tuple[TaskScore, ...]
    protocol: str

    def table(self) -> Table:
        return Table.of("Tasks", COLUMNS, self.scores, [self.protocol])


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> TaskScores:
    """Runs tasks of the harness on a causal language model, dense or sparse.

    Args:
        tasks: names such as "hellaswag" or ["arc_easy", "piqa"]; `lm-eval ls tasks` lists them. The harness
            fetches their data, unless they are on this machine.
        shots: examples before each question.
        limit: only the first so many questions of each task.
        folder: with task files (YAML) of your own, next to the harness's.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task, or a number out of range.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError('tasks: must name at least one task, got none; pass "hellaswag", say')
    if not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"model: must be a causal language model of transformers, got a {type(model).__name__}; load one with "
            "sparseprune.models.load_dense"
        )
    if tokenizer is None:
        raise ValueError("tokenizer: must be given to read the tasks, got None; pass the model's")
    for argument, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{argument}: must be at least {least}, got {value}")
    if folder is not None and not Path(folder).is_dir():
        raise NotADirectoryError(
            f"folder: must be a folder with task files, got {folder}; leave it out, or name one"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "tasks are run by the package lm-eval, which is not installed; run: pip install 'sparseprune[eval]'"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else os.fspath(folder))
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known and not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"tasks: {unknown[0]!r} is not a task of lm-eval {lm_eval.__version__}; `lm-eval ls tasks` lists them"
        )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length(model))
    with evaluation_mode(model):
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=names,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
        )
    samples = found.get("n-samples", {})
    scores = [
        score
        for task, values in found["results"].items()
        for score in _scores(task, values, samples.get(task))
    ]
    first = "" if limit is None else f", first {limit} of each"
    protocol = f"lm-eval {lm_eval.__version__}, {shots} shots{first}, {dtype_name(model)}"
    return TaskScores(tuple(scores), protocol)


def _scores(task: str, values: dict[str, Any], samples: dict[str, int] | None) -> list[TaskScore]:
    """The harness's "acc,none": 0.5 and "acc_stderr,none": 0.1, as one score per metric."""
    scores = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        scores.append(
            TaskScore(
                task,
                name,
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                None if samples is None else samples["effective"],
            )
        )
    return scores
