"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Batches", "DType", "DTypeOption", "Exclude", "Include", "Json", "Model", "Policy"]


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Policy(str, Enum):
    auto = "auto"
    always = "always"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file, or a folder of ours.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DTypeOption = Annotated[
    DType, typer.Option(help="Dtype of the weights; auto: as in the folder, bfloat16 for a GGUF file.")
]
Include = Annotated[
    list[str] | None, typer.Option(help="Only layers whose name matches this shell pattern (repeatable).")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out layers that match this shell pattern (repeatable).")
]
Batches = Annotated[
    list[int],
    typer.Option("--batch", min=1, help="Batch size (rows of activations) that counts (repeatable)."),
]
