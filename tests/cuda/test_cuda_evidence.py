"""scripts/: what is read from machine code and computed from it, on samples whose answers are known."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import chips
import cubins
import cuda_build
import cuda_evidence
import cuda_page
import fatbin
from cubins import Kernel

RESOURCES = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]
host = linux
compile_size = 64bit
compressed

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5otherPf:
  REG:8 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4mainPf:
  REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4mainPf:
  REG:96 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ASSEMBLY = """
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : _Z4mainPf
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                                /* 0x00000a0000017a02 */
                                                                                         /* 0x000fc40000000f00 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R9], [R4.64], P1 ;  /* 0x0000000004097fae */
        /*0020*/                   LDGSTS.E.64 [R9], [R4.64] ;                           /* 0x0000000004097fae */
        /*0030*/                   LDSM.16.M88.4 R8, [R8] ;                              /* 0x000000000808783b */
        /*0040*/                   HMMA.SP.16832.F32.BF16 R4, R8, R12, R4, R0, 0x0 ;     /* 0x000000040804723c */
        /*0050*/               @P2 HMMA.16816.F32 R4, R8, R12, R4 ;                      /* 0x000000040804723c */
        /*0060*/                   STL [R1], R4 ;                                        /* 0x0000000401007387 */
        /*0070*/              @UP0 LDG.E.128.CONSTANT R4, [R2.64] ;                      /* 0x0000000402047981 */
\t\t..........
\t\tFunction : _Z5otherPf
        /*0000*/                   EXIT ;                                                /* 0x000000000000794d */
"""


def test_resources_of_every_kernel_and_architecture():
    found = cubins.parse_resources(RESOURCES)
    assert found == {
        ("80", "_Z5otherPf"): Kernel(8, 16, 0, 0),
        ("80", "_Z4mainPf"): Kernel(128, 0, 1024, 0),
        ("90a", "_Z4mainPf"): Kernel(96, 0, 0, 0),
    }


def test_instructions_are_counted_with_their_suffixes():
    found = cubins.parse_instructions(ASSEMBLY)
    assert found["80", "_Z4mainPf"] == {
        "all": 8,
        "LDGSTS.128": 1,
        "LDSM": 1,
        "HMMA.SP": 1,
        "HMMA": 1,
        "local": 1,
        "LDG.128": 1,
    }
    assert found["80", "_Z5otherPf"] == {"all": 1}


@pytest.mark.parametrize(
    ("function", "short"),
    [
        ("void sparseprune::cuda::(anonymous namespace)::copy<float>(float const*, long)", "copy<float>"),
        (
            "void sparseprune::cuda::_GLOBAL__N__1f2e_9_masks_cu_5d1c::copy<sparseprune::bf16, (int)4>(int)",
            "copy<bf16, 4>",
        ),
        ("plain(int)", "plain"),
        ("void f<Config<(int)1, (bool)1>, void (*)(int)>(int)", "f<Config<1, 1>, void (*)(int)>"),
    ],
)
def test_names_are_shortened(function, short):
    assert cubins.shorten(function) == short


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        ("80", 256, 32, 0, 8, 1.0, "warps"),
        ("80", 256, 128, 0, 2, 0.25, "registers"),  # 8 warps of 4096 registers: 2 x 8 of 16
        ("80", 256, 129, 0, 1, 0.125, "registers"),  # 136 a thread: 15 warps, 12 by fours
        ("80", 32, 16, 0, 32, 0.5, "blocks"),
        ("86", 128, 40, 48 * 1024, 2, 8 / 48, "shared memory"),  # 49 KB with the system's, of 100
        ("90a", 128, 40, 48 * 1024, 4, 16 / 64, "shared memory"),
        ("86", 128, 40, 99 * 1024, 1, 4 / 48, "shared memory"),
        ("86", 128, 40, 99 * 1024 + 1, 0, 0.0, "shared memory"),  # more than a block may ask for
        ("120", 1024, 64, 0, 1, 32 / 48, "warps"),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, share, limit):
    found = chips.occupancy(arch, threads, registers, shared)
    assert found == chips.Occupancy(blocks, pytest.approx(share), limit)


def test_rooflines_of_codes():
    n = 4096 * 4096
    assert chips.codes_linear(4096, 4096, 1, 4).bytes == n // 2 + n // 32 + 2 * 8192
    assert chips.codes_linear(4096, 4096, 1, 8, True).bytes == n // 2 + n // 8 + n // 32 + 2 * 8192
    assert chips.codes_linear(4096, 4096, 1, 8, True).unit == "sparse"


def test_rooflines():
    a100 = chips.CARDS[0]
    dense, sparse = chips.dense_linear(4096, 4096, 1), chips.sparse24_linear(4096, 4096, 1)
    assert dense.bytes == 2 * 4096 * 4096 + 2 * 8192 and dense.operations == 2 * 4096 * 4096
    assert (
        sparse.bytes - 2 * 8192 == dense.bytes * 9 // 16 - 2 * 8192 * 9 // 16
    )  # half of the values, 2 bits for each
    assert chips.bound(a100, sparse) == "memory"
    assert chips.floor_seconds(a100, sparse) == pytest.approx(sparse.bytes / 2.039e12)
    large = chips.sparse24_linear(4096, 4096, 4096)
    assert chips.bound(a100, large) == "arithmetic"
    assert chips.floor_seconds(a100, large) == pytest.approx(2 * 4096**3 / 624e12)
    half = chips.bitmap8_linear(4096, 4096, 1, 0.5)
    assert half.bytes == 4096 * 4096 // 8 + 4096 * 4096 + 4096 * 4096 // 128 + 2 * 8192


def elf(section: bytes) -> bytes:
    """A library of two sections: their names, and `.nv_fatbin`."""
    names = b"\0.shstrtab\0.nv_fatbin\0"
    head = b"\x7fELF\x02\x01" + bytes(58)
    headers = b"".join(
        struct.pack("<IIQQQQ", name, 1, 0, 0, offset, size).ljust(64, b"\0")
        for name, offset, size in ((1, 64, len(names)), (11, 64 + len(names), len(section)))
    )
    out = bytearray(head + names + section + headers)
    struct.pack_into("<Q", out, 0x28, 64 + len(names) + len(section))
    struct.pack_into("<HHH", out, 0x3A, 64, 2, 0)
    return bytes(out)


def container(*codes: tuple[int, int, int]) -> bytes:
    body = b""
    for kind, number, flags in codes:
        entry = bytearray(64)
        struct.pack_into("<HHIQ", entry, 0, kind, 0x101, 64, 24)
        struct.pack_into("<I8xQ", entry, 28, number, flags)
        body += entry + b"\xaa" * 24
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body


def test_architectures_of_a_library(tmp_path):
    file = tmp_path / "library.so"
    first = container((2, 120, 0x1000011), (2, 80, 0x11), (1, 100, 0x8011))
    file.write_bytes(elf(first + bytes(8) + container((2, 80, 0x11), (2, 90, 0x100011))))
    assert fatbin.architectures(file) == ["sm_80", "sm_90a", "sm_120", "compute_100"]
    file.write_bytes(elf(b""))
    assert fatbin.architectures(file) == []
    file.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(ValueError, match="64-bit little-endian ELF"):
        fatbin.architectures(file)


def launch(kernel: str, threads: int, shared: int, op: str = "op", config: str = "") -> cuda_build.Launch:
    return cuda_build.Launch(op, "bfloat16", kernel, (1, 1, 1), threads, shared, 1, 1, 0, config)


def test_linears_are_called_by_their_configuration():
    launches = [launch("k", 1, 0, "linear_bitmap8", "n8"), launch("s", 1, 0, "linear_bitmap8", "n8")]
    names = {"k": "linear_bitmap8_kernel<Tile<bf16, 4> >", "s": "sum_splits_kernel<bf16>"}
    assert cuda_build.labels(launches, names) == {
        "k": "linear_bitmap8 n8 bfloat16",
        "s": "sum_splits_kernel<bf16>",
    }


def test_faults_are_named():
    sound = {(arch, "linear"): Kernel(64, 0, 0, 0) for arch in chips.ARCHITECTURES}
    for kernel in sound.values():
        kernel.instructions.update({"HMMA.SP": 1, "LDGSTS.128": 1, "LDSM": 1})
    names = {"linear": "linear_sparse24 n8 bfloat16", "spills": "spills"}
    launches = [launch("linear", 256, 64 * 1024)]
    assert cuda_evidence.faults(sound, launches, names) == []

    assert cuda_evidence.faults(sound, [launch("linear", 256, 120 * 1024)], names) == [
        "linear_sparse24 n8 bfloat16: cannot be launched with 256 threads and 122880 B shared: sm_86, sm_89, sm_120"
    ]
    spilled = sound | {("80", "spills"): Kernel(255, 8, 0, 0)}
    assert cuda_evidence.faults(spilled, launches, names) == [
        "spills: launched by no call of scripts/launches.cpp: sm_80",
        "spills: local memory: sm_80 (8 B, 0 instructions)",
    ]
    del sound["90a", "linear"]
    sound["80", "linear"].instructions["HMMA.SP"] = 0
    assert cuda_evidence.faults(sound, launches, names) == [
        "linear_sparse24 n8 bfloat16: no HMMA.SP: sm_80",
        "linear_sparse24 n8 bfloat16: no machine code: sm_90a",
    ]


@pytest.mark.parametrize(("form", "instruction"), [("int4", "HMMA"), ("2:4 int4", "HMMA.SP")])
def test_codes_go_through_the_tensor_cores(form, instruction):
    found = {(arch, "codes"): Kernel(64, 0, 0, 0) for arch in chips.ARCHITECTURES}
    for kernel in found.values():
        kernel.instructions.update({"HMMA": 1, "HMMA.SP": 1, "LDGSTS.128": 1, "LDSM": 1})
    names = {"codes": f"linear_fragments {form} n8_m32_k8 bfloat16"}
    assert cuda_evidence.faults(found, [launch("codes", 256, 64 * 1024)], names) == []
    found["120", "codes"].instructions[instruction] = 0
    assert cuda_evidence.faults(found, [launch("codes", 256, 64 * 1024)], names) == [
        f"linear_fragments {form} n8_m32_k8 bfloat16: no {instruction}: sm_120"
    ]


def test_equal_kernels_of_several_dtypes_stand_in_one_line():
    kernels = {(arch, name): Kernel(64, 0, 0, 0) for arch in chips.ARCHITECTURES for name in "abc"}
    names = {"a": "linear n8 bfloat16", "b": "linear n8 float16", "c": "copy<unsigned int>"}
    lines = cuda_page.kernel_table(kernels, [launch(name, 256, 1536) for name in "abc"], names).splitlines()
    held = "64, 50% | 64, 67% | 64, 67% | 64, 50% | 64, 50% | 64, 67%"
    assert lines[2:] == [
        f"| `copy<unsigned int>` | 256 | 1.5 | {held} | 0 | 0 | 0 | 0 | 0 | 0 |",
        f"| `linear n8` bfloat16, float16 | 256 | 1.5 | {held} | 0 | 0 | 0 | 0 | 0 | 0 |",
    ]


def test_time_of_each_object_is_that_of_its_last_compilation():
    log = "# ninja log v6\n0\t1500\t1\ta.cu.o\tf\n10\t20\t1\t_core.so\tf\n100\t2100\t1\ta.cu.o\tf\n"
    assert cuda_build.compile_seconds(log) == {"a.cu.o": 2.0}
