"""What all quality benchmarks share: the model, the texts, and how a perplexity is taken."""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparseprune as sp
from sparseprune.calibration import CalibrationData, token_ids, windows
from sparseprune.models.loading import demo_model_path, load_dense

LENGTH = 1024


@dataclass
class Protocol:
    """A model, bfloat16 as its users have it, with text to calibrate on and other text to measure on."""

    model: Any
    tokenizer: Any
    calibration_ids: torch.Tensor
    evaluation_ids: torch.Tensor
    windows: int
    dtype: torch.dtype

    def calibration(self, count: int = 32, length: int = LENGTH, seed: int = 0) -> CalibrationData:
        return windows(self.calibration_ids, length=length, count=count, seed=seed)

    def perplexity(self, model: Any) -> float:
        model = copy.deepcopy(model).to(self.dtype)
        return sp.perplexity(model, None, self.evaluation_ids, window=LENGTH, max_windows=self.windows).value


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder or GGUF file; SmolLM2-135M-Instruct by default"
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate and recover on")
    parser.add_argument("--text", type=Path, required=True, help="other text, to measure on")
    parser.add_argument("--windows", type=int, default=16, help=f"evaluation windows of {LENGTH} tokens")
    parser.add_argument("--dtype", default="float32", help="that perplexity is taken in")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON to write; what is in it already is kept"
    )
    return parser


def setup(options: argparse.Namespace) -> Protocol:
    model, tokenizer = load_dense(options.model or demo_model_path(), torch.bfloat16)
    calibration = token_ids(options.calibration.read_text(encoding="utf-8"), tokenizer)
    evaluation = token_ids(options.text.read_text(encoding="utf-8"), tokenizer)
    dtype = getattr(torch, options.dtype)
    return Protocol(model, tokenizer, calibration, evaluation, options.windows, dtype)


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, results: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
