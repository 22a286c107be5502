"""Saving and loading sparse models: a folder with `model.safetensors`, `config.json` and the tokenizer's files.

`load` also reads the shards and the index that a streamed pruning writes (sparseprune/streaming).

Packed weights are stored in canonical form as `<layer>.weight.<part>` (docs/formats.md), all else as it is, tied weights
once, packed ones among them. There is no pickle anywhere, and nothing from a file reaches a kernel unchecked.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparseprune.io.safetensors import (
    DTYPE_NAMES,
    CheckpointError,
    TensorInfo,
    TensorSource,
    file_size,
    write,
)
from sparseprune.io.shards import INDEX_FILE, STREAM_FILE, WEIGHTS_FILE, open_sharded, open_whole
from sparseprune.io.skeleton import CONFIG_FILE, from_config, read_config
from sparseprune.models import notes, ties
from sparseprune.models.modules import put_in_place, require_module
from sparseprune.models.sites import matrix_shape
from sparseprune.options import require_function, require_path
from sparseprune.statistics import overlap
from sparseprune.weights.embedding import SparseEmbedding, refusal
from sparseprune.weights.linear import SparseLinear
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import SPEC, WeightSpec

__all__ = ["CheckpointError", "file_bytes", "is_checkpoint", "load", "load_tokenizer", "save"]

_FORMAT = "sparseprune"
_VERSION = "1"
_SPEC = f".weight.{SPEC}"

_OTHER_MODEL = "config.json, or the model passed, is not that of this file"

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all."""


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Write `model` into the folder `directory` (made if missing) and give the folder back.

    Every file is written aside and put in place at the end, so that a full disk, an error or Ctrl-C leaves what was
    there. Files of other names are left alone. A transformers model's config and generation config go along, and the
    files of `tokenizer` if it is given. Memory: the canonical form of one layer at a time.

    Raises:
        ValueError: a tensor has no data (meta device) or a dtype that safetensors does not know, or a module keeps
            state that is not a tensor.
        OSError: the folder cannot be written.
    """
    require_module(model=model)
    require_path(directory=directory)
    require_function("(bytes done, bytes in all)", progress=progress)
    check_tokenizer(tokenizer)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory: must be a folder, got the file {folder}; name another")
    sources, metadata = _contents(model)
    made = _make_folders(folder)
    try:
        aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            save_config(model, aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            total = sum(info.nbytes for source in sources for info in source.infos)
            write(aside / WEIGHTS_FILE, sources, metadata, _counting(progress, total))
            _put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        for path in made:
            path.rmdir()
        raise
    return folder


def file_bytes(model: nn.Module) -> int:
    """Bytes of the file that `save` writes the weights to."""
    sources, metadata = _contents(model)
    return file_size([info for source in sources for info in source.infos], metadata)


def _contents(model: nn.Module) -> tuple[list[TensorSource], dict[str, str]]:
    """What to write, and the file's metadata."""
    sources, tied = _sources(model)
    return sources, header(model, tied) | notes.to_metadata(notes.notes_of(model))


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError unless it can be saved, or is None."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"tokenizer: must be one of transformers, got a {type(tokenizer).__name__}; leave it out, or load it first"
        )


def header(model: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    """The metadata of each of a checkpoint's files. `tied`: names -> the names that they stand for."""
    return {"format": _FORMAT, "version": _VERSION, "tied": json.dumps(tied), **overlap.to_metadata(model)}


def _make_folders(folder: Path) -> list[Path]:
    """Makes `folder` with its parents; gives those that were not there, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _counting(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return count


def _put_in_place(aside: Path, folder: Path) -> None:
    # The weights last: until then the folder's model is the old one.
    names = sorted((path.name for path in aside.iterdir()), key=lambda name: name == WEIGHTS_FILE)
    for name in names:
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(aside / name, folder / name)


def save_config(model: nn.Module, aside: Path) -> None:
    """Writes a transformers model's config, marked as ours, and its generation config into the folder `aside`."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "to_json_file"):
        return
    config.architectures = [type(model).__name__]
    config.dtype = getattr(model, "dtype", None)
    # Without this, transformers' from_pretrained would not miss the dense weights and run on random ones.
    config.quantization_config = {"quant_method": _FORMAT, "version": int(_VERSION)}
    config.to_json_file(aside / CONFIG_FILE, use_diff=True)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(aside)


def _sources(model: nn.Module) -> tuple[list[TensorSource], dict[str, str]]:
    """What to write, and which names (of tensors, of sparse modules) stand for one already written."""
    sources: list[TensorSource] = []
    tied: dict[str, str] = {}
    first_module: dict[int, str] = {}
    first_tensor: dict[Any, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, SparseModule):
            if id(module) in first_module:
                tied[name] = first_module[id(module)]
                continue
            weight = f"{prefix}weight"
            first = first_tensor.setdefault(_identity(module.packed), weight)
            if first == weight:
                sources.append(_sparse_source(weight, module))
            else:
                tied[weight] = first
        first_module[id(module)] = name
        for key, tensor in _own_state(prefix, module).items():
            first = first_tensor.setdefault(_identity(tensor), key)
            if first != key:
                tied[key] = first
                continue
            if tensor.is_meta:
                raise ValueError(
                    f"model: {key} is on the meta device and has no data; load its weights first"
                )
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(
                    f"model: {key} has dtype {tensor.dtype}, which the file cannot hold; cast it first"
                )
            info = TensorInfo(key, tensor.dtype, tuple(tensor.shape))
            sources.append(TensorSource([info], partial(list, [tensor])))
    return sources, tied


def _sparse_source(key: str, layer: SparseModule) -> TensorSource:
    if layer.packed.is_meta:
        raise ValueError(f"model: {key} is on the meta device and has no data; load its weights first")
    return weight_source(key, layer.spec, layer.nnz, layer.sparse_weight)


def weight_source(key: str, spec: WeightSpec, nnz: int, make: Callable[[], SparseWeight]) -> TensorSource:
    """The parts of a sparse weight that keeps `nnz` entries, as `key`.<part>; the weight is made when it is written."""
    infos = [TensorInfo(f"{key}.{name}", part.dtype, part.shape) for name, part in spec.parts(nnz).items()]
    return TensorSource(infos, lambda: list(make().parts().values()))


def _own_state(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The module's own part of the state dict, without its children's and without a packed weight."""
    state: dict[str, Any] = {}
    if isinstance(module, SparseModule):
        nn.Module._save_to_state_dict(module, state, prefix, keep_vars=True)
    else:
        module._save_to_state_dict(state, prefix, keep_vars=True)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: {key} is a {type(value).__name__}, only tensors are saved; keep such state in the config"
            )
    return state


def _identity(tensor: Tensor) -> Any:
    # Two parameters over the same memory are tied as well as one parameter under two names.
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that `save` wrote (also if its weights are damaged)."""
    folder = Path(path)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        pass
    # The weights are missing or damaged: whose they were, the config tells, and load() then says what is wrong.
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == _FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        return False


def load(
    directory: str | os.PathLike[str], model: nn.Module | None = None, progress: Progress | None = None
) -> Any:
    """The model that `save` wrote into `directory`, in evaluation mode.

    model: what to fill, for models that are not transformers' own: the dense model, on the CPU or (but for buffers that
        are not part of a state dict) on the meta device. It is changed in place, takes the file's dtypes, and stays as
        it was if the checkpoint is refused. Without it, the model is built from `config.json` with no memory and
        no time spent on weights that the file brings.

    Raises:
        CheckpointError: anything missing, truncated, foreign or contradictory.
    """
    require_path(directory=directory)
    if model is not None:
        require_module(model=model)
    require_function("(bytes done, bytes in all)", progress=progress)
    folder = Path(directory)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() and (folder / INDEX_FILE).is_file():
        weights = folder / INDEX_FILE
    with _reading(weights) as file:
        tied = _tied(weights, file.metadata() or {})
        skeleton: Any = from_config(folder, read_config(folder)) if model is None else model
        plan = _Plan(weights, file, skeleton, tied)
        modules, state = plan.read(progress)
        with _refusing(weights):
            fingerprint = overlap.from_metadata(file.metadata() or {})
            pruned = notes.from_metadata(file.metadata() or {})
    filled: Any = plan.fill(modules, state)
    notes.put(filled, pruned)
    if fingerprint is not None:
        overlap.note(filled, fingerprint)
    if model is None and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        filled.generation_config = GenerationConfig.from_pretrained(folder)
    return filled.eval()


def load_tokenizer(directory: str | os.PathLike[str]) -> Any | None:
    """The tokenizer saved along with a model, None if there is none."""
    folder = Path(directory)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What the file at `path` says wrongly about itself is an error of the checkpoint."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; pass the folder that save() wrote")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; pass the folder that save() wrote"
            + (", or finish the stream that wrote it" if (path.parent / STREAM_FILE).is_file() else "")
        )
    with open_sharded(path) if path.name == INDEX_FILE else open_whole(path) as file:
        yield file


def _tied(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not written by sparseprune (format {metadata.get('format')!r}); "
            "load a dense model with transformers, prune it, and save() it"
        )
    if metadata.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: version must be {_VERSION}, got {metadata.get('version')!r}; upgrade sparseprune"
        )
    try:
        tied = json.loads(metadata.get("tied", "{}"))
    except ValueError:
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise CheckpointError(f"{path}: the header's list of tied weights is damaged; save the model again")
    return tied


class _Plan:
    """What of a file goes where in a skeleton: checked in full, read in full, and only then put into the model."""

    def __init__(self, path: Path, file: Any, skeleton: nn.Module, tied: dict[str, str]) -> None:
        self.path, self.file, self.skeleton, self.tied = path, file, skeleton, tied
        self.keys = set(file.keys())
        self.modules = dict(skeleton.named_modules(remove_duplicate=False))
        specs = (key for key in self.keys if key.endswith(_SPEC) or key == _SPEC[1:])
        names = sorted(key.removesuffix(_SPEC[1:]).removesuffix(".") for key in specs)
        self.sparse = {name: self._parts_of(name) for name in names}
        # Modules without a weight of their own in the file, and those that have it.
        self.sharing = {
            _module_of(alias): _module_of(first)
            for alias, first in tied.items()
            if first.rpartition(".")[2] == "weight" and _module_of(first) in self.sparse
        }
        self._check_tied()
        self.state = self._skeleton_state()
        self.sources = self._find_sources()
        self._check_dense()

    def read(self, progress: Progress | None) -> tuple[dict[str, SparseModule], dict[str, Tensor]]:
        """The sparse modules, packed and validated one by one, and the dense tensors by name."""
        total, done = len(self.keys), 0
        modules: dict[str, SparseModule] = {}
        state = {}
        for name in self.sparse:
            modules[name] = self._read_sparse(name)
            done += 3
            if progress is not None:
                progress(done, total)
        for name, first in self.sharing.items():
            with self._blaming(f"{name}.weight"):
                modules[name] = self._in_place_of(name, modules[first])
        for key in sorted(self.keys & self.state.keys()):
            # A copy: what the file maps would vanish with the file.
            state[key] = self.file.get_tensor(key).clone()
            done += 1
            if progress is not None:
                progress(done, total)
        return modules, state

    def fill(self, modules: dict[str, SparseModule], state: dict[str, Tensor]) -> nn.Module:
        """Swaps the sparse modules in and sets the tensors, those of one tie to one object; gives the model."""
        root = self.skeleton
        ties.release(root, modules)
        for name, layer in modules.items():
            old = self.modules[name]
            root = layer if old is root else root
            put_in_place(self.skeleton, old, layer)
        for alias, first in self.tied.items():
            if first in modules:
                parent = self.modules[alias.rpartition(".")[0]]
                setattr(parent, alias.rpartition(".")[2], modules[first])
        objects: dict[str, Tensor] = {}
        for key, own in self.state.items():
            source = self.sources[key]
            if source not in objects:
                value = state[source]
                objects[source] = (
                    nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
                )
            objects[key] = objects[source]
        root.load_state_dict(objects, strict=False, assign=True)
        return root

    def _skeleton_state(self) -> dict[str, Tensor]:
        """Dense tensors the skeleton expects, the weights that the file has in sparse form left out."""
        state: dict[str, Tensor] = {}
        swapped = {id(self.modules[name]) for name in (*self.sparse, *self.sharing) if name in self.modules}
        for name, module in self.modules.items():
            prefix = f"{name}." if name else ""
            own = _own_state(prefix, module)
            if id(module) in swapped:
                own.pop(f"{prefix}weight", None)
            elif isinstance(module, SparseModule) and name not in self.tied:
                self._fail(
                    f"{name}{_SPEC}", "missing: the model has a sparse layer here; pass the dense model"
                )
            elif name in self.tied and self.tied[name] in self.sparse:
                own.clear()
            state.update(own)
            for buffer in module._non_persistent_buffers_set:
                tensor = module._buffers[buffer]
                if tensor is not None and tensor.is_meta and not isinstance(module, SparseModule):
                    self._fail(
                        f"{prefix}{buffer}",
                        "a buffer that no checkpoint holds is on the meta device; build the model on the CPU",
                    )
        return state

    def _find_sources(self) -> dict[str, str]:
        """The file's names for the skeleton's tensors: the own one, the one it is tied to, or a twin's."""
        twins: dict[int, list[str]] = {}
        for key, tensor in self.state.items():
            twins.setdefault(id(tensor), []).append(key)
        sources: dict[str, str] = {}
        for key, tensor in self.state.items():
            candidates = (key, self.tied.get(key), *twins[id(tensor)])
            found = next((name for name in candidates if name in self.keys), None)
            if found is not None:
                sources[key] = found
        return sources

    def _parts_of(self, name: str) -> dict[str, str]:
        """The parts of the sparse weight of module `name`, and what the file calls them; all are there."""
        key = f"{name}.weight".lstrip(".")
        self._check_module(name, f"{key}.{SPEC}")
        with self._blaming(key):
            spec = WeightSpec.from_tensor(self.file.get_tensor(f"{key}.{SPEC}"))
        parts = {part: f"{key}.{part}" for part in spec.part_names}
        for stored in parts.values():
            if stored not in self.keys:
                self._fail(stored, f"missing, though weight.{SPEC} is there; save the model again")
        return parts

    def _check_module(self, name: str, key: str) -> None:
        """A packed weight can take its place in module `name`; `key`: what the file says so by."""
        module = self.modules.get(name)
        if module is None or matrix_shape(module) is None:
            found = "no such module" if module is None else f"a {type(module).__name__}"
            self._fail(
                key,
                f"the model must have a linear layer or an embedding here, it has {found}; {_OTHER_MODEL}",
            )
        problem = refusal(module) if _is_embedding(module) else None
        if problem:
            self._fail(key, f"the embedding {problem}")

    def _check_tied(self) -> None:
        for name, first in self.sharing.items():
            self._check_module(name, f"{name}.weight")
            self._check_shape(f"{name}.weight", self._shape_of(first), self._shape_of(name))
        for alias, first in self.tied.items():
            if first in self.sparse and alias not in self.modules:
                self._fail(alias, f"the model must have a layer here, tied to {first}, and has none")

    def _check_dense(self) -> None:
        missing = sorted(self.state.keys() - self.sources.keys())
        if missing:
            self._fail(missing[0], f"missing ({len(missing)} missing in all); {_OTHER_MODEL}")
        parts = (parts.values() for parts in self.sparse.values())
        unexpected = sorted(self.keys - self.state.keys() - set(chain.from_iterable(parts)))
        if unexpected:
            self._fail(unexpected[0], f"not in the model ({len(unexpected)} such in all); {_OTHER_MODEL}")
        for key, own in self.state.items():
            self._check_shape(
                key, tuple(self.file.get_slice(self.sources[key]).get_shape()), tuple(own.shape)
            )

    def _check_shape(self, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            self._fail(key, f"shape must be {expected}, as in the model, got {shape}; {_OTHER_MODEL}")

    def _read_sparse(self, name: str) -> SparseModule:
        parts = self.sparse[name]
        with self._blaming(parts[SPEC].removesuffix(f".{SPEC}")):
            weight = SparseWeight.from_parts({part: self.file.get_tensor(key) for part, key in parts.items()})
            self._check_shape(parts[SPEC], weight.shape, self._shape_of(name))
            return self._in_place_of(name, weight)

    def _in_place_of(self, name: str, weight: SparseWeight | SparseModule) -> SparseModule:
        old = self.modules[name]
        kind: Any = SparseEmbedding if _is_embedding(old) else SparseLinear
        made: SparseModule = kind.in_place_of(old, weight)
        return made

    def _shape_of(self, name: str) -> tuple[int, int]:
        shape = matrix_shape(self.modules[name])
        assert shape is not None  # _check_module ensured it
        return shape

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """What the file says wrongly about `name` is an error of the checkpoint."""
        try:
            yield
        except CheckpointError:
            raise
        except ValueError as error:
            self._fail(name, f"{error}")

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {name}: {problem}")


def _module_of(weight: str) -> str:
    """The module whose `weight` this is."""
    return weight.removesuffix("weight").removesuffix(".")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag, SparseEmbedding))
