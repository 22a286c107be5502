"""Every kernel of the linear, of the CPU's instruction sets and of the GPU: how to run it, and on which shapes it pays to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import isa
from helpers.backends import GPUS, LAYOUTS, Place, place_of
from helpers.isa import DTYPES, STRATEGIES, layout_of
from helpers.shapes import BATCHES, EDGES, fits, generator, mask
from torch import Tensor

from sparseprune.kernels import cuda, native, ops
from sparseprune.kernels.packing import Packed, packing_code

# A GPU's tiles are 8 to 256 wide; a block of columns is 64. The emulator is a thousand times slower than a CPU.
GPU_EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 129, 255, 257)
GPU_BATCHES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 129, 255, 257)
_GPU_PRODUCTS = 1 << 20  # in one call


@dataclass(frozen=True)
class Kernel:
    """One kernel of a CPU; the kernels of a GPU for one layout and dtype, whose configurations take turns."""

    place: str  # as backends.running has it
    dtype: torch.dtype
    strategy: str  # of a CPU; of a GPU the layout

    @property
    def at(self) -> Place:
        return place_of(self.place)

    @property
    def is_gpu(self) -> bool:
        return self.place in GPUS

    @property
    def layout(self) -> str:
        return self.strategy if self.is_gpu else layout_of(self.strategy)

    @property
    def edges(self) -> tuple[int, ...]:
        return GPU_EDGES if self.is_gpu else EDGES

    @property
    def batches(self) -> tuple[int, ...]:
        return GPU_BATCHES if self.is_gpu else BATCHES

    def cols(self, cols: int, up: bool = True) -> int:
        """The next number of columns that the layout holds."""
        if self.layout != "sparse24":
            return cols
        return -(-cols // 4) * 4 if up or cols < 4 else cols // 4 * 4

    def batch(self, rows: int, cols: int, batch: int) -> int:
        """A batch that the emulator gets done."""
        return batch % 11 if self.is_gpu and rows * cols * batch > _GPU_PRODUCTS else batch

    def hold(self, w: Tensor) -> Tensor:
        """What the layout holds of w [rows, cols]."""
        if self.layout != "sparse24":
            return w
        return w * mask(*w.shape, "2:4", generator(*w.shape, 1))

    def pack(self, w: Tensor) -> Packed:
        """On the device; under the level in force, whose column order it has."""
        there = self.at.put(w)
        values, bits = (
            ops.dense_to_nm(there, 2, 4) if self.layout == "sparse24" else ops.dense_to_bitmap(there)
        )
        return ops.pack(values, bits, w.shape[1], self.layout)

    def configs(self) -> list[str]:
        return cuda.configs(packing_code(self.layout, self.dtype))

    def run(self, x: Tensor, w: Tensor, bias: Tensor | None, turn: int | None = None) -> Tensor:
        """x @ w.T + bias, of CPU tensors to a CPU tensor. turn: which configuration and how many splits a GPU is
        forced to; without it, those that the plan chooses."""
        packed = self.pack(w)
        if not self.is_gpu:
            return cpu_linear(x, packed, bias, STRATEGIES.index(self.strategy))
        forced = None
        if turn is not None:
            blocks = max(1, -(-w.shape[1] // 64))
            splits = [count for count in (1, 2, 3, blocks) if count <= blocks]
            again, config = divmod(turn, len(self.configs()))
            forced = config, splits[again % len(splits)]
        put = self.at.put
        return gpu_linear(put(x), packed, None if bias is None else put(bias), forced).cpu()

    def __str__(self) -> str:
        return f"{self.place}-{str(self.dtype)[6:]}-{self.strategy}"


def cpu_linear(x: Tensor, packed: Packed, bias: Tensor | None = None, strategy: int = -1) -> Tensor:
    """`native.linear`, which takes a packed weight by its fields."""
    return native.linear(x, packed.blob, bias, *packed[1:], strategy)


def gpu_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, forced: tuple[int, int] | None = None
) -> Tensor:
    """`cuda.linear` likewise."""
    return cuda.linear(x, packed.blob, bias, *packed[1:], forced)


CPU_KERNELS = [Kernel(*kernel) for kernel in isa.KERNELS]
GPU_KERNELS = [
    Kernel(gpu, dtype, layout)
    for gpu in GPUS
    for dtype in DTYPES
    for layout in LAYOUTS[gpu]
    if fits(layout, dtype)
]
KERNELS = CPU_KERNELS + GPU_KERNELS
