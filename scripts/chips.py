"""What GPUs can hold and do: the limits that occupancy follows from, and the roofline of a launch."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # in a multiprocessor, on every architecture here
REGISTER_UNIT = 256  # a warp's registers are handed out in pieces of this
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # a block's, by the system
WARP_UNIT = 4  # a block's warps are spread over four schedulers, which own a quarter of the registers each


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (CUDA programming guide, "Technical specifications per compute capability")."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_block: int  # bytes that one block may ask for


ARCHITECTURES = {
    "80": Architecture(64, 32, 164 * 1024, 163 * 1024),
    "86": Architecture(48, 16, 100 * 1024, 99 * 1024),
    "89": Architecture(48, 24, 100 * 1024, 99 * 1024),
    "90a": Architecture(64, 32, 228 * 1024, 227 * 1024),
    "100": Architecture(64, 32, 228 * 1024, 227 * 1024),
    "120": Architecture(48, 24, 100 * 1024, 99 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds at once (0: the kernel cannot be launched), and what keeps it from more."""

    blocks: int
    share: float  # a fraction of the warps it could hold
    limit: str


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks of `threads`, with so many registers a thread and so many bytes of shared memory a block.

    Raises:
        KeyError: for an architecture that ARCHITECTURES does not have.
    """
    chip = ARCHITECTURES[arch]
    warps = -(-threads // 32)
    by_quarter = (
        REGISTERS // WARP_UNIT // _up(registers * 32, REGISTER_UNIT)
    )  # warps that a scheduler's share serves
    limits = {
        "blocks": chip.blocks,
        "warps": chip.warps // warps,
        "registers": by_quarter * WARP_UNIT // _up(warps, WARP_UNIT),
        "shared memory": chip.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
    }
    if shared > chip.shared_block:
        limits["shared memory"] = 0
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / chip.warps, limit)


@dataclass(frozen=True)
class Card:
    """A card's data sheet: bytes and operations a second, at boost clock; tensor cores with float32 sums."""

    name: str
    arch: str
    multiprocessors: int
    bandwidth: float
    dense: float  # bfloat16, tensor cores
    sparse: float  # 2:4, counting the zeros
    vector: float  # float32


CARDS = (
    Card("A100 SXM 80 GB", "80", 108, 2.039e12, 312e12, 624e12, 19.5e12),
    Card("RTX 4090", "89", 128, 1.008e12, 165.2e12, 330.3e12, 82.6e12),
    Card("H100 SXM", "90a", 132, 3.352e12, 989.4e12, 1978.9e12, 66.9e12),
)


@dataclass(frozen=True)
class Work:
    """What a launch has to move and to compute, whatever its code: every operand once, zeros of 2:4 counted."""

    bytes: int
    operations: int = 0
    unit: str = "dense"  # which of a card's rates: dense, sparse, vector


def floor_seconds(card: Card, work: Work) -> float:
    """The roofline: no launch of this work is faster on this card."""
    return max(work.bytes / card.bandwidth, work.operations / getattr(card, work.unit))


def bound(card: Card, work: Work) -> str:
    """`memory` or `arithmetic`."""
    return (
        "memory"
        if work.bytes / card.bandwidth >= work.operations / getattr(card, work.unit)
        else "arithmetic"
    )


def dense_linear(rows: int, cols: int, batch: int, item: int = 2) -> Work:
    return Work(
        item * (rows * cols + batch * (rows + cols)),
        2 * rows * cols * batch,
        "dense" if item == 2 else "vector",
    )


def sparse24_linear(rows: int, cols: int, batch: int) -> Work:
    """bf16 or f16: half of the values and two bits of metadata for each."""
    weight = rows * cols + rows * cols // 8
    return Work(weight + 2 * batch * (rows + cols), 2 * rows * cols * batch, "sparse")


def bitmap8_linear(rows: int, cols: int, batch: int, kept: float, item: int = 2) -> Work:
    """A bit for each weight, the kept values, an offset for each unit of 16 x 64; the product runs over zeros too."""
    weight = rows * cols // 8 + int(rows * cols * kept) * item + rows * cols // (16 * 64) * 8
    operations = 2 * rows * cols * batch
    return Work(weight + item * batch * (rows + cols), operations, "dense" if item == 2 else "vector")


def codes_linear(rows: int, cols: int, batch: int, bits: int, two_four: bool = False) -> Work:
    """Codes of 8 or 4 bits in groups of 64 with scales of 16, activations of 16; 2:4 keeps half of the codes and two bits of
    metadata for each."""
    weight = rows * cols * bits // 8
    if two_four:
        weight = weight // 2 + rows * cols // 8
    weight += rows * cols // 64 * 2
    return Work(
        weight + 2 * batch * (rows + cols), 2 * rows * cols * batch, "sparse" if two_four else "dense"
    )
