"""What every benchmark needs: fair times and honest peak memory.

Times: the candidates take turns, so that a slow phase of a shared machine hits all of them; the median is reported.
Memory: the candidate runs in a fresh process; its peak anonymous memory (without mapped files) above what was live
before the call, with what the allocator had kept given back first. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

MEBIBYTE = 1 << 20
ALLOCATORS: dict[str, dict[str, str]] = {
    "default allocator": {},
    "allocator keeps freed memory": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    },
}
"""Environment of the two settings of glibc's allocator that figures are given for."""


def interleaved_times(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Runs all candidates in turn, `warmup` + `repeats` times.

    Args:
        candidates: Functions without arguments, by name.
        repeats: Timed rounds.
        warmup: Rounds that are thrown away.
        clock: Seconds; `time.process_time` for CPU time.

    Returns:
        Seconds of every timed call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            elapsed = clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def interleaved_medians(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """The median seconds of each candidate; arguments as in `interleaved_times`."""
    return {name: statistics.median(times) for name, times in interleaved_times(candidates, repeats, warmup).items()}


def resident(field: str) -> int:
    """Bytes of a field of this process's memory status."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def start_peak() -> int:
    """Gives unused heap back, starts a new peak, and returns the anonymous memory that is live."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")
    return resident("RssAnon")


def peak_anonymous() -> int:
    """Peak anonymous memory since `start_peak`: the peak of all memory without the mapped files."""
    return resident("VmHWM") - resident("RssFile") - resident("RssShmem")


def _measure(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], connection: Connection) -> None:
    candidate = build(*arguments)
    level = start_peak()
    candidate()
    connection.send(peak_anonymous() - level)
    connection.close()


def peak_extra_memory(build: Callable[..., Callable[[], Any]], *arguments: Any, timeout: float = 600.0) -> int:
    """The most memory that one call holds beyond what was there before, in bytes.

    Args:
        build: At the top level of its module; `build(*arguments)` makes the inputs (and warms up the libraries on
            something small) and returns the function to measure. It runs in a fresh process.
        arguments: Anything that can be pickled.
        timeout: Seconds.

    Raises:
        RuntimeError: If the process fails or takes too long.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(build, arguments, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise RuntimeError(f"{build.__name__}{arguments} did not finish within {timeout:g} s")
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError(f"{build.__name__}{arguments} failed; see its output above") from None
    finally:
        process.join(5.0)
        if process.is_alive():
            process.kill()
        receiver.close()


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables of processes started inside."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def started(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A fresh process with a pipe to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10.0)
        if process.is_alive():
            process.kill()


def verdict(met: bool) -> str:
    """How a goal line ends."""
    return "met" if met else "MISSED"
