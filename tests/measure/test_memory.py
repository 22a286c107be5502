"""Working within a limit on memory: sizes, checks without temporaries, tensors that wait on the disk."""

from pathlib import Path

import pytest
import torch
from helpers import processes

from sparseprune import memory
from sparseprune.memory import all_finite, available_memory, parse_size, peak_memory, resident_memory
from sparseprune.pruning import patterns
from sparseprune.pruning.patterns import mask_from_scores
from sparseprune.streaming.activations import Activations


@pytest.mark.parametrize(
    ("text", "size"), [("1.5GB", 1_500_000_000), ("1GiB", 2**30), ("800m", 800_000_000), ("12", 12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5 XB", "0"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match='memory: must be a size such as "1.5GB"'):
        parse_size(text)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_finds_one_entry(value, dtype):
    for place in (0, 12345, 99_999):
        tensor = torch.randn(100_000).to(dtype)
        assert all_finite(tensor)
        tensor[place] = value
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("pattern", ["2:4", "8:64", "unstructured"])
def test_masks_of_large_layers_are_made_in_parts_that_change_nothing(monkeypatch, pattern):
    scores = torch.rand(50, 64).mul(9).round()  # with ties
    whole = mask_from_scores(scores, pattern, 0.5 if pattern != "8:64" else None)
    monkeypatch.setattr(patterns, "_CHUNK", 130)
    assert torch.equal(mask_from_scores(scores, pattern, 0.5 if pattern != "8:64" else None), whole)


def test_the_peak_counts_what_was_freed():
    before = peak_memory()
    assert before >= resident_memory() > 10 << 20
    torch.ones(resident_memory() // 4 + (64 << 20))
    assert peak_memory() >= before + (64 << 20)


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    machine = available_memory()
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "_CGROUPS", ((tmp_path, *names),))
    for name, content in (
        ("memory.max", "5000000"),
        ("memory.current", "3000000"),
        ("memory.stat", "inactive_file 7\n"),
    ):
        (tmp_path / name).write_text(content)
    assert available_memory() == 2_000_007 < machine
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 2_000_007


ULIMIT = """
import resource, torch
from sparseprune.memory import room_under_ulimit, spare_address_space
assert room_under_ulimit() is None
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
spare_address_space()
assert (1 << 30) < room_under_ulimit() < (3 << 30)
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
room = room_under_ulimit()
assert room < (1 << 30)
torch.ones(room // 8)
try:
    torch.ones(room // 4 + (1 << 20))
except RuntimeError:
    print("refused")
"""


def test_the_room_that_ulimit_leaves_is_what_can_be_allocated():
    done = processes.python(ULIMIT)
    assert done.stdout == "refused\n", done.stderr


TENSORS = [
    torch.randn(1, 5, 8), torch.randn(2, 3).bfloat16(), torch.tensor(3.0), torch.empty(0, 4), torch.arange(6).half(),
]  # fmt: skip


@pytest.mark.parametrize("memory", [0, 170, 10_000])
def test_activations_come_back_from_memory_disk_and_another_process(tmp_path, memory):
    store = Activations(tmp_path / "states", memory)
    store.extend(TENSORS)
    store[1] = store[1] + 1
    expected = [TENSORS[0], TENSORS[1] + 1, *TENSORS[2:]]
    assert store.nbytes == 160 + 12 + 4 + 12
    assert store.spilled == {0: 188, 170: 188 - 164, 10_000: 0}[memory]
    store.seal()
    again = Activations.open(tmp_path / "states", 0)
    for found in (store, again):
        assert len(found) == 5
        for it, tensor in zip(found, expected, strict=True):
            assert torch.equal(it, tensor)
            assert it.dtype == tensor.dtype
    assert torch.equal(store[-1], expected[-1])
    assert len(store[1:3]) == 2
    again.close()
    store.delete()
    assert not list(tmp_path.iterdir())


def test_activations_refuse_what_they_cannot_do(tmp_path):
    store = Activations(tmp_path / "states", 0)
    store.append(torch.ones(4))
    with pytest.raises(ValueError, match="value: must be .*float32.*as what it replaces, got torch.float32"):
        store[0] = torch.ones(5)
    with pytest.raises(IndexError, match="index: must be below 1, got 1"):
        store[1]
    with pytest.raises(TypeError, match="can be appended, not inserted"):
        store.insert(0, torch.ones(4))
    with pytest.raises(TypeError, match="go all at once, by delete"):
        del store[0]
    store.seal()
    (tmp_path / "states").write_bytes(b"12")
    with pytest.raises(ValueError, match="states: the activations to go on with must have 16 bytes"):
        Activations.open(tmp_path / "states", 0)
    with pytest.raises(ValueError, match="cut short while it was in use"):
        store[0]
    store.delete()
    with pytest.raises(ValueError, match="states: the activations to go on with are missing or damaged"):
        Activations.open(tmp_path / "states", 0)


def test_a_full_disk():
    store = Activations(Path("/dev/full"), 0)
    with pytest.raises(OSError, match="no room for the activations"):
        store.append(torch.ones(4))
    store.close()
