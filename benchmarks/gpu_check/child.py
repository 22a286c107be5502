"""Runs a module on the package that gpu-check built: python child.py SITE MODULE ARGUMENTS..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    site, module = sys.argv[1:3]
    # A checkout that is installed to be edited answers for its name ahead of the path.
    sys.meta_path[:] = [it for it in sys.meta_path if not _is_editable(it)]
    sys.path[0] = site  # in the place of this folder
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    sys.argv[:] = [module, *sys.argv[3:]]
    import sparseprune

    found = Path(sparseprune.__file__).resolve()
    if not found.is_relative_to(Path(site).resolve()):
        raise SystemExit(f"sparseprune: must come from {site}, got {found}; uninstall that one")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _is_editable(finder: object) -> bool:
    name = getattr(finder, "__module__", "")
    return "sparseprune" in name and "editable" in name


if __name__ == "__main__":
    main()
