"""How a benchmark's results are written. Nothing but the standard library: gpu_check runs before torch is known to work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_json(run: Mapping[str, Any]) -> str:
    """Four digits of every float and a line for each measurement, so that two runs can be compared by a diff."""
    parts = []
    for key, value in run.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(_rounded(it)) for it in value) + "\n]"
        else:
            text = json.dumps(_rounded(value))
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(it) for key, it in value.items()}
    return [_rounded(it) for it in value] if isinstance(value, (list, tuple)) else value
