"""What `compress` is asked for."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sparseprune.options import option, require_above, require_path

__all__ = ["Budget", "Compression"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", re.IGNORECASE)
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """How large the file with the weights may be: `bytes` of it, or `bits` for each of the model's weights; one is None."""

    bytes: int | None = None
    bits: float | None = None

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """ "62MB" (10^6 bytes), "60MiB" (2^20), "3.5 bits", or a number of bytes; a `Budget` is given back as it is.

        Raises:
            ValueError: anything else, or nothing at all.
        """
        if isinstance(text, Budget):
            return text
        found = cls()
        if isinstance(text, int) and not isinstance(text, bool):
            found = cls(bytes=text)
        elif isinstance(text, str) and (match := _BYTES.fullmatch(text)):
            found = cls(bytes=int(float(match[1]) * _UNITS[match[2].upper()]))
        elif isinstance(text, str) and (match := _BITS.fullmatch(text)):
            found = cls(bits=float(match[1]))
        if not (found.bytes or found.bits) or (found.bytes or 1) < 0:
            raise ValueError(
                f'budget: must be a size such as "62MB" or "60MiB", bits a weight such as "3.5 bits", or a number of bytes, '
                f"got {text!r}"
            )
        return found

    def of(self, weights: int) -> int:
        """In bytes, for a model of so many weights."""
        return self.bytes if self.bytes is not None else int((self.bits or 0) * weights / 8)

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight" if self.bytes is None else f"{self.bytes:,} bytes"


@dataclass(frozen=True)
class Compression:
    """How a model is compressed; see `sparseprune.compress`, whose arguments these are.

    Raises:
        ValueError: a value out of range.
    """

    budget: str | int | Budget = option(
        None, 'Size of the file with the weights: "62MB", "60MiB", or "3.5 bits" a weight.', given=str
    )
    _: KW_ONLY
    keep: str | Path | None = option(
        None,
        "A GGUF file whose 4 and 8 bit weights are a form that costs nothing, where the model still has them.",
        given=Path,
    )

    minutes: float = option(20.0, "How long it may take.")

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        require_above(0, minutes=self.minutes)
        require_path(optional=True, keep=self.keep)
        if self.keep is not None and not Path(self.keep).is_file():
            raise FileNotFoundError(
                f"keep: there is no file {self.keep}; pass the GGUF file that the model came from"
            )
