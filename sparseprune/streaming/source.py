"""A Hugging Face folder whose weights stay on the disk until they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.io.checkpoint import is_checkpoint
from sparseprune.io.safetensors import CheckpointError, Reader, TensorInfo
from sparseprune.io.shards import INDEX_FILE, WEIGHTS_FILE, read_index
from sparseprune.io.skeleton import from_config, read_config

__all__ = ["Source", "StreamedModel"]


class Source:
    """The safetensors files of `folder`: their headers are read and checked at once, their tensors one by one.

    Raises:
        CheckpointError: no safetensors there, a shard that is missing or truncated, or shards of two checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._readers: dict[str, Reader] = {}
        self._place: dict[str, Reader] = {}
        try:
            for name in self._files():
                if not (folder / name).is_file():
                    raise CheckpointError(
                        f"{folder / name}: no such shard, though the index names it; copy it again"
                    )
                reader = self._stack.enter_context(Reader(folder / name))
                self._readers[name] = reader
                self._place.update(dict.fromkeys(reader.infos, reader))
            for key, name in self._index().items():
                if key not in self._readers[name].infos:
                    raise CheckpointError(
                        f"{folder / name}: lacks {key}, which the index says is there; copy it again"
                    )
        except BaseException:
            self.close()
            raise
        self.infos: dict[str, TensorInfo] = {key: reader.infos[key] for key, reader in self._place.items()}

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def read(self, key: str) -> Tensor:
        return self._place[key].read(key)

    def read_rows(self, key: str, rows: list[int]) -> Tensor:
        return self._place[key].read_rows(key, rows)

    def parts(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor, flat, in parts of at most 16 MiB, as `dtype`."""
        for part in self._place[key].parts(key):
            yield part.to(dtype)

    def fingerprint(self) -> str:
        """Tells checkpoints apart without reading them: names, shapes, dtypes, and the start of each tensor."""
        digest = hashlib.sha256()
        for key, reader in sorted(self._place.items()):
            info = reader.infos[key]
            digest.update(f"{reader.path.name} {key} {info.dtype} {info.shape}".encode())
            digest.update(reader.head(key))
        return digest.hexdigest()

    def _index(self) -> dict[str, str]:
        if (self.folder / WEIGHTS_FILE).is_file():
            return {}
        return read_index(self.folder / INDEX_FILE)[0]

    def _files(self) -> list[str]:
        if (self.folder / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        if not (self.folder / INDEX_FILE).is_file():
            raise CheckpointError(
                f"{self.folder}: must hold {WEIGHTS_FILE} or {INDEX_FILE} to be streamed, it has neither; save the "
                "model as safetensors"
            )
        return sorted(set(read_index(self.folder / INDEX_FILE)[0].values()))


class StreamedModel:
    """A transformers model on the meta device, and where each of its tensors is on the disk.

    Attributes:
        model: buffers that no checkpoint holds are computed, everything else is on the meta device.
        keys: the model's tensor names -> the checkpoint's. They may differ by the prefix of the base model, or be the
            name of a tensor that this one is tied to.
        tied: the model's tensor names -> the first name of the very same tensor.
        unused: tensors of the checkpoint that the model has no place for.
    """

    def __init__(self, folder: Path, source: Source, dtype: torch.dtype | None = None) -> None:
        if is_checkpoint(folder):
            raise ValueError(
                f"folder: must be dense, {folder} is sparse already; pass the model it was made from"
            )
        config = read_config(folder)
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"folder: {folder} holds quantized weights; pass the model before it was quantized"
            )
        self.folder, self.source = folder, source
        config.dtype = dtype or _stated_dtype(config) or _first_dtype(source)
        self.model: Any = from_config(folder, config, strictly=True).eval()
        self._own = self.model.state_dict(keep_vars=True)
        self.keys = self._match()
        first: dict[str, str] = {}
        for key, stored in self.keys.items():
            first.setdefault(stored, key)
        self.tied = {key: first[stored] for key, stored in self.keys.items() if first[stored] != key}
        self.unused = sorted(set(source.infos) - set(self.keys.values()))

    def info(self, key: str) -> TensorInfo:
        """The model's tensor `key`, in the dtype that it has in the model."""
        own = self._own[key]
        return TensorInfo(key, own.dtype, tuple(own.shape))

    def names(self, module_name: str) -> list[str]:
        """Names of the tensors of a submodule, those that are tied to an earlier one left out."""
        prefix = f"{module_name}." if module_name else ""
        return [key for key in self.keys if key.startswith(prefix) and key not in self.tied]

    def nbytes(self, keys: list[str]) -> int:
        return sum(self.info(key).nbytes for key in keys)

    @contextmanager
    def loaded(self, module_name: str, leave: frozenset[str] = frozenset()) -> Iterator[nn.Module]:
        """The submodule with its weights in memory, inside only; tensors in `leave` stay on the meta device."""
        module = self.model.get_submodule(module_name)
        prefix = f"{module_name}." if module_name else ""
        names = [key for key in self.keys if key.startswith(prefix) and key not in leave]
        read: dict[str, Tensor] = {}
        for key in names:
            source = self.keys[key]
            if source not in read:
                value = self.source.read(source).to(self._own[key].dtype)
                parameter = isinstance(self._own[key], nn.Parameter)
                read[source] = nn.Parameter(value, requires_grad=False) if parameter else value
        _assign(module, {key.removeprefix(prefix): read[self.keys[key]] for key in names})
        del read
        try:
            yield module
        finally:
            _assign(module, {key.removeprefix(prefix): self._own[key] for key in names})

    @contextmanager
    def rows_on_demand(self, embedding: nn.Embedding, key: str) -> Iterator[None]:
        """Inside, each call of `embedding` reads the rows of `key` that it looks up, and no others."""
        padding = embedding.padding_idx

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            ids, *rest = args
            rows, places = torch.unique(ids, return_inverse=True)
            value = self.source.read_rows(self.keys[key], rows.tolist()).to(self._own[key].dtype)
            embedding.weight = nn.Parameter(value, requires_grad=False)
            return (places, *rest)

        handle = embedding.register_forward_pre_hook(hook)
        # empty, but on the CPU, which is where the model's inputs are to go
        embedding.weight = nn.Parameter(torch.empty(0, embedding.embedding_dim), requires_grad=False)
        embedding.padding_idx = (
            None  # it matters to gradients only, and is not a row of the few that are read
        )
        try:
            yield
        finally:
            handle.remove()
            embedding.padding_idx = padding
            embedding.weight = self._own[key]

    def _match(self) -> dict[str, str]:
        infos = self.source.infos
        renamed, changed = _on_loading(self.model, self._own, list(infos))
        if changed is not None:
            raise CheckpointError(
                f"{self.folder}: {changed} is merged or reordered by transformers when it loads it (experts, for example), "
                "which a stream does not do; prune the model in memory"
            )
        stored = dict(zip(infos, infos, strict=True))
        found, missing = self._look_up(stored)
        if missing:
            found, missing = self._look_up(renamed | stored)
        if missing:
            raise CheckpointError(
                f"{self.folder}: lacks {len(missing)} of the model's tensors, the first is {missing[0]}; copy it again"
            )
        for key, name in found.items():
            shape, expected = infos[name].shape, tuple(self._own[key].shape)
            if shape != expected:
                raise CheckpointError(
                    f"{self.folder}: {name}: shape must be {expected}, as in the model, got {shape}; config.json is not "
                    "that of these weights"
                )
        return found

    def _look_up(self, stored: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """(the model's names -> the checkpoint's, names that are missing); `stored`: possible names -> the checkpoint's."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        twins: dict[int, list[str]] = {}
        for key, tensor in self._own.items():
            twins.setdefault(id(tensor), []).append(key)
        found: dict[str, str] = {}
        missing = []
        for key, tensor in self._own.items():
            names = [key, *twins[id(tensor)]]
            candidates = [name for own in names for name in (own, own.removeprefix(prefix), prefix + own)]
            match = next((stored[name] for name in candidates if name in stored), None)
            if match is None:
                missing.append(key)
            else:
                found[key] = match
        return found, missing


def _on_loading(
    model: nn.Module, own: Mapping[str, Tensor], names: list[str]
) -> tuple[dict[str, str], str | None]:
    """What transformers does with a checkpoint's tensors, beside reading them.

    Returns:
        its names for tensors -> those of the checkpoint, where they differ; and a tensor whose values it changes, None if
        there is none.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except (
        ImportError
    ):  # a release that renames elsewhere: a tensor that it would rename is reported as missing
        return {}, None
    transforms: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
    converters = [it for it in transforms if isinstance(it, WeightConverter)]
    prefix: Any = getattr(model, "base_model_prefix", "")
    renamed: dict[str, str] = {}
    for name in names:
        found, converter = rename_source_key(name, renamings, converters, prefix, dict(own))
        if found not in own:
            continue
        if converter is not None:
            return renamed, name
        if found != name:
            renamed[found] = name
    return renamed, None


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        owner = module.get_submodule(path)
        tensors: Any = owner._parameters if name in owner._parameters else owner._buffers
        tensors[name] = value


def _stated_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _first_dtype(source: Source) -> torch.dtype:
    # what transformers does where the config does not say
    return next((info.dtype for info in source.infos.values() if info.dtype.is_floating_point), torch.float32)
