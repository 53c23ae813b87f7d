"""A few threads that each run whole pieces of an operation, with a share of the BLAS threads.

Many products of a few hundred rows run faster side by side, each on one core, than one after the other, each on all
cores: there is nothing to wait for in between, and what a piece computes stays in the cache of its core.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_MAX_WORKERS = 8
_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def worker_count() -> int:
    """How many pieces to cut an operation into: one for each thread that torch may use, at most 8."""
    return min(torch.get_num_threads(), _MAX_WORKERS)


def waiting_threads_sleep() -> bool:
    """Whether OpenMP threads without work give their core free soon, by the environment.

    libgomp lets them spin for some 15 ms otherwise, and a short operation on other threads would share its cores with
    them. The variables are read by libgomp when torch is imported.
    """
    spin = os.environ.get("GOMP_SPINCOUNT", "")
    if spin.isdigit():
        return int(spin) <= 100_000
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


def run_parts(work: Callable[[int], Any], parts: int) -> None:
    """`work(i)` for i < parts, side by side; in the calling thread if there is one part.

    Raises:
        Exception: The first that a part raised, after all have ended.
    """
    if parts == 1:
        with torch.no_grad():
            work(0)
        return
    inference = torch.is_inference_mode_enabled()
    futures = [_pool(parts).submit(_without_gradients, work, part, inference) for part in range(parts)]
    errors: Sequence[BaseException | None] = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _without_gradients(work: Callable[[int], Any], part: int, inference: bool) -> None:
    with torch.inference_mode() if inference else torch.no_grad():  # the mode belongs to the thread
        work(part)


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            threads = torch.get_num_threads()
            share = max(threads // workers, 1)
            everyone_here = threading.Barrier(workers)

            def start() -> None:
                torch.get_num_threads()  # its first call sets a thread's number, and would overwrite ours later
                torch.set_num_threads(share)

            pool = ThreadPoolExecutor(workers, thread_name_prefix="lit-interns1-cpu", initializer=start)
            for future in [pool.submit(everyone_here.wait) for _ in range(workers)]:
                future.result()
            torch.set_num_threads(threads)  # the workers' calls changed what threads yet to come would take
            _pools[workers] = pool
        return _pools[workers]


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
