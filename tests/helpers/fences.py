"""The pages of the repository, and the fenced code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    str(path.relative_to(ROOT)) for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
]


def languages(path: str) -> list[str]:
    """Of every fence that opens in a page, in order; "" where it names none."""
    opening = re.findall(r"^ *(?:```|~~~)(.*)$", (ROOT / path).read_text(), re.MULTILINE)[::2]
    return [it.strip() for it in opening]


def fences(path: str, language: str) -> list[str]:
    """The code in the page's fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)
