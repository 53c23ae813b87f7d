"""The Python blocks of README.md and of the pages in docs/ run as they are printed.

The blocks of a page share one namespace and one empty working directory. A block that only illustrates has the line
`<!-- no-run -->` above its fence.
"""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<mark><!-- no-run -->\s*\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of every block that runs."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if not match["mark"]]
    return [(text.count("\n", 0, match.start("code")) + 1, match["code"]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "WANDB_MODE", "disabled")
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page):
        # as many empty lines in front as the page has, so that a traceback names the line of the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_every_python_fence_is_found():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(FENCE.findall(text)) == len(re.findall(r"^\s*```\s*(?:python|py)\b", text, re.MULTILINE)), page.name
