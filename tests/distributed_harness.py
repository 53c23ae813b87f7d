"""Runs a function on several ranks of a gloo process group on this machine.

    results = run_ranks(function, world_size, *arguments)       # function(rank, world_size, *arguments) -> anything

A forked child hangs in its first parallel region if its parent has used OpenMP before, and under pytest it usually has.
So ranks are forked from a server process that has imported torch and has done nothing else: as safe as a fresh
interpreter, without paying for the import of torch in every rank.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "lightning.pytorch",
]  # fmt: skip


class RankError(RuntimeError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def _load_module(name: str, path: str) -> None:
    """Makes the test module importable by name: pytest's importlib mode leaves it off the path of a new process."""
    if name in sys.modules:
        return
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    for parent in (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)):
        sys.modules.setdefault(parent, type(sys)(parent))
    specification.loader.exec_module(module)


def _rank_main(
    rank: int, world_size: int, module: tuple[str, str], call: bytes, store: str, timeout: float, connection: Connection
) -> None:
    try:
        os.environ.update(_ENVIRONMENT)
        import torch
        import torch.distributed as dist

        faulthandler.enable()  # a signal's stack, in what the test prints
        torch.set_num_threads(1)
        _load_module(*module)
        function, arguments = pickle.loads(call)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        result = function(rank, world_size, *arguments)
        message = pickle.dumps((True, result))
        dist.barrier()  # nobody leaves while another still talks to it
        connection.send_bytes(message)
        dist.destroy_process_group()
    except BaseException:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        connection.close()


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Calls `function(rank, world_size, *arguments)` on every rank, with the default process group initialised.

    Args:
        function: At the top level of its module. One thread per rank; seed what must be equal.
        world_size: Number of ranks.
        arguments: Anything that can be pickled.
        timeout: Seconds for the whole call, start-up included.

    Returns:
        What each rank returned, by rank (pickled: detach tensors and bring them to the CPU).

    Raises:
        RankError: With the traceback of the first rank that failed; the others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    module = function.__module__, inspect.getfile(function)
    call = pickle.dumps((function, arguments))
    saved = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)  # the server inherits them when it starts
    processes, connections = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, module, call, os.path.join(folder, "store"), timeout, sender),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            return _collect(processes, connections, timeout)
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for process in processes:
                process.join(timeout=0.0 if sys.exc_info()[0] else 10.0)
                if process.is_alive():
                    process.kill()
                    process.join()
            for connection in connections:
                connection.close()


def _collect(processes: list[Any], connections: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [c for rank, c in enumerate(connections) if rank not in results]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0.0))
        if not ready:
            missing = sorted(set(range(len(connections))) - set(results))
            raise RankError(f"ranks {missing} did not finish within {timeout:g} s")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                succeeded, value = pickle.loads(connections[rank].recv_bytes())
            except EOFError:
                processes[rank].join(timeout=10.0)
                code = processes[rank].exitcode  # -11: SIGSEGV
                raise RankError(f"rank {rank} died without a traceback, exit code {code}") from None
            if not succeeded:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]
