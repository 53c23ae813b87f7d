"""Runs the tests in `interpreted/`, where Triton kernels are interpreted: in processes of their own, because
`TRITON_INTERPRET` must be set before the kernels are imported, and a process that interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


def run(path: Path, marker: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]  # 5: no test with this marker


@pytest.mark.parametrize("path", sorted(FOLDER.glob("check_*.py")), ids=lambda path: path.stem)
def test_interpreted(path):
    run(path, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("check_*.py")), ids=lambda path: path.stem)
def test_interpreted_slow(path):
    run(path, "slow")
