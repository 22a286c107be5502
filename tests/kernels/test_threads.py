"""Threads: several Python threads in the kernels at once, forked workers, one OpenMP runtime in the process."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from helpers import processes, reference
from helpers.compare import assert_same_bits
from helpers.isa import DTYPES, threads
from helpers.shapes import generator, packed_layer, raw

from sparseprune.kernels import ops


def big_layer(dtype: torch.dtype):
    """Enough work that a call takes two threads."""
    w, bias, blob = packed_layer(dtype, 300, 512)
    return w, bias, blob, torch.randn(40, 512, generator=generator(1)).to(dtype)


def test_python_threads_at_once():
    """Each thread has its own layer, shape and batch, and gets what it gets alone."""
    jobs = []
    for i in range(8):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        rows, cols, batch = 100 + 40 * i, 256 + 32 * i, (1, 3, 40, 70)[i % 4]
        w, bias, blob = packed_layer(dtype, rows, cols, "csr" if i % 2 else "tile")
        x = torch.randn(batch, cols, generator=generator(i)).to(dtype)
        jobs.append((w, bias, blob, x))

    def work(w, bias, blob, x):
        values, bits = ops.dense_to_bitmap(w)
        return ops.linear(x, blob, bias), values, bits, *ops.unpack(blob), *ops.dense_to_csr(w)

    with threads(2):
        alone = [work(*job) for job in jobs]
        errors: list[BaseException] = []
        start = threading.Barrier(len(jobs))

        def repeat(job, expected):
            try:
                start.wait(60)
                for _ in range(30):
                    for a, e in zip(work(*job), expected, strict=True):
                        assert_same_bits(a, e)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=repeat, args=pair) for pair in zip(jobs, alone, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    assert not errors, errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_convert_as_the_twins_do(dtype):
    for rows, cols in [(1, 200), (2, 3000), (7, 65), (301, 129)]:
        x = raw(rows, cols, dtype, 0.4, generator(rows, cols))
        keep = torch.rand(rows, cols, generator=generator(2)) < 0.5
        expected = (*reference.dense_to_bitmap(x), *reference.dense_to_csr(x), reference.mask_apply(x, keep))
        with threads(2):
            values, bits = ops.dense_to_bitmap(x)
            results = (values, bits, *ops.dense_to_csr(x), ops.mask_apply(x, keep))
            for result, twin in zip(results, expected, strict=True):
                assert_same_bits(result, twin)
            for layout in ("tile", "csr"):
                for result, twin in zip(
                    ops.unpack(ops.pack(values, bits, cols, layout)), expected[:2], strict=True
                ):
                    assert_same_bits(result, twin)
            assert_same_bits(ops.bitmap_to_dense(values, bits, cols), reference.mask_apply(x, x != 0))
            assert_same_bits(ops.mask_apply_packed(x, ops.pack_mask(keep)), expected[-1])


def test_one_blob_from_many_threads():
    w, bias, blob, x = big_layer(torch.bfloat16)
    with threads(2):
        expected = ops.linear(x, blob, bias)
        results: list[torch.Tensor] = []
        workers = [
            threading.Thread(target=lambda: results.extend(ops.linear(x, blob, bias) for _ in range(20)))
            for _ in range(6)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    assert len(results) == 120
    for result in results:
        assert_same_bits(result, expected)
    assert w.dtype == result.dtype


def test_the_interpreter_is_free_while_a_kernel_runs():
    """A long call holds no GIL: another Python thread makes progress during it."""
    values, bits = ops.dense_to_bitmap(torch.randn(2048, 2048, generator=generator(3)))
    blob = ops.pack(values, bits, 2048, "tile")
    x = torch.randn(2000, 2048, generator=generator(4))
    ticks, calls, done = [], [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(None)

    with threads(1):
        watcher = threading.Thread(target=tick)
        watcher.start()
        while not ticks:  # it runs
            done.wait(0.001)
        # A call that keeps the lock sees one tick at most, between the count and the lock. Where the machine is too busy
        # or too fast for five during one call, there will be in another.
        while len(calls) < 1000 and max(calls, default=0) < 5:
            before = len(ticks)
            ops.linear(x, blob, None)  # 4 G products: tens of milliseconds
            calls.append(len(ticks) - before)
        done.set()
        watcher.join()
    assert max(calls) >= 5, calls


def run(code: str) -> str:
    done = processes.python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


SETUP = """
import os, torch
from torch.utils.data import DataLoader, Dataset
from sparseprune import ops
w = (torch.arange(300 * 512) % 5 - 2).reshape(300, 512).float()
values, bits = ops.dense_to_bitmap(w)
blob = ops.pack(values, bits, 512, "tile")
x = (torch.arange(40 * 512) % 7 - 3).reshape(40, 512).float()
expected = x @ w.t()
def check(threads=2):
    # In a forked child torch's own parallel operations wait for the parent's threads, so that they get one; ours do not.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out, csr = ops.linear(x, blob, None), ops.dense_to_csr(w)
    torch.set_num_threads(before)
    assert torch.equal(out, expected) and torch.equal(csr[2], values)
check()
"""

WORKERS = (
    SETUP
    + """
class Samples(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        check()
        return ops.linear(x[i:i + 1], blob, None)[0], os.getpid()
for epoch in range(2):
    loader = DataLoader(Samples(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    pids = set()
    rows = []
    for row, pid in loader:
        rows.append(row)
        pids |= set(pid.tolist())
        check()  # the parent goes on with its own threads
    assert torch.equal(torch.cat(rows), expected[:8])
    assert len(pids) == 2 and os.getpid() not in pids
print("ok")
"""
)

NESTED = (
    SETUP
    + """
def descend(generations):
    if generations:
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            check()
            descend(generations - 1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    check()
descend(3)
print("ok")
"""
)


def test_forked_data_loader_workers():
    assert run(WORKERS) == "ok\n"


def test_children_of_children():
    assert run(NESTED) == "ok\n"


def test_one_openmp_runtime_in_the_process():
    code = (
        SETUP
        + "import re\nnames = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        + "for name in sorted(names):\n"
        + "    if re.search(r'lib(gomp|omp|iomp5?)[-.]', os.path.basename(name)): print(os.path.realpath(name))\n"
    )
    libraries = run(code).splitlines()
    assert len(libraries) == 1, libraries
    assert os.path.basename(libraries[0]).startswith("libgomp"), libraries


def test_kernels_share_the_pool_of_torch():
    code = """
import os, torch
from sparseprune import ops
def pool(threads):
    torch.set_num_threads(threads)
    w = torch.ones(1000, 1000).mul_(2)  # enough for torch to use every thread
    before = len(os.listdir("/proc/self/task"))
    ops.dense_to_csr(w)
    return before, len(os.listdir("/proc/self/task"))
print(*[after - before for before, after in map(pool, (1, 2, 4))])
torch.set_num_threads(6)
before = len(os.listdir("/proc/self/task"))
ops.dense_to_csr(torch.eye(100))
print(len(os.listdir("/proc/self/task")) - before)
"""
    # No thread beyond torch's; where the kernel is the first to ask for six, it makes the two that are missing.
    assert run(code).split() == ["0", "0", "0", "2"]
