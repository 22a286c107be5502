"""What an installed wheel must do, with nothing of the repository on the path: `python tests/smoke.py`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sparseprune as sp
from sparseprune import _core


def main() -> None:
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
    libraries = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in libraries.replace(str(Path(_core.__file__).parent), ""), libraries
    print(libraries.strip())
    print(
        f"smoke test passed: sparseprune {sp.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}, "
        f"isa {sp.isa()}, from {Path(_core.__file__).parent}"
    )


if __name__ == "__main__":
    main()
