"""New weights for servers: through a folder that trainer and servers see, or through the memory of one GPU.

    pause → load → flush the prefix cache → resume        on every server; one that fails stays paused

A server that misses an update answers no request until it has had one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from lit_interns1.rollout.engine import EngineError
from lit_interns1.rollout.remote.dialects import Dialect, succeeded
from lit_interns1.rollout.remote.http import Call, Patience, RefusedError, Server

_log = logging.getLogger(__name__)


def in_order(server: Server, calls: Iterable[Call], patience: Patience) -> None:
    """Makes the calls one after another.

    Raises:
        EngineError: With the first that fails; later ones are not made.
    """
    for call in calls:
        content = server.patiently(call, patience)
        if not succeeded(content):
            raise RefusedError(f"{server.url}{call.path.partition('?')[0]}: {content}")


def on_all(servers: Sequence[Server], calls: Sequence[Call], patience: Patience) -> dict[Server, EngineError]:
    """The same calls on every server, side by side; what failed, by server."""

    def attempt(server: Server) -> EngineError | None:
        try:
            in_order(server, calls, patience)
        except EngineError as error:
            return error
        return None

    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        errors = list(pool.map(attempt, servers))
    return {server: error for server, error in zip(servers, errors, strict=True) if error is not None}


class Update:
    """One update of all servers, step by step: those that fail in a step take no part in the next one.

    Args:
        dialect: Kind of the servers.
        servers: All of them.
        patience: With failures.
    """

    def __init__(self, dialect: Dialect, servers: Sequence[Server], patience: Patience) -> None:
        self.dialect, self.patience = dialect, patience
        self.alive = list(servers)
        self.failures: dict[Server, EngineError] = {}

    def step(self, calls: Sequence[Call]) -> None:
        """Makes the calls on every server that has not failed."""
        failed = on_all(self.alive, calls, self.patience)
        self.failures |= failed
        self.alive = [server for server in self.alive if server not in failed]

    def result(self) -> list[str]:
        """URLs of the servers that have the new weights.

        Raises:
            EngineError: If none has.
        """
        for server, error in self.failures.items():
            _log.warning("RemoteEngine: %s has not got the new weights and is left out: %s", server.url, error)
        if not self.alive:
            raise next(iter(self.failures.values()))
        return [server.url for server in self.alive]


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Tensors in groups of at most `size` bytes, a larger one alone; with each, whether it is the last."""
    held: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        if held and sum(t.nbytes for _, t in held) + tensor.nbytes > size:
            yield held, False
            held = []
        held.append((name, tensor))
    yield held, True
