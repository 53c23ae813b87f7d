"""Settings of the process, for where the process is ours: the command line. A plain import changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1


def quiet_waiting_threads() -> None:
    """Lets OpenMP threads without work spin for a moment only, then sleep. Before torch is loaded, which reads it.

    Spinning on for long slows a busy machine down many times over; sleeping at once costs an idle one a third of its
    speed. Settings of the user stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep large blocks for the next step instead of giving them back to the system.

    A training step allocates and frees the same large blocks over and over, and new pages cost 10 to 30 % of it. The
    process stays as large as its largest step was. Settings of the user (`MALLOC_…_`, `GLIBC_TUNABLES`) stay.

    Returns:
        Whether anything was set.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("THRESHOLD_") for name in os.environ
    ):
        return False
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(
            [mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _LARGEST), mallopt(_TOP_PAD, 64 << 20)]
        )
    return False
