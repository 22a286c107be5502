"""A recovery run on disk: one safetensors file, written aside and renamed, from which the run goes on exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["load_run", "save_run"]

_FILE = "recovery.safetensors"
_VERSION = 1


def save_run(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, state: dict[str, Any]
) -> Path:
    """Writes trained parameters, optimizer state and `state`; a kill at any time leaves the last file or this one.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor JSON.
        OSError: the folder cannot be written.
    """
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    saved = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    document = {"version": _VERSION, **state, "optimizer": {"state": plain, "groups": saved["param_groups"]}}
    try:
        text = json.dumps(document)
    except TypeError as error:
        raise TypeError(
            f"optimizer: its state must be tensors, numbers and text to be saved, {error}; pass checkpoint=None"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{_FILE}.partial"  # one name: what a kill leaves behind is written over by the next
    try:
        # contiguous: safetensors refuses views; a parameter that a Conv1D holds is one already
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"run": text})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, folder / _FILE)
    finally:
        aside.unlink(missing_ok=True)
    return folder / _FILE


def load_run(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Puts parameters and optimizer back and gives the rest; None where there is no run in `folder`.

    Raises:
        ValueError: the file is damaged, or of a run with other settings, another model or other zeros.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["run"])
            if document.get("version") != _VERSION:
                raise ValueError(
                    f"checkpoint: {path} is of version {document.get('version')}, this reads {_VERSION}; use the "
                    "sparseprune that wrote it"
                )
            _check_settings(path, document["settings"], settings)
            names = list(file.keys())
            expected = {f"parameter.{name}": parameter for name, parameter in parameters.items()}
            found = {name for name in names if name.startswith("parameter.")}
            if found != set(expected):
                raise ValueError(
                    f"checkpoint: {path} must hold the parameters that are trained now, {len(found)} against "
                    f"{len(expected)}; pass the model that the run began with, or resume=False"
                )
            state: dict[int, dict[str, Any]] = {}
            for name in names:
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    state.setdefault(int(index), {})[key] = file.get_tensor(name)
            with torch.no_grad():
                for name, parameter in expected.items():
                    parameter.copy_(file.get_tensor(name))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged ({error}); delete it, or pass resume=False to begin again"
        ) from None
    kept = document.pop("optimizer")
    for index, values in kept["state"].items():
        state.setdefault(int(index), {}).update(values)
    optimizer.load_state_dict({"state": state, "param_groups": kept["groups"]})
    return dict(document)


def _check_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    current = json.loads(json.dumps(current))  # tuples and lists compare as they were saved
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"checkpoint: the run in {path} has {name}={saved.get(name)!r}, got {current.get(name)!r}; pass the "
                "same, another folder, or resume=False to begin again"
            )
