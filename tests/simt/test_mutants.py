"""Broken kernels (tests/simt/mutants.py): each is shown by a fault or a wrong result, and the unbroken ones by nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers import processes, simt

SCRIPT = Path(__file__).with_name("mutants.py")
_spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
assert _spec is not None and _spec.loader is not None
mutants = importlib.util.module_from_spec(_spec)
sys.modules["mutants"] = mutants  # dataclasses look their module up
_spec.loader.exec_module(mutants)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict]:
    """Of all mutants that were selected: compiled beside each other, run one after the other."""
    items = (item for item in request.session.items if item.path == request.path)
    names = [item.callspec.params["mutant"].name for item in items if hasattr(item, "callspec")]
    pattern = "|".join(f"^{re.escape(name)}$" for name in names)
    simt.build("_simt")
    done = processes.run([sys.executable, SCRIPT, pattern], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-8000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["name"]: result for result in results}


def ids(chosen: Iterable) -> list[str]:
    return [it.name.replace(" ", "_") for it in chosen]


@pytest.mark.parametrize("mutant", mutants.CONTROLS, ids=ids(mutants.CONTROLS))
def test_unbroken_kernels_pass_every_case(mutant, outcomes):
    assert (outcomes[mutant.name]["kind"], outcomes[mutant.name]["message"]) == ("passed", "")


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=ids(mutants.MUTANTS))
def test_a_broken_kernel_is_shown(mutant, outcomes):
    outcome = outcomes[mutant.name]
    assert mutant.is_as_expected(outcome["kind"], outcome["message"]), f"says: {mutant.says}; got {outcome}"


def test_each_mutant_is_one_of_a_kind():
    names = [mutant.name for mutant in (*mutants.CONTROLS, *mutants.MUTANTS)]
    assert len(set(names)) == len(names)
    controlled = {mutant.cases for mutant in mutants.CONTROLS}
    assert {mutant.cases for mutant in mutants.MUTANTS} == controlled


def test_only_a_fault_or_a_wrong_result_shows_a_mutant():
    mutant = mutants.Mutant("m", "linear/splits.cu", "old", "new", "n8", "out of bounds")
    assert mutant.is_as_expected("fault", "read: out of bounds, at x")
    assert not mutant.is_as_expected("error", "out of bounds")
    assert not mutant.is_as_expected("fault", "misaligned")
    assert not mutant.is_as_expected("passed", "")
    control = mutants.Mutant("c", "linear/splits.cu", "", "", "n8", "")
    assert control.is_as_expected("passed", "") and not control.is_as_expected("fault", "")


def test_a_place_that_is_gone_is_an_error():
    gone = mutants.Mutant("gone", "linear/splits.cu", "no such text", "", "n8", "")
    with pytest.raises(ValueError, match=r"gone: linear/splits.cu must hold 'no such text' once, got 0"):
        mutants.mutated(gone)
    twice = mutants.Mutant("twice", "linear/splits.cu", "#include", "", "n8", "")
    with pytest.raises(ValueError, match="once, got [2-9]"):
        mutants.mutated(twice)
