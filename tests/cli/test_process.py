"""Settings of the process: freed blocks are kept, and what the user has set stays. In processes of their own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from lit_interns1.commands.process import keep_freed_memory
if sys.argv[1] == "keep":
    print("set", keep_freed_memory())
import numpy
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(1 << 22)
before = pages()
for _ in range(4):
    numpy.ones(1 << 22)  # 32 MiB: 8192 pages of 4 KiB
print("faults", pages() - before)
"""


def run(argument, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, argument]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.skipif(not sys.platform.startswith("linux") or not os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_freed_blocks_are_kept_for_the_next_step():
    plain, kept = run("leave"), run("keep")
    assert kept["set"] == "True"
    assert int(kept["faults"]) < 50 < int(plain["faults"])


@pytest.mark.parametrize(
    "setting", [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_the_user_stay(setting):
    result = run("keep", **setting)
    assert result["set"] == "False"
    assert int(result["faults"]) > 50


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    from lit_interns1.commands.process import quiet_waiting_threads

    for given, expected in (({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        quiet_waiting_threads()
        assert os.environ.get("GOMP_SPINCOUNT") == expected
