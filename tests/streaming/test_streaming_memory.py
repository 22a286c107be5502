"""Under a limit on memory that the kernel enforces, killed for real, and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.checkpoints import random_llama
from helpers.isa import threads

from sparseprune.streaming import prune_folder

STREAM = """
import json, resource, sys
import torch
from sparseprune.memory import peak_memory
from sparseprune.streaming import prune_folder

folder, out, limit, growth, windows = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
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
report = prune_folder(folder, out, "2:4", method="wanda", calibration=batches, memory=None if growth else limit)
try:
    torch.ones(limit // 4)  # what the limit is there for
except RuntimeError as error:
    assert "memory" in str(error)
else:
    raise AssertionError("the limit is not enforced")
json.dump({**report.to_dict(), "peak": peak_memory()}, sys.stdout)
"""


def start(folder, out, limit=0, growth=0, windows=2):
    arguments = [sys.executable, "-c", STREAM, folder, out, limit, growth, windows]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        list(map(str, arguments)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return json.loads(output)


def kill_after(process, out, blocks):
    """SIGKILL as soon as `blocks` blocks are written."""
    while process.poll() is None:
        try:
            done = json.loads((out / "stream.json").read_text())["done"]
        except OSError:
            done = 0
        if done >= blocks:
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def same_files(one, other):
    """Compared file by file, read in parts: they may be larger than memory."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    return all(subprocess.run(["cmp", path, other / path.name]).returncode == 0 for path in one.iterdir())


def test_a_model_larger_than_the_memory_allowed(tmp_path):
    """60 MiB on top of the program for a model of 105: it cannot be in memory, and allocations past that fail."""
    shape = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 2, "layers": 10, "vocabulary": 96}
    assert random_llama(tmp_path / "dense", **shape, dtype=torch.float32) > 105 << 20
    process = start(tmp_path / "dense", tmp_path / "out", growth=60 << 20)
    kill_after(process, tmp_path / "out", blocks=3)
    assert finish(start(tmp_path / "dense", tmp_path / "out", growth=60 << 20))["resumed_at"] >= 3
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
    report = finish(start(tmp_path / "dense", tmp_path / "whole", limit, windows=4))
    assert report["peak"] < limit
    assert report["pruned"]["sparsity_after"] == 0.5
    process = start(tmp_path / "dense", tmp_path / "out", limit, windows=4)
    kill_after(process, tmp_path / "out", blocks=5)
    resumed = finish(start(tmp_path / "dense", tmp_path / "out", limit, windows=4))
    assert resumed["resumed_at"] >= 5
    assert resumed["peak"] < limit
    assert same_files(tmp_path / "whole", tmp_path / "out")
    for name in ("dense", "whole", "out"):  # pytest keeps what three runs leave behind
        shutil.rmtree(tmp_path / name)
