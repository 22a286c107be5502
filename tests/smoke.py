"""What an installed wheel must do, with nothing of the repository on the path: `python tests/smoke.py [cpu|cuda]`."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sparseprune as sp
from sparseprune.kernels import _core


def check_libraries() -> None:
    """Neither libtorch nor anything of CUDA is needed to load the extension, and there is one OpenMP runtime: torch's."""
    libraries = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    needed = libraries.replace(str(Path(_core.__file__).parent), "")
    assert not re.search("torch|libcuda|libcudart|nvidia", needed), libraries
    print(libraries.strip())
    maps = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"(/\S*lib(?:gomp|omp|iomp5)[\w.-]*\.so[\w.]*)", maps))
    assert len(runtimes) == 1, runtimes
    print(f"OpenMP runtime: {runtimes.pop()}")


def check_cuda(kind: str) -> None:
    """The wheel for CPUs says that it has no GPU kernels; the one with CUDA says what this machine lacks, or runs."""
    info = sp.cuda_info()
    print(f"CUDA: {info}")
    assert info["built"] == (kind == "cuda"), info
    if kind == "cuda":
        assert {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"} <= set(info["targets"]), info
        assert any(target.startswith("compute_") for target in info["targets"]), info
    if not info["missing"]:
        weight = torch.randn(64, 64, device="cuda")
        assert torch.equal(sp.ops.dense_to_csr(weight)[2], weight.flatten())
        return
    assert re.search(
        "driver|no CUDA" if kind == "cuda" else "no CUDA kernels; install a wheel", info["missing"]
    ), info
    if kind == "cuda" and not _core.cuda.missing():
        return  # a GPU is here, a torch that can use it is not
    try:
        sp.kernels.cuda._kernels.bytes_to_bits(0, 0, 0, 0, 0, 0)
    except RuntimeError as error:
        print(f"A CUDA call: {error}")
        assert re.search(
            "NVIDIA driver" if kind == "cuda" else "no CUDA kernels; install a wheel", str(error)
        ), error
    else:
        raise AssertionError("a CUDA call went through, where cuda_info() says that something is missing")


def main(kind: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)).eval()
    sp.prune(model, pattern="2:4", method="magnitude")
    x = torch.randn(5, 256)
    with torch.inference_mode():
        expected = model(x)
        sp.sparsify(model, policy="always")
        assert all(isinstance(model[i], sp.SparseLinear) for i in (0, 2)), model
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        with tempfile.TemporaryDirectory() as folder:
            sp.save(model, folder)
            skeleton = torch.nn.Sequential(
                torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)
            )
            reloaded = sp.load(folder, model=skeleton).eval()
        assert torch.equal(reloaded(x), model(x))
    check_libraries()
    check_cuda(kind)
    print(
        f"smoke test passed: sparseprune {sp.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}, "
        f"isa {sp.isa()}, from {Path(_core.__file__).parent}"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda" if hasattr(_core, "cuda") else "cpu")
