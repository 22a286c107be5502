"""Which GPU code a shared library holds, read from its fat binaries: no CUDA tool is needed for that."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2
SUFFIXES = {
    0x100000: "a",
    0x200000: "f",
}  # flags of code for one chip, for one family; as nvcc 13.0 sets them


def section(elf: bytes, name: str) -> bytes:
    """The bytes of a section of a 64-bit little-endian ELF file; empty where it has none of this name.

    Raises:
        ValueError: for any other file.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("file: must be a 64-bit little-endian ELF library")
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        begin = strings + header[0]
        if elf[begin : elf.index(b"\0", begin)].decode() == name:
            return elf[header[4] : header[4] + header[5]]
    return b""


def entries(fatbins: bytes) -> list[tuple[int, int, str]]:
    """(kind, number of the architecture, its suffix) of each piece of code, in order."""
    found = []
    at = 0
    while (at := fatbins.find(struct.pack("<I", MAGIC), at)) >= 0:
        header, size = struct.unpack_from("<HQ", fatbins, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, entry_header, length = struct.unpack_from("<HxxIQ", fatbins, entry)
            number, flags = struct.unpack_from("<I8xQ", fatbins, entry + 28)
            suffix = "".join(letter for flag, letter in SUFFIXES.items() if flags & flag)
            found.append((kind, number, suffix))
            entry += entry_header + length
        at = end
    return found


def architectures(library: Path) -> list[str]:
    """`sm_80`, ... for machine code, `compute_100` for PTX, ascending; empty for a library without GPU code."""
    names = {PTX: "compute", CUBIN: "sm"}
    codes = [code for code in entries(section(library.read_bytes(), ".nv_fatbin")) if code[0] in names]
    ordered = sorted(set(codes), key=lambda code: (code[0] == PTX, code[1]))
    return [f"{names[kind]}_{number}{suffix}" for kind, number, suffix in ordered]
