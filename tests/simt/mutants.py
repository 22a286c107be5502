"""Kernels broken on purpose: the emulator, or the results, must show each of them.

A mutant is one place of the real source, changed. It is compiled alone and linked with the objects of the emulator's build;
then the cases that meet the changed lines run in a process of their own, which may hang or crash. `control` changes
nothing and must pass them all: else a mutant would be caught by what is wrong anyway.

python tests/simt/mutants.py [PATTERN]   # a line of JSON for each, as it is known
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import processes, simt

CUDA = simt.ROOT / "csrc" / "cuda"
LIMIT_SECONDS = 120  # of the cases: a mutant may wait for ever


@dataclass(frozen=True)
class Mutant:
    """`old`, which the file holds once (but for its white space), becomes `new`. `says`: what the fault, or the comparison of
    results, must say.

    `unit`: what is compiled in the place of the whole file where that is a header: `{file}` stands for it.
    """

    name: str
    file: str
    old: str
    new: str
    cases: str
    says: str
    unit: str = ""

    def is_as_expected(self, kind: str, message: str) -> bool:
        """Whether that is how this mutant is to be shown; an error of the harness shows nothing."""
        if not self.old:
            return kind == "passed"
        return kind in ("fault", "wrong", "crash", "hang") and re.search(self.says, message) is not None


WRONG = "differ, first at|outside the bound"  # helpers/compare.py
WAITING = "no wait for its group yet"
UNWRITTEN = "nobody has written it"
UNORDERED = f"with no barrier since|{UNWRITTEN}|{WAITING}"  # which of them depends on who runs first
OUTSIDE = "out of bounds"
MISALIGNED = "misaligned"
DEADLOCK = "deadlock"
SHOWN = f"{WRONG}|{UNORDERED}|{OUTSIDE}"  # whichever comes first
PRODUCT, DRAIN = "linear/product.cuh", "linear/product_drain.cuh"
FRAGMENTS, PACK_CODES = "linear/fragments.cuh", "pack/fragments.cu"


def sparse24(config: int) -> str:
    """One instance of the kernel, so that a mutant is compiled in seconds."""
    return (
        '#include "cuda/linear/sparse24.cuh"\n'
        f"template int sparseprune::cuda::launch_sparse24<sparseprune::bf16, {config}>"
        "(const sparseprune::cuda::LinearCall&, const sparseprune::Geometry&);\n"
    )


def _linear(
    name: str, old: str, new: str, cases: str, says: str, config: int = 0, file: str = "linear/sparse24.cuh"
) -> Mutant:
    unit = '#include "cuda/linear/bitmap8.cu"\n' if "bitmap8" in file else sparse24(config)
    return Mutant(name, file, old, new, cases, says, unit)


def _codes(
    name: str, old: str, new: str, cases: str, says: str, weight: str = "4, false, false", config: int = 0
) -> Mutant:
    """weight: bits, whether 2:4, whether with minimums."""
    unit = (
        '#include "cuda/linear/fragments.cuh"\n'
        "template int sparseprune::cuda::launch_fragments<sparseprune::bf16, sparseprune::cuda::FragmentsWeight"
        f"<{weight}>, {config}>(const sparseprune::cuda::LinearCall&, const sparseprune::Geometry&);\n"
    )
    return Mutant(name, FRAGMENTS, old, new, cases, says, unit)


MUTANTS: tuple[Mutant, ...] = (
    _linear("sparse24: no wait for the copies", "simt::cp_async_wait<C::kStages - 2>();", "", "n8", WAITING),
    _linear("sparse24: waits for a stage too few", "cp_async_wait<C::kStages - 2>", "cp_async_wait<C::kStages - 1>", "n8",
            WAITING),
    _linear("sparse24: no commit", "simt::cp_async_commit(); sparse24_advance<C>(next), write_at = product_after<C>(write_at); block +=",
            "sparse24_advance<C>(next), write_at = product_after<C>(write_at); block +=", "n8", SHOWN),
    _linear("sparse24: no barrier of the warp", "simt::sync_warp();", "", "n8", UNORDERED, file=PRODUCT),
    _linear("sparse24: no barrier of the block", "else { simt::sync_block(); }", "", "n64", UNORDERED, 3, PRODUCT),
    _linear("sparse24: the sums overwrite the last stage",
            "simt::sync_block();  // the last stage, or the pass before, is read", "", "n64", UNORDERED, 3, file=DRAIN),
    _linear("sparse24: sums read before they are there", "simt::sync_block();  // all sums of the pass are there", "",
            "n8", UNORDERED, file=DRAIN),
    _linear("sparse24: metadata of the next lane", "C::kMetadataBytes + lane * 8;", "C::kMetadataBytes + (lane + 1) % 32 * 8;",
            "n8", WRONG),
    _linear("sparse24: metadata of the other step", "f.e[0][u] = words.x, f.e[1][u] = words.y;",
            "f.e[0][u] = words.y, f.e[1][u] = words.x;", "n8", WRONG),
    _linear("sparse24: the wrong selector", "mma_sp_m16n8k32<T, 1>", "mma_sp_m16n8k32<T, 0>", "n8", WRONG),
    _linear("sparse24: reads past the rows",
            "p.units = static_cast<int>(a.strips - p.strip < C::kBlockUnits ? a.strips - p.strip : C::kBlockUnits);",
            "p.units = C::kBlockUnits;", "n64", OUTSIDE, 3, file=PRODUCT),
    _linear("sparse24: writes past the rows", "if (n >= p.x_rows || row >= a.rows) continue;", "if (n >= p.x_rows) continue;",
            "n64", SHOWN, 3, file=DRAIN),
    _linear("sparse24: writes past the batch", "if (n >= p.x_rows || row >= a.rows) continue;", "if (row >= a.rows) continue;",
            "n8", OUTSIDE, file=DRAIN),
    _linear("sparse24: copies past the columns", "more && columns > 0 &&", "more &&", "n8", OUTSIDE, file=PRODUCT),
    _linear("sparse24: reads past the columns", "n < p.x_rows && col + e < a.cols ?", "n < p.x_rows ?", "n8", SHOWN, file=PRODUCT),
    _linear("sparse24: copies past the batch", "columns > 0 && p.thread / 8 + rows < p.copied_rows;", "columns > 0;", "n8",
            OUTSIDE, file=PRODUCT),
    _linear("sparse24: what is not there is no zero", "simt::cp_async16(stage + product_x_copy_byte<C>(p, rows),",
            "if (there) simt::cp_async16(stage + product_x_copy_byte<C>(p, rows),", "n8", UNWRITTEN, file=PRODUCT),
    _linear("sparse24: vectors at any address", "a.x_vectors = aligned(call.x) &&", "a.x_vectors =", "n8", MISALIGNED, file=PRODUCT),
    _linear("sparse24: splits overlap", "(a.blocks * (split + 1) / splits);", "(a.blocks * (split + 1) / splits + 1);", "n8",
            SHOWN, file=PRODUCT),
    Mutant("splits: the first is left out", "linear/splits.cu", "for (int s = 0; s < splits; ++s)", "for (int s = 1; s < splits; ++s)",
           "n8", WRONG),
    Mutant("splits: four outputs at any address", "linear/splits.cu", "rows % 4 == 0 && aligned(partial)", "aligned(partial)", "n8", MISALIGNED),
    _linear("bitmap8: no wait for the copies", "    simt::cp_async_wait<Tile::kStages - 2>();\n", "", "bitmap8", WAITING,
            file="linear/bitmap8.cuh"),
    _linear("bitmap8: no barrier before the sums", "  simt::sync_block();  // the ring becomes room for the sums\n", "",
            "bitmap8", UNORDERED, file="linear/bitmap8.cuh"),
    _linear("bitmap8: no zeros behind the values", "simt::store(at(put_slot_ + 16 * chunks), simt::u32x4{0, 0, 0, 0});", ";",
            "bitmap8", UNWRITTEN, file="linear/bitmap8.cuh"),
    _linear("bitmap8: writes past the rows", "    if (row >= args.rows) continue;\n", "", "bitmap8", SHOWN,
            file="linear/bitmap8.cuh"),
    _linear("bitmap8: places one pair on", "step.place = before + (counts >> me.shift & me.mask);",
            "step.place = before + (counts >> 2 & 0x07070707u);", "bitmap8", WRONG, file="bitmap8.cuh"),
    _codes("codes: no wait for the copies", "simt::cp_async_wait<C::kStages - 2>();", "", "int4", WAITING),
    _codes("codes: waits for a stage too few", "cp_async_wait<C::kStages - 2>", "cp_async_wait<C::kStages - 1>", "int4", WAITING),
    _codes("codes: no commit", "simt::cp_async_commit();", "", "int4", SHOWN),
    _codes("codes: no barrier of the warp", "product_sync<C>();", "", "int4", UNORDERED),
    _codes("codes: no barrier of the block", "product_sync<C>();", "", "int4 n64", UNORDERED, config=2),
    _codes("codes: fills the stage that is read", "fragments_fetch<W, C>(a, p, next, stages + write_at); write_at = product_after<C>(write_at); if (block",
           "fragments_fetch<W, C>(a, p, next, stages + read_at); write_at = product_after<C>(write_at); if (block", "int4", SHOWN),
    _codes("codes: copies past the unit", "if (part + i * C::kRound < a.unit_bytes)", "", "int4", SHOWN),
    _codes("codes: reads past the strips", "unit = own < p.units ? own : p.units - 1;", "unit = own;", "int4 n64", OUTSIDE, config=2),
    _codes("codes: another row's scale", "static_cast<int>(simt::lane()) / 4 * 8);", "static_cast<int>(simt::lane()) % 8 * 8);", "int4", WRONG),
    _codes("codes: one scale for both groups", "args.two_sets ? slab + s : 0;", "0;", "int4", WRONG),
    _codes("codes: the first group's scale for the second", "if (slab == 0 || args.two_sets)", "if (slab == 0)", "int4", WRONG),
    _codes("codes: scales of the other type", "s[i] = is_f16 ?", "s[i] = !is_f16 ?", "int4", WRONG),
    _codes("codes: registers in the other order", "w[0] >> 4 * r, 0x000f000fu", "w[0] >> 4 * (3 - r), 0x000f000fu", "int4", WRONG),
    _codes("codes: 8 more", "constexpr std::uint32_t kMinus = 0x80008000u;", "constexpr std::uint32_t kMinus = 0;", "int4", WRONG),
    _codes("codes: the same columns of x", "(p.b_byte ^ half * 64)", "p.b_byte", "int4", WRONG),
    _codes("codes: bytes of the wrong half", "0x7632u", "0x7610u", "int8", WRONG, "8, false, false"),
    _codes("codes: the next byte", "static_cast<unsigned>(e % 4)", "static_cast<unsigned>((e + 1) % 4)", "int8", WRONG, "8, false, false"),
    _codes("codes: minimums without 8 scales", "f.minimums[i] += 8 * f.scales[s][i];", ";", "minimum", WRONG, "4, false, true"),
    _codes("codes: the sum of another batch row", "* part.x[i];", "* part.x[0];", "minimum", WRONG, "4, false, true"),
    _codes("codes: scales for minimums", "set + fragments::kSetBytes,", "set,", "minimum", WRONG, "4, false, true"),
    _codes("codes 2:4: places of the other step", "f.places[0] = words.x, f.places[1] = words.y;",
           "f.places[0] = words.y, f.places[1] = words.x;", "int4 2:4", WRONG, "4, true, false"),
    _codes("codes 2:4: the wrong selector", "mma_sp_m16n8k32<T, 1>", "mma_sp_m16n8k32<T, 0>", "int4 2:4", WRONG, "4, true, false"),
    _codes("codes 2:4: two groups, one scale", "if (step == 0 && args.two_sets)", "if (step > 0 && args.two_sets)", "int4 2:4", WRONG,
           "4, true, false"),
    _codes("codes 2:4: the first group twice", "part = {};", "", "int4 2:4", WRONG, "4, true, false"),
    Mutant("pack codes: a unit too many", PACK_CODES, "u < c.all;", "u <= c.all;", "codes", OUTSIDE),
    Mutant("pack codes: reads past the columns", PACK_CODES, "row < c.rows && col < c.stored;", "row < c.rows;", "codes", SHOWN),
    Mutant("pack codes: reads past the groups", PACK_CODES, "row < c.rows && group < c.groups;", "row < c.rows;", "codes", OUTSIDE),
    Mutant("pack codes: places of the next row", PACK_CODES, "(row0 + row) * c.stride", "(row0 + (row ^ 1)) * c.stride", "codes", SHOWN),
    Mutant("unpack codes: a nibble too many", PACK_CODES, "if (at < count) byte |=", "byte |=", "codes", SHOWN),
    Mutant("unpack codes: one set of scales", PACK_CODES, "c.unit.sets == 2 ? static_cast<int>(col % kCols) / (kCols / 2) : 0;", "0;", "codes",
           WRONG),
    Mutant("lookup: reads past the rows", PACK_CODES, "row >= 0 && row < c.rows;", "row >= 0;", "codes", OUTSIDE),
    Mutant("lookup: the first group's scale", PACK_CODES, "c.unit.sets == 2 ? lane_id() / 16 : 0;", "0;", "codes", WRONG),
    Mutant("words: a stage read before it is written", "words.cuh", "  sync_warp();\n  const V v = load<V>", "  const V v = load<V>",
           "masks", UNORDERED, '#include "cuda/masks/masks.cu"\n'),
    Mutant("words: reads past the row's end", "words.cuh", "if (i < left) word = load<T>(p + i);", "word = load<T>(p + i);",
           "masks", OUTSIDE, '#include "cuda/masks/masks.cu"\n'),
    Mutant("words: writes past the row's end", "words.cuh", "if (i < left) store(p + i, load<T>(stage + i));",
           "store(p + i, load<T>(stage + i));", "masks", SHOWN, '#include "cuda/masks/masks.cu"\n'),
    Mutant("masks: vectors at any address", "words.cuh", "return ((shift + index) & (each - 1)) == 0;", "return each > 0;",
           "masks", MISALIGNED, '#include "cuda/masks/masks.cu"\n'),
    Mutant("masks: bits past the row's end", "words.cuh", "if (first % 8 == 0 && first < left) store(bits",
           "if (first % 8 == 0) store(bits", "masks", SHOWN, '#include "cuda/masks/masks.cu"\n'),
    Mutant("csr: one set of sums for two turns", "convert/convert.cu", "  turn ^= 1;\n", "", "conversions", UNORDERED),
    Mutant("csr: sums read before they are there", "convert/convert.cu", "  sync_block();\n  Sums s{0, 0};", "  Sums s{0, 0};",
           "conversions", UNORDERED),
    Mutant("csr: ranks count their own lane", "convert/convert.cu", "before = upto - own;", "before = upto;", "conversions", SHOWN),
    Mutant("bitmap8 f32: half of each sum", "linear/bitmap8_f32.cu", "sum += simt::shuffle_xor(sum, 2);", "", "f32", WRONG),
    Mutant("csr: warps without values pass a barrier by", "convert/convert.cu", "sync_block(); Sums s{0, 0};",
           "if (own != 0) sync_block(); Sums s{0, 0};", "conversions", f"{DEADLOCK}|{SHOWN}"),
    Mutant("pack bitmap8: lanes leave ahead of a shuffle", "pack/bitmap8.cu", "int count = popc(bitmap);",
           "if (unit >= units.all) continue; int count = popc(bitmap);", "bitmap8", DEADLOCK),
    Mutant("pack bitmap8: a unit too many", "pack/bitmap8.cu", "if (unit >= units.all) continue;", "", "bitmap8", OUTSIDE),
    Mutant("pack bitmap8: no zeros behind the values", "pack/bitmap8.cu",
           "if (lane_id() < stored - items.all) store(stage + (items.all + lane_id()), W{0});", "", "bitmap8", UNWRITTEN),
    Mutant("pack: the nibble of the next chunk", "pack/sparse24.cu", "|= nibble << word_shift(8 * i, t);",
           "|= nibble << word_shift(8 * i, (t + 1) % 4);", "n8", SHOWN),
    Mutant("pack: reads past the columns", "pack/sparse24.cu",
           "const bool inside = row < units.rows && chunk < units.groups;", "const bool inside = row < units.rows;", "n8", SHOWN),
)  # fmt: skip

CONTROLS = (
    _linear("control: sparse24, few batch rows", "", "", "n8", ""),
    _linear("control: sparse24, many batch rows", "", "", "n64", "", 3),
    _linear("control: bitmap8", "", "", "bitmap8", "", file="linear/bitmap8.cuh"),
    _codes("control: codes int4", "", "", "int4", ""),
    _codes("control: codes int4, many batch rows", "", "", "int4 n64", "", config=2),
    _codes("control: codes int8", "", "", "int8", "", "8, false, false"),
    _codes("control: codes with minimums", "", "", "minimum", "", "4, false, true"),
    _codes("control: codes 2:4", "", "", "int4 2:4", "", "4, true, false"),
    Mutant("control: pack codes", PACK_CODES, "", "", "codes", ""),
    Mutant("control: bitmap8 f32", "linear/bitmap8_f32.cu", "", "", "f32", ""),
    Mutant("control: masks", "masks/masks.cu", "", "", "masks", ""),
    Mutant("control: conversions", "convert/convert.cu", "", "", "conversions", ""),
)


# --- building ---------------------------------------------------------------------------------------------------------


def mutated(mutant: Mutant) -> str:
    """The file's text, changed. ValueError where the place is not there, or there twice."""
    text = (CUDA / mutant.file).read_text()
    if not mutant.old:
        return text
    found = list(re.finditer(r"\s+".join(map(re.escape, mutant.old.split())), text))
    if len(found) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} must hold {mutant.old!r} once, got {len(found)}")
    return text[: found[0].start()] + mutant.new + text[found[0].end() :]


@dataclass(frozen=True)
class Build:
    """The emulator's build: how each file is compiled, and what is linked."""

    folder: Path
    commands: dict[str, list[str]] = field(default_factory=dict)  # by source

    @classmethod
    def of(cls, folder: Path) -> Build:
        entries = json.loads((folder / "compile_commands.json").read_text())
        module = [it for it in entries if "/_simt.dir/" in it["command"]]  # not every CMake has "output"
        return cls(folder, {str(Path(it["file"]).resolve()): shlex.split(it["command"]) for it in module})

    def variant(self, mutant: Mutant, folder: Path) -> Path:
        """Compiles the changed file and links it with the objects of all others."""
        overlay = folder / "csrc"
        shutil.copytree(CUDA, overlay / "cuda")
        (overlay / "cuda" / mutant.file).write_text(mutated(mutant))
        source = overlay / "cuda" / mutant.file
        replaced = str(CUDA / mutant.file)
        if mutant.unit:
            source = folder / "unit.cu"
            source.write_text(mutant.unit)
            included = re.fullmatch(r'#include "cuda/([\w/]+\.cu)"\n', mutant.unit)
            replaced = str(CUDA / included[1]) if included else ""
        fresh = folder / "mutant.o"
        _call(
            [*self._flags(overlay), "-MMD", "-MF", str(folder / "used"), "-c", str(source), "-o", str(fresh)]
        )
        if str(overlay / "cuda" / mutant.file) not in (folder / "used").read_text().split():
            raise ValueError(
                f"{mutant.name}: {source.name} must include {mutant.file}, or the mutant changes nothing"
            )
        # The changed object comes first: of an instance that an object beside it has too, the linker takes the first.
        objects = [self._object(it) for it in self.commands if it != replaced]
        library = folder / f"_simt{sysconfig_suffix()}"
        _call(
            [
                self._compiler(),
                "-shared",
                "-o",
                str(library),
                str(fresh),
                *objects,
                str(self.folder / "libsimt_emulator.a"),
            ]
        )
        return library

    def _compiler(self) -> str:
        return next(iter(self.commands.values()))[0]

    def _flags(self, overlay: Path) -> list[str]:
        """Those of any kernel, the changed folder ahead of the real one, and less optimised: seconds count."""
        command = self.commands[str(CUDA / "linear/splits.cu")]
        kept = command[1 : command.index("-o")]
        return [command[0], f"-I{overlay}", f"-I{overlay / 'cuda'}", *kept, "-O1", "-w"]

    def _object(self, source: str) -> str:
        command = self.commands[source]
        return str(self.folder / command[command.index("-o") + 1])


def sysconfig_suffix() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def _call(command: Sequence[str]) -> None:
    done = processes.run(command)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.returncode}\n{done.stderr[-4000:]}")


# --- running ----------------------------------------------------------------------------------------------------------


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_simt", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(library: Path, name: str) -> tuple[str, str]:
    """(passed | fault | wrong, message) of the cases, in this process."""
    from helpers import backends
    from simt.mutant_cases import CASES  # imports torch, which a process that compiles must not

    try:
        with backends.emulated(load(library)):
            CASES[name]()
    except backends.Fault as fault:
        return "fault", str(fault)
    except AssertionError as wrong:
        return "wrong", str(wrong)
    except (RuntimeError, ValueError) as error:
        return "error", f"{type(error).__name__}: {error}"
    return "passed", ""


def run_forked(library: Path, name: str) -> tuple[str, str]:
    """The same in a child, which may crash or hang."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # threads of a pool that no kernel of a child uses
        child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(LIMIT_SECONDS)
        outcome = "error", "no verdict"
        try:
            outcome = verdict(library, name)
        except BaseException as error:  # the child must not go on as its parent
            outcome = "error", f"{type(error).__name__}: {error}"
        finally:
            os.write(write, json.dumps([outcome[0], outcome[1][:4000]]).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        kind, message = json.loads(text)
        return kind, message
    number = os.WTERMSIG(status)
    return (
        ("hang", f"no end within {LIMIT_SECONDS} s")
        if number == signal.SIGALRM
        else ("crash", signal.strsignal(number) or "")
    )


def run(mutants: Sequence[Mutant], jobs: int, repeat: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Compiles all, then runs one after the other: a process that forks must have no threads.

    repeat: how often, each time in another order of threads; the result is the one that is least expected.
    """
    build = Build.of(simt.build("_simt"))
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(index: int) -> tuple[Path, float]:
            place = Path(folder) / str(index)
            place.mkdir()
            begin = time.monotonic()
            return build.variant(mutants[index], place), time.monotonic() - begin

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            libraries = list(pool.map(compile_one, range(len(mutants))))
        from simt import mutant_cases  # noqa: F401  once, for all children

        for mutant, (library, compile_seconds) in zip(mutants, libraries, strict=True):
            begin = time.monotonic()
            outcomes = [run_forked(library, mutant.cases) for _ in range(repeat)]
            unexpected = [it for it in outcomes if not mutant.is_as_expected(*it)]
            kind, message = (*unexpected, outcomes[0])[0]
            done({
                "name": mutant.name, "kind": kind, "message": message, "compile_seconds": round(compile_seconds, 1),
                "run_seconds": round(time.monotonic() - begin, 1),
            })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels broken on purpose, and what shows it.")
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression that names must hold")
    parser.add_argument(
        "--jobs", type=int, default=int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", os.cpu_count() or 1))
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs, each in another order of threads")
    arguments = parser.parse_args()
    chosen = [it for it in (*CONTROLS, *MUTANTS) if re.search(arguments.pattern, it.name)]
    run(chosen, arguments.jobs, arguments.repeat, lambda result: print(json.dumps(result), flush=True))


if __name__ == "__main__":
    main()
