"""The rows of the benchmark's table, and the speed each is meant to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A format, its sparsity and dtype; `speedups` over torch's dense layer to reach on LLaMA-7B, by batch size."""

    format: str
    sparsity: float
    dtype: str
    speedups: Mapping[int, float] = field(default_factory=dict)
    read_shares: Mapping[int, float] = field(default_factory=dict)
    """Share of the measured read bandwidth to reach, by batch size."""
    over_torch_csr: Mapping[int, float] = field(default_factory=dict)
    """Speed-up over torch.sparse CSR to reach, by batch size."""

    @property
    def name(self) -> str:
        zeros = "" if ":" in self.format else f" {self.sparsity:.0%}"
        return f"{self.format}{zeros} {self.dtype}"


def _by_batch(one: float, four: float, eight: float, up_to_32: float, up_to_512: float) -> dict[int, float]:
    return {1: one, 4: four, 8: eight, 16: up_to_32, 32: up_to_32} | dict.fromkeys(
        (64, 128, 256, 512), up_to_512
    )


CASES = (
    Case("2:4", 0.5, "bf16", _by_batch(2.8, 2.8, 2.0, 1.6, 1.2), read_shares={1: 0.8}),
    Case("bitmap", 0.5, "bf16", _by_batch(2.3, 1.8, 1.2, 1.0, 0.9)),
    Case("bitmap", 0.7, "bf16", _by_batch(2.8, 2.0, 1.4, 1.1, 1.1)),
    Case("bitmap", 0.9, "bf16", _by_batch(4.0, 2.5, 2.0, 1.8, 2.0)),
    Case("2:4", 0.5, "fp32", _by_batch(2.0, 3.0, 2.5, 2.0, 1.4)),
    Case("csr", 0.9, "fp32", _by_batch(4.0, 4.0, 3.0, 3.0, 3.0), over_torch_csr={1: 3.0}),
    Case("2:4", 0.5, "fp16"),
)
TARGETED_MODEL = "LLaMA-7B"

MASK_OVER_MUL = 4.0
MASK_COPY_SHARE = 0.8
CSR_OVER_PEERS = 10.0
BYTES_OF_DENSE = 0.57
CALL_OF_DENSE = 1.0
