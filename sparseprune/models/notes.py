"""What a weight was pruned to, noted on the module that holds it, so that nobody has to guess it from the zeros.

A note is plain data among the module's attributes: it is copied, moved, pickled and put back along with it, also where
sparseprune is not installed. It says which zeros it is about, by a digest: whoever reads it sees whether the weight has
changed since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparseprune.kernels import ops
from sparseprune.models.sites import WeightSite

__all__ = [
    "Note", "carry", "digest_of", "from_metadata", "kept_bits", "note", "noted", "notes_of", "put",
    "recall", "to_metadata",
]  # fmt: skip

_ATTRIBUTE = "_sparseprune_pruned"
_PATTERN = re.compile(r"unstructured|\d{1,4}[:x]\d{1,4}")

Notes = Mapping[str, Mapping[str, tuple[str, str]]]
"""Of a whole model: name of a module -> slot of a weight in it -> (pattern, digest)."""


@dataclass(frozen=True)
class Note:
    """`pattern`: "2:4", any "N:M", blocks such as "16x1", "unstructured"; `digest`: of the zeros that this gave."""

    pattern: str
    digest: str

    def __str__(self) -> str:
        return "pruned unstructured" if self.pattern == "unstructured" else f"pruned to {self.pattern}"


def kept_bits(weight: Tensor) -> Tensor:
    """`uint8 [rows, ceil(cols / 8)]` on the CPU, a 1 for each non-zero of `weight` [rows, cols], of any dtype, anywhere."""
    return ops.pack_mask((weight.detach() != 0).cpu())


def digest_of(bits: Tensor) -> str:
    """Tells one set of zeros from another; `bits` as from `kept_bits`."""
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=8).hexdigest()


def note(site: WeightSite, pattern: str) -> None:
    """Notes that the site's weight, as it is now, was pruned to `pattern`; takes the place of an earlier note."""
    made = (pattern, digest_of(kept_bits(site.weight)))
    # a new dict each time: whoever keeps the module's attributes to restore them (`Snapshot`) keeps the old one
    for module in site.places:
        setattr(module, _ATTRIBUTE, {**_notes(module), site.slot: made})


def recall(site: WeightSite) -> Note | None:
    """What is noted on the site, None if nothing is. It may be stale: compare its digest."""
    return noted(site.module, site.slot)


def noted(module: nn.Module, slot: str = "weight") -> Note | None:
    """What is noted about a weight of `module`."""
    found = _notes(module).get(slot)
    return None if found is None else Note(*found)


def carry(old: nn.Module, new: nn.Module) -> None:
    """`new` holds what `old` held, and takes over its notes."""
    if _notes(old):
        setattr(new, _ATTRIBUTE, dict(_notes(old)))


def put(model: nn.Module, notes: Notes) -> None:
    """The model's weights are others now, about which this is known, and nothing else."""
    for name, module in model.named_modules():
        if name in notes:
            setattr(module, _ATTRIBUTE, dict(notes[name]))
        elif _notes(module):
            delattr(module, _ATTRIBUTE)


def notes_of(model: nn.Module) -> Notes:
    """All that is noted in a model."""
    return {name: _notes(module) for name, module in model.named_modules() if _notes(module)}


def to_metadata(notes: Notes) -> dict[str, str]:
    """The notes as an entry of a file's header, no entry without any."""
    return {"pruned": json.dumps(notes)} if notes else {}


def from_metadata(metadata: Mapping[str, str]) -> Notes:
    """What `to_metadata` put into a file's header.

    Raises:
        ValueError: anything else.
    """
    text = metadata.get("pruned", "{}")
    try:
        found = json.loads(text)
        notes = {
            name: {slot: (pattern, digest) for slot, (pattern, digest) in slots.items()}
            for name, slots in found.items()
        }
        entries = [entry for slots in notes.values() for entry in slots.values()]
        if not all(_PATTERN.fullmatch(pattern) and isinstance(digest, str) for pattern, digest in entries):
            raise ValueError("other values")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"pruned: must say (pattern, digest) of each weight, got {text[:80]!r} ({error}); save the model again"
        ) from error
    return notes


def _notes(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = getattr(module, _ATTRIBUTE, {})
    return found
