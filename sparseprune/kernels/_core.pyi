"""The compiled extension. Addresses are `tensor.data_ptr()`, which keep no tensor alive: see native.py."""

from torch import Tensor, dtype

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isas_built() -> list[str]: ...
def isas_available() -> list[str]: ...
def use_tensors(tensor: type, parameter: type, empty: object, dtypes: list[dtype], /) -> bool: ...
def linear_of_tensors(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, cols: int, packing: int, threads: int, /
) -> Tensor | None: ...
def linear(
    packed: int,
    packed_bytes: int,
    rows: int,
    cols: int,
    packing: int,
    x: int,
    batch: int,
    stride: int,
    bias: int,
    out: int,
    threads: int,
    strategy: int,
    /,
) -> None: ...
def lookup(
    packed: int,
    packed_bytes: int,
    rows: int,
    cols: int,
    packing: int,
    indices: int,
    index_bytes: int,
    count: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def round_weight(
    weight: int,
    rows: int,
    cols: int,
    group: int,
    scales: int,
    minimums: int,
    kept: int,
    zero: float,
    least: float,
    largest: float,
    dtype: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def round_gradients(
    weight: int,
    rows: int,
    cols: int,
    group: int,
    scales: int,
    minimums: int,
    kept: int,
    zero: float,
    least: float,
    largest: float,
    dtype: int,
    gradient: int,
    of_weight: int,
    of_scales: int,
    of_minimums: int,
    threads: int,
    /,
) -> None: ...
def strategy(packed: int, packed_bytes: int, batch: int, /) -> str: ...
def header(packed: int, packed_bytes: int, rows: int, cols: int, packing: int, /) -> dict[str, int]: ...
def scan_dense(
    dense: int, rows: int, cols: int, dtype: int, bits: int, offsets: int, threads: int, /
) -> int: ...
def count_dense(dense: int, rows: int, cols: int, dtype: int, offsets: int, threads: int, /) -> int: ...
def fill_groups(
    rows: int, cols: int, n: int, m: int, bits: int, threads: int, /
) -> tuple[int, int, int] | None: ...
def count_bits(rows: int, cols: int, bits: int, offsets: int, threads: int, /) -> int: ...
def compress_dense(
    dense: int, rows: int, cols: int, dtype: int, bits: int, offsets: int, values: int, threads: int, /
) -> None: ...
def expand_dense(
    values: int, bits: int, offsets: int, dense: int, rows: int, cols: int, dtype: int, threads: int, /
) -> None: ...
def dense_to_csr(
    dense: int, rows: int, cols: int, dtype: int, crow: int, col: int, values: int, threads: int, /
) -> None: ...
def csr_to_dense(
    crow: int,
    col: int,
    nnz: int,
    values: int,
    dense: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def packed_bytes(rows: int, cols: int, packing: int, nnz: int, bits: int, /) -> int: ...
def pack(
    values: int,
    bits: int,
    offsets: int,
    scales: int,
    minimums: int,
    packed: int,
    rows: int,
    cols: int,
    packing: int,
    threads: int,
    /,
) -> None: ...
def unpack_bits(packed: int, packed_bytes: int, bits: int, threads: int, /) -> None: ...
def unpack_values(packed: int, packed_bytes: int, offsets: int, values: int, threads: int, /) -> None: ...
def unpack_scales(packed: int, packed_bytes: int, scales: int, minimums: int, threads: int, /) -> None: ...
def mask_bytes(input: int, mask: int, out: int, n: int, dtype: int, threads: int, /) -> None: ...
def mask_bits(input: int, bits: int, out: int, rows: int, cols: int, dtype: int, threads: int, /) -> None: ...
def threshold(
    input: int, limit: float, out: int, bits: int, rows: int, cols: int, dtype: int, threads: int, /
) -> None: ...
def bytes_to_bits(rows: int, cols: int, mask: int, bits: int, threads: int, /) -> None: ...
def bits_to_bytes(rows: int, cols: int, bits: int, mask: int, threads: int, /) -> None: ...

class Cuda:
    """The submodule `cuda`. The first two arguments of a launch are the device's index and the stream; see cuda.py."""

    toolkit: str
    targets: str

    def missing(self) -> str: ...
    def sm_count(self, device: int, /) -> int: ...
    def mask_bytes(
        self, device: int, stream: int, input: int, mask: int, out: int, n: int, dtype: int, /
    ) -> None: ...
    def mask_bits(
        self,
        device: int,
        stream: int,
        input: int,
        bits: int,
        out: int,
        rows: int,
        cols: int,
        dtype: int,
        /,
    ) -> None: ...
    def threshold(
        self,
        device: int,
        stream: int,
        input: int,
        limit: float,
        out: int,
        bits: int,
        rows: int,
        cols: int,
        dtype: int,
        /,
    ) -> None: ...
    def bytes_to_bits(
        self, device: int, stream: int, rows: int, cols: int, mask: int, bits: int, /
    ) -> None: ...
    def bits_to_bytes(
        self, device: int, stream: int, rows: int, cols: int, bits: int, mask: int, /
    ) -> None: ...
    def scan_dense(
        self,
        device: int,
        stream: int,
        dense: int,
        rows: int,
        cols: int,
        dtype: int,
        bits: int,
        counts: int,
        /,
    ) -> None: ...
    def count_bits(
        self, device: int, stream: int, rows: int, cols: int, bits: int, counts: int, error: int, /
    ) -> None: ...
    def fill_groups(
        self, device: int, stream: int, rows: int, cols: int, n: int, m: int, bits: int, error: int, /
    ) -> None: ...
    def compress_dense(
        self,
        device: int,
        stream: int,
        dense: int,
        rows: int,
        cols: int,
        dtype: int,
        bits: int,
        offsets: int,
        values: int,
        /,
    ) -> None: ...
    def expand_dense(
        self,
        device: int,
        stream: int,
        values: int,
        bits: int,
        offsets: int,
        dense: int,
        rows: int,
        cols: int,
        dtype: int,
        /,
    ) -> None: ...
    def dense_to_csr(
        self,
        device: int,
        stream: int,
        dense: int,
        rows: int,
        cols: int,
        dtype: int,
        crow: int,
        col: int,
        values: int,
        /,
    ) -> None: ...
    def csr_to_dense(
        self,
        device: int,
        stream: int,
        crow: int,
        col: int,
        nnz: int,
        values: int,
        dense: int,
        rows: int,
        cols: int,
        dtype: int,
        error: int,
        /,
    ) -> None: ...
    def sections(
        self, rows: int, cols: int, packing: int, stored: int, /
    ) -> tuple[int, int, int, int, int]: ...
    def header_bytes(self, rows: int, cols: int, packing: int, nnz: int, stored: int, /) -> bytes: ...
    def header(
        self, header: int, packed_bytes: int, rows: int, cols: int, packing: int, /
    ) -> dict[str, int]: ...
    def sparse24_pack(
        self,
        device: int,
        stream: int,
        dense: int,
        bits: int,
        rows: int,
        cols: int,
        packing: int,
        packed: int,
        packed_bytes: int,
        error: int,
        /,
    ) -> None: ...
    def sparse24_unpack(
        self,
        device: int,
        stream: int,
        packed: int,
        packed_bytes: int,
        rows: int,
        cols: int,
        packing: int,
        dense: int,
        bits: int,
        /,
    ) -> None: ...
    def fragments_pack(
        self,
        device: int,
        stream: int,
        codes: int,
        mask: int,
        scales: int,
        minimums: int,
        rows: int,
        cols: int,
        packing: int,
        packed: int,
        packed_bytes: int,
        /,
    ) -> None: ...
    def fragments_unpack(
        self,
        device: int,
        stream: int,
        packed: int,
        packed_bytes: int,
        rows: int,
        cols: int,
        packing: int,
        codes: int,
        mask: int,
        scales: int,
        minimums: int,
        /,
    ) -> None: ...
    def fragments_lookup(
        self,
        device: int,
        stream: int,
        packed: int,
        packed_bytes: int,
        rows: int,
        cols: int,
        packing: int,
        indices: int,
        count: int,
        out: int,
        /,
    ) -> None: ...
    def bitmap8_index(
        self, device: int, stream: int, rows: int, cols: int, bits: int, index: int, counts: int, /
    ) -> None: ...
    def bitmap8_pack(
        self,
        device: int,
        stream: int,
        dense: int,
        rows: int,
        cols: int,
        packing: int,
        packed: int,
        packed_bytes: int,
        /,
    ) -> None: ...
    def bitmap8_unpack(
        self,
        device: int,
        stream: int,
        packed: int,
        packed_bytes: int,
        rows: int,
        cols: int,
        packing: int,
        dense: int,
        bits: int,
        /,
    ) -> None: ...
    def plan(
        self, device: int, packing: int, rows: int, cols: int, batch: int, /
    ) -> tuple[int, int, int]: ...
    def configs(self, packing: int, /) -> list[str]: ...
    def linear(
        self,
        device: int,
        stream: int,
        packed: int,
        packed_bytes: int,
        rows: int,
        cols: int,
        packing: int,
        x: int,
        batch: int,
        stride: int,
        bias: int,
        out: int,
        config: int,
        splits: int,
        workspace: int,
        workspace_bytes: int,
        /,
    ) -> None: ...
