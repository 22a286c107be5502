"""llama.cpp's three tools: how they are called, and what they print."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any


def requantize(tools: Path, source: Path, kind: str, folder: Path) -> Path:
    """`source` in another of llama.cpp's kinds ("Q4_0"), made once. Its quantized tensors are de-quantized on the way."""
    made = folder / f"{source.stem.rsplit('.', 1)[0]}.{kind}.gguf"
    if not made.is_file():
        part = made.with_suffix(".part")
        _output(tools / "llama-quantize", "--allow-requantize", source, part, kind)
        part.rename(made)
    return made


def speeds(tools: Path, file: Path, *, threads: int, prompt: int, new: int) -> tuple[float, float]:
    """(decode, prompt) in tokens per second: one reading of `prompt` tokens and `new` steps of one token, after a warm-up."""
    text = _output(
        tools / "llama-bench", "-m", file, "-t", threads, "-p", prompt, "-n", new, "-r", 1, "-o", "json"
    )
    return read_speeds(text)


def read_speeds(text: str) -> tuple[float, float]:
    """(decode, prompt) in tokens per second, of what llama-bench prints as JSON.

    Raises:
        ValueError: there are not exactly one test of decoding and one of a prompt.
    """
    tests = json.loads(text)
    decode = [it["avg_ts"] for it in tests if it["n_gen"] and not it["n_prompt"]]
    prompt = [it["avg_ts"] for it in tests if it["n_prompt"] and not it["n_gen"]]
    if len(decode) != 1 or len(prompt) != 1:
        raise ValueError(
            f"llama-bench: expected one test of decoding and one of a prompt, got {len(decode)} and {len(prompt)}"
        )
    return decode[0], prompt[0]


def perplexity(tools: Path, file: Path, text: Path, *, threads: int, window: int, windows: int) -> float:
    """llama-perplexity's estimate: windows of `window` tokens, of which the second half is scored."""
    return read_perplexity(
        _output(
            tools / "llama-perplexity", "-m", file, "-f", text, "-t", threads, "-c", window, "--chunks", windows,
            "-b", window, "-ub", window, both=True,
        )
    )  # fmt: skip


def read_perplexity(text: str) -> float:
    """
    Raises:
        ValueError: no estimate in what llama-perplexity prints.
    """
    found = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if found is None:
        raise ValueError(f"llama-perplexity: expected a final estimate, got: {text.strip()[-500:]}")
    return float(found[1])


def _output(*command: Any, both: bool = False) -> str:
    """What a tool prints; `both`: to stderr, too."""
    done = subprocess.run([str(it) for it in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{Path(command[0]).name}: ended with code {done.returncode}: {done.stderr[-2000:]}"
        )
    return done.stdout + done.stderr if both else done.stdout
