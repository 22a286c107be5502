"""The steps of a run in the order of their value. Each has a share of the seconds that are left; a run that is cut keeps
the steps and cells before the cut.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check import build, checks, environment, report
from gpu_check.process import Finished, stream
from gpu_check.record import Budget, Record

RESERVE_SECONDS = 8.0  # for the last page, and for children that take their time to end
MAX_RESTARTS = 6
BUSY_PERCENT = 5
CLOCKS_EVERY = 8  # cells
DRY_ARCHITECTURE = "80"
LOST_EXIT, AGAIN_EXIT = 3, 4  # as in measure.py, which this process cannot import: it needs the package

Outcome = dict[str, Any]


class Check:
    """One run. `run` starts children and `look` sees the machine; tests put stand-ins in their place."""

    def __init__(
        self,
        folder: Path,
        record: Record,
        budget: Budget,
        dry_run: bool,
        jobs: int | None = None,
        run: Callable[..., Finished] = stream,
        look: Callable[[], dict[str, Any]] = environment.look,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.record, self.budget, self.dry_run, self.jobs = folder, record, budget, dry_run, jobs
        self._run, self._look, self._say = run, look, say

    def all(self) -> bool:
        """Every step, as far as the time goes; whether all that ran ended well."""
        steps: list[tuple[str, Callable[[], Outcome], bool]] = [
            ("environment", self.environment, True),
            ("build", self.build, True),
            ("first call", self.first_call, False),
            ("op tests", self.op_tests, False),
            ("compute-sanitizer", self.sanitizer, False),
            ("benchmarks", self.benchmarks, False),
        ]
        well = True
        for index, (name, step, needed) in enumerate(steps):
            state = self._step(name, step)
            well &= state in ("done", "left out") or (state == "cut" and name != "build")
            if needed and state != "done":
                for later, _, _ in steps[index + 1 :]:
                    self.record.leave_out(later, f"{name}: {state}")
                well = False
                break
        report.write(self.record.data, self.record.path)
        return well

    def interrupted(self) -> None:
        """The page of what there is."""
        for entry in self.record.data["steps"]:
            if entry["state"] == "running":
                entry["state"] = "cut"
        self.record.add("notes", "the run was interrupted")
        report.write(self.record.data, self.record.path)

    def _step(self, name: str, step: Callable[[], Outcome]) -> str:
        entry = self.record.step(name)
        begin = self.budget.spent()
        entry.update(step())
        entry["seconds"] = self.budget.spent() - begin
        self.record.save()
        report.write(self.record.data, self.record.path)
        self._say(f"{name}: {entry['state']}, {entry['seconds']:.1f} s. {entry.get('summary', '')}")
        return entry["state"]

    def environment(self) -> Outcome:
        found = self._look()
        self.record.set("environment", found)
        lacks = environment.missing(found, self.dry_run)
        if lacks:
            return {"state": "failed", "summary": "; ".join(lacks)}
        card = found["cards"][0]["name"] if found["cards"] else "no card"
        if found["cards"] and (busy := environment.busy(found["cards"][0])) > BUSY_PERCENT:
            self.record.add("notes", f"the card was busy before the run began ({busy} %): others work on it")
        return {"state": "done", "summary": f"{card}, nvcc {found['nvcc']}"}

    def build(self) -> Outcome:
        cuda = "ON"
        found = self.record.data["environment"]
        architectures = DRY_ARCHITECTURE if self.dry_run else environment.architectures(found)
        if self.dry_run and found["nvcc"] is None:
            cuda = "OFF"
            self.record.leave_out("compiling the kernels", "no nvcc here; the CPU part alone is built")
        elif self.dry_run:
            self.record.leave_out(
                "code for the card", f"no card to ask; built for sm_{DRY_ARCHITECTURE} instead"
            )
        done = build.build(
            self.folder, architectures, cuda, self.budget.share(0.6, 0.53), self._run, self.jobs
        )
        outcome: Outcome = {"state": done.state, "summary": f"{build.site(self.folder)}"}
        if done.state != "done":
            last = next((it for it in reversed(done.tail.splitlines()) if it.strip()), "no word")
            outcome |= {"summary": f"{last}; more of it is in the record", "output": done.tail}
        return outcome

    def first_call(self) -> Outcome:
        device = "cpu" if self.dry_run else "cuda"
        command = build.child(self.folder, "gpu_check.small_part", device)
        done = self._run(command, self.budget.share(0.3, 0.16), cwd=build.ROOT)
        if self.dry_run:
            self.record.leave_out(
                "the operations on the card", "no card; they ran on the CPU, through the same steps"
            )
        outcome: Outcome = {"state": done.state, "summary": "every operation once, small shapes"}
        if done.state != "done":
            outcome |= {"summary": done.tail[-300:].replace("\n", " / "), "output": done.tail}
        return outcome

    def op_tests(self) -> Outcome:
        seconds = self.budget.share(0.45, 0.3, RESERVE_SECONDS)
        packages = self.record.data["environment"]["packages"]
        for what, remedy in checks.without(packages):
            self.record.leave_out(what, f"a package is missing: {remedy}")
        if self.dry_run:
            done, outcomes = checks.collect(self.folder, packages, seconds, self._run)
            self.record.leave_out("op tests on the card", "no card; tests/ runs them on the emulated one")
            if done.state == "done":
                return {"state": "left out", "summary": f"there are {outcomes.collected} of them"}
            return {"state": "failed", "summary": "pytest cannot collect the tests", "output": done.tail}
        done, outcomes = checks.op_tests(self.folder, packages, seconds, self._run)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.counts.items()))
        outcome: Outcome = {"state": done.state, "summary": counts or "no test ran", **outcomes.to_dict()}
        if done.state == "cut":
            self.record.leave_out("the rest of the op tests", f"no time: {counts} in {done.seconds:.0f} s")
            if outcomes.failures:
                outcome["state"] = "failed"
        if outcome["state"] == "failed":
            outcome["output"] = done.tail
        return outcome

    def sanitizer(self) -> Outcome:
        if self.dry_run:
            self.record.leave_out("compute-sanitizer", "it needs a card")
            return {"state": "left out"}
        if not checks.sanitizer_is_here():
            self.record.leave_out("compute-sanitizer", "not on PATH; it comes with the CUDA toolkit")
            return {"state": "left out"}
        reports: list[dict[str, Any]] = []
        seconds = self.budget.share(0.3, 0.18, RESERVE_SECONDS)
        for index, tool in enumerate(checks.TOOLS):
            share = (seconds - sum(it["seconds"] for it in reports)) / (len(checks.TOOLS) - index)
            reports.append(checks.sanitize(self.folder, tool, max(1.0, share), self._run))
            if reports[-1]["state"] == "cut":
                self.record.leave_out(f"compute-sanitizer {tool}", f"no time: cut after {share:.0f} s")
        states = [it["state"] for it in reports]
        state = "failed" if "failed" in states else "done" if "done" in states else "cut"
        return {
            "state": state,
            "summary": ", ".join(f"{it['tool']} {it['state']}" for it in reports),
            "tools": reports,
        }

    def benchmarks(self) -> Outcome:
        """Cell by cell, in a child; a new one where a child lost the device or has a broken capture behind it."""
        bench = Benchmarks(self.record)
        state, output = "cut", ""
        for _ in range(1 + MAX_RESTARTS):
            left = self.budget.left() - RESERVE_SECONDS
            if left < 5:
                break
            command = build.child(
                self.folder, "gpu_check.measure", "--until", f"{time.time() + left - 4:.1f}", "--first", str(bench.next),
                "--eager", ";".join(sorted(bench.eager)), *(["--dry-run"] if self.dry_run else []),
            )  # fmt: skip
            done = self._run(command, left, bench.line, cwd=build.ROOT)
            state, output = done.state, done.tail
            if done.code == LOST_EXIT:
                self.record.add("notes", f"the device was lost to the process at {bench.cell}")
            elif done.code != AGAIN_EXIT:
                break
        bench.leave_out_the_rest(state)
        summary = f"{bench.measured} of {bench.planned} cells"
        if state == "failed" or bench.errors:
            return {"state": "failed", "summary": f"{summary}; {len(bench.errors)} failed", "errors": bench.errors,
                    "output": output if state == "failed" else ""}  # fmt: skip
        if self.dry_run:
            self.record.leave_out("benchmarks", "no card; the same steps ran on the CPU with small matrices")
            return {"state": "done", "summary": f"{summary}, of a dry run"}
        return {"state": "cut" if bench.measured < bench.planned else "done", "summary": summary}


class Benchmarks:
    """Reads the lines of measure.py into the record as they come."""

    def __init__(self, record: Record, clocks: Callable[[], dict[str, str]] = environment.clocks) -> None:
        self._record, self._clocks = record, clocks
        self.planned = self.measured = self.next = 0
        self.cell = ""
        self.eager: set[str] = set()
        self.errors: list[str] = []
        self._rest: list[str] = []

    def line(self, text: str) -> None:
        if not text.startswith("{"):
            return  # a library's warning
        try:
            message = json.loads(text)
        except json.JSONDecodeError:
            return
        kind = message.pop("kind", None)
        if kind in ("linear", "mask", "conversion", "choice"):
            self.measured += 1
            self._record.add(f"{kind}s", message)
        elif kind == "cells":
            self.planned = message["count"]
        elif kind == "device":
            self._record.data["environment"].update(device=message)
            self._record.save()
        elif kind == "begin":
            self.next, self.cell = message["index"] + 1, message["cell"]
            if message["index"] % CLOCKS_EVERY == 1 and (clocks := self._clocks()):
                self._record.data["environment"].setdefault("clocks", []).append(clocks)
        elif kind == "error":
            self.errors.append(f"{message['cell']}: {message['error']}")
            self._record.add("notes", self.errors[-1])
        elif kind == "eager":
            self.eager |= set(message["names"])
        elif kind == "left out":
            self._rest = message["cells"]

    def leave_out_the_rest(self, state: str) -> None:
        if self._rest:
            self._record.leave_out(f"{len(self._rest)} cells, from {self._rest[0]} on", "no time")
        elif self.next < self.planned:
            self._record.leave_out(
                f"{self.planned - self.next} cells after {self.cell}", f"the benchmarks were {state}"
            )


def clear(folder: Path) -> None:
    """A package laid out by an earlier run may hold files that are gone; what was compiled is kept."""
    shutil.rmtree(build.site(folder), ignore_errors=True)
