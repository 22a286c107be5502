"""Under a limit on memory that the kernel enforces, killed for real, and gone on with."""

import json
import shutil
import signal
import subprocess

import pytest
import torch
from helpers import processes
from helpers.checkpoints import random_llama
from helpers.isa import threads

from sparseprune.streaming import prune_folder

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STREAM = """
import json, os, resource, signal, sys
import torch
from sparseprune.memory import peak_memory
from sparseprune.streaming import prune_folder
from sparseprune.streaming.state import State

folder, out = sys.argv[1:3]
limit, growth, windows, blocks = map(int, sys.argv[3:])
torch.set_num_threads(1)
if growth:  # the limit is on what comes on top of the program itself
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM
    with open("/proc/self/status") as status:
        data = next(line for line in status if line.startswith("VmData"))
    limit = growth + 1024 * int(data.split()[1])
seed = torch.Generator().manual_seed(1)
batches = [torch.randint(96, (1, 32), generator=seed) for _ in range(windows)]
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # ulimit -d: past it, allocations fail
if not growth:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # ulimit -v: all that is mapped, the libraries too
write = State.write
def write_and_die(state, folder):
    if state.done > blocks:  # one more is in its file, and nothing says so yet
        os.kill(os.getpid(), signal.SIGKILL)
    write(state, folder)
if blocks:
    State.write = write_and_die
report = prune_folder(folder, out, "2:4", method="wanda", calibration=batches, memory=None if growth else limit)
try:
    torch.ones(limit // 4)  # what the limit is there for
except RuntimeError as error:
    assert "memory" in str(error)
else:
    raise AssertionError("the limit is not enforced")
json.dump({**report.to_dict(), "peak": peak_memory()}, sys.stdout)
"""


def stream(folder, out, limit=0, growth=0, windows=2):
    """The report of a run in a process of its own."""
    done = processes.python(STREAM, ONE_THREAD, folder, out, limit, growth, windows, 0)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def killed(folder, out, blocks, limit=0, growth=0, windows=2):
    """A run that gets a SIGKILL behind the file of a block, when `blocks` before it are done."""
    done = processes.python(STREAM, ONE_THREAD, folder, out, limit, growth, windows, blocks)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((out / "stream.json").read_text())["done"] == blocks


def same_files(one, other):
    """Compared file by file, read in parts: they may be larger than memory."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    return all(subprocess.run(["cmp", path, other / path.name]).returncode == 0 for path in one.iterdir())


def test_a_model_larger_than_the_memory_allowed(tmp_path):
    """60 MiB on top of the program for a model of 105: it cannot be in memory, and allocations past that fail."""
    shape = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 2, "layers": 10, "vocabulary": 96}
    assert random_llama(tmp_path / "dense", **shape, dtype=torch.float32) > 105 << 20
    killed(tmp_path / "dense", tmp_path / "out", blocks=3, growth=60 << 20)
    assert stream(tmp_path / "dense", tmp_path / "out", growth=60 << 20)["resumed_at"] == 3
    seed = torch.Generator().manual_seed(1)
    batches = [torch.randint(96, (1, 32), generator=seed) for _ in range(2)]
    with threads(1):
        prune_folder(tmp_path / "dense", tmp_path / "whole", "2:4", method="wanda", calibration=batches)
    assert same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_three_gigabytes_under_a_limit_of_one_and_a_half(tmp_path):
    """The limit is enforced by the kernel (ulimit -d and -v), and the high-water mark of all memory is below it too."""
    limit = 1_500_000_000
    assert random_llama(tmp_path / "dense") > 3e9
    report = stream(tmp_path / "dense", tmp_path / "whole", limit, windows=4)
    assert report["peak"] < limit
    assert report["pruned"]["sparsity_after"] == 0.5
    killed(tmp_path / "dense", tmp_path / "out", blocks=5, limit=limit, windows=4)
    resumed = stream(tmp_path / "dense", tmp_path / "out", limit, windows=4)
    assert resumed["resumed_at"] == 5
    assert resumed["peak"] < limit
    assert same_files(tmp_path / "whole", tmp_path / "out")
    for name in ("dense", "whole", "out"):  # pytest keeps what three runs leave behind
        shutil.rmtree(tmp_path / name)
