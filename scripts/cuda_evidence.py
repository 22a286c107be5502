#!/usr/bin/env python
"""What can be said of the CUDA kernels without a GPU: `python scripts/cuda_evidence.py` writes docs/cuda-static.md.

Of a build (`make test` leaves one) it reads the machine code of every kernel and architecture, and what the launchers ask
for at each shape; from both it computes occupancy and rooflines. Needs NVIDIA's disassembler:
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`. `--check` only fails where a kernel spills, uses local memory,
cannot be launched on an architecture, or lacks the instructions that it is built on.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

import chips
import cubins
from cuda_build import ROOT, Launch, find_build, labels, record_launches, worst
from cuda_page import Kernels, kernel_table, page

PAGE = ROOT / "docs" / "cuda-static.md"


def needs(name: str) -> tuple[str, ...]:
    """The instructions that a kernel is built on."""
    if name.startswith("linear_sparse24 "):
        return ("HMMA.SP", "LDGSTS.128", "LDSM")
    if name.startswith("linear_fragments "):
        return ("HMMA.SP" if "2:4" in name else "HMMA", "LDGSTS.128", "LDSM")
    if name.startswith("linear_bitmap8 "):
        return ("LDGSTS.128",) if name.endswith("float32") else ("HMMA", "LDGSTS.128", "LDSM")
    return ()


def faults(kernels: Kernels, launches: list[Launch], names: dict[str, str]) -> list[str]:
    """What must not be: a line each, with the architectures where it is."""
    found: dict[str, list[str]] = defaultdict(list)
    launched = {launch.kernel for launch in launches}
    for (arch, mangled), kernel in kernels.items():
        name = names[mangled]
        if kernel.stack or kernel.local or kernel.instructions["local"]:
            found[f"{name}: local memory"].append(
                f"sm_{arch} ({kernel.stack} B, {kernel.instructions['local']} instructions)"
            )
        if mangled not in launched:
            found[f"{name}: launched by no call of scripts/launches.cpp"].append(f"sm_{arch}")
        for need in needs(name):
            if not kernel.instructions[need]:
                found[f"{name}: no {need}"].append(f"sm_{arch}")
    for mangled in launched:
        threads, shared = worst(launches, mangled)
        for arch in chips.ARCHITECTURES:
            if (arch, mangled) not in kernels:
                found[f"{names[mangled]}: no machine code"].append(f"sm_{arch}")
            elif not chips.occupancy(arch, threads, kernels[arch, mangled].registers, shared).blocks:
                refused = f"{names[mangled]}: cannot be launched with {threads} threads and {shared} B shared"
                found[refused].append(f"sm_{arch}")
    return [f"{fault}: {', '.join(archs)}" for fault, archs in sorted(found.items())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build", type=Path, help="a build folder; by default the newest with CUDA under build/"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where something must not be"
    )
    args = parser.parse_args()
    build = find_build(args.build)
    folders = [
        Path(path) / "nvidia" for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    ]
    tools = [
        *(bin_ for folder in folders for bin_ in sorted(folder.glob("cu*/bin"))),
        build.nvcc.resolve().parent,
    ]
    disassembler = cubins.tool("nvdisasm", tools)
    kernels = cubins.read_kernels(
        build.library, cubins.tool("cuobjdump", tools), f"{disassembler.parent}:/usr/bin:/bin"
    )
    launches = record_launches(build)
    mangled = sorted({name for _, name in kernels} | {launch.kernel for launch in launches})
    names = labels(launches, cubins.demangle(mangled))
    wrong = faults(kernels, launches, names)
    if not args.check:
        PAGE.write_text(page(build, kernels, launches, names, wrong))
        print(f"written: {PAGE.relative_to(ROOT)}")
    print(
        f"{len(mangled)} kernels, {len(kernels)} with architectures, {len(launches)} launches, {len(wrong)} faults"
    )
    for line in wrong:
        print(line)
    if args.check and kernel_table(kernels, launches, names) not in PAGE.read_text():
        print(f"{PAGE.relative_to(ROOT)} is of other machine code; make cuda-evidence writes it anew")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
