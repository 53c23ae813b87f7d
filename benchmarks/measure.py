"""What every benchmark needs: fair times and honest peak memory.

Times: the candidates take turns, so that a slow phase of a shared machine hits all of them; the median is reported.
Memory: the candidate runs in a fresh process; its peak resident memory above what was resident before the call.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

MEBIBYTE = 1 << 20


def interleaved_times(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs all candidates in turn, `warmup` + `repeats` times.

    Args:
        candidates: Functions without arguments, by name.
        repeats: Timed rounds.
        warmup: Rounds that are thrown away.

    Returns:
        Seconds of every timed call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def interleaved_medians(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """The median seconds of each candidate; arguments as in `interleaved_times`."""
    return {name: statistics.median(times) for name, times in interleaved_times(candidates, repeats, warmup).items()}


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


def _peak_bytes() -> int:
    try:
        return _status_bytes("VmHWM")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> int:
    """Sets the high-water mark to what is resident now, where the system allows it; gives the mark that counts."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")
        return _status_bytes("VmRSS")
    except OSError:
        return _peak_bytes()  # only growth above the old peak can be seen: a lower bound


def _measure(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], connection: Connection) -> None:
    candidate = build(*arguments)
    before = _reset_peak()
    candidate()
    connection.send(_peak_bytes() - before)
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
