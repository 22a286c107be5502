"""What `quantize` is asked for."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from sparseprune.options import option, require_above, require_among, require_path
from sparseprune.pruning.options import Reconstruction

__all__ = ["Quantization"]


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized; see `sparseprune.quantize`, whose arguments these are.

    Raises:
        ValueError: a value out of range.
    """

    encoding: Literal["int4", "int4_minimum", "int8"] = option(
        "int4",
        "int8, int4, or int4_minimum: int4 with a minimum for each group. Sparse weights become int4 or int8.",
    )
    method: Literal["auto", "nearest", "gptq"] = option(
        "auto",
        "gptq makes up for each rounding in the weights that are left, and needs --calibration; nearest rounds; auto: gptq "
        "where there is calibration text and fewer than 8 bits.",
    )
    _: KW_ONLY
    group_size: Literal[32, 64, 128] = option(64, "Columns that share a scale: 32, 64 or 128.", given=int)
    scale_dtype: Literal["float16", "bfloat16"] = option("float16", "Of the scales.")
    keep: str | Path | None = option(
        None,
        "A GGUF file whose 4 and 8 bit weights are kept as they are, bit by bit, where the model still has them.",
        given=Path,
    )

    embeddings: Literal["int4", "int8"] | None = option(
        None,
        "The token embeddings and the output head, too, rounded to nearest: int8 or int4. A tied head shares the memory.",
    )

    reconstruction: Reconstruction | bool | None = option(
        None,
        "Train each block through its codes towards the dense one's outputs; needs --calibration.",
        flag="--reconstruct/--no-reconstruct",
        given=bool | None,
    )
    minutes: float | None = option(None, "How long it may take, where blocks are solved on --calibration.")

    def __post_init__(self) -> None:
        require_among(("int4", "int4_minimum", "int8"), encoding=self.encoding)
        require_among(("auto", "nearest", "gptq"), method=self.method)
        require_among(("float16", "bfloat16"), scale_dtype=self.scale_dtype)
        if self.embeddings is not None:
            require_among(("int4", "int8"), embeddings=self.embeddings)
        if type(self.group_size) is not int or self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size: must be 32, 64 or 128, got {self.group_size!r}")
        if not isinstance(self.reconstruction, (bool, Reconstruction, type(None))):
            raise ValueError(
                f"reconstruction: must be True, False or a Reconstruction, got {self.reconstruction!r}"
            )
        require_above(0, minutes=self.minutes)
        require_path(optional=True, keep=self.keep)
        if self.keep is not None and not Path(self.keep).is_file():
            raise FileNotFoundError(
                f"keep: there is no file {self.keep}; pass the GGUF file that the model came from"
            )
