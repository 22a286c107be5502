"""A transformers model built from its config.json alone: every module in place, no memory spent on weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from sparseprune.io.safetensors import CheckpointError
from sparseprune.io.sizes import SIZES, apply_sizes

__all__ = ["CONFIG_FILE", "from_config", "read_config"]

CONFIG_FILE = "config.json"


def read_config(folder: Path) -> Any:
    """The transformers config in `folder`.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; pass model= (a dense model of the same architecture) to load()"
        )
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers meets in a damaged config
        raise CheckpointError(f"{path}: transformers cannot read it: {error}") from error


def from_config(folder: Path, config: Any, strictly: bool = False) -> nn.Module:
    """The model that `config`, read from `folder`, describes: parameters on the meta device, buffers computed.

    strictly: parameters never have memory, not even address space while they are made. A buffer that starts as
        `torch.empty` is then on the meta device too.

    Raises:
        CheckpointError: config.json names no model class of transformers, or one that cannot be built from it.
    """
    import transformers

    path = folder / CONFIG_FILE
    names = config.architectures or []
    architecture: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not hasattr(architecture, "_from_config"):
        raise CheckpointError(
            f"{path}: architectures must name one model class of transformers {transformers.__version__}, got {names}; "
            "pass model= to load()"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with _parameters_without_data(strictly):
            built: nn.Module = architecture._from_config(config)
            if getattr(config, SIZES, None) is not None:
                apply_sizes(built, getattr(config, SIZES))
            return built
    except Exception as error:  # as above: the values in the config may be anything
        raise CheckpointError(f"{path}: {names[0]} cannot be built from it: {error}") from error


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, which is how modules make their parameters, gives tensors on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _parameters_without_data(strictly: bool) -> Iterator[None]:
    """Parameters made inside have no memory, and initialising them costs nothing; buffers are computed as ever.

    `torch.device("meta")` would leave the buffers that no checkpoint holds (rotary frequencies) without values.
    """

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)
    try:
        if strictly:
            with _EmptyOnMeta():
                yield
        else:
            yield
    finally:
        handle.remove()
