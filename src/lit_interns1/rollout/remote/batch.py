"""One call of `generate`: every sample is a request with a seed of its own, and has one place that is filled once.

    attempt k of a sample  →  server (start + k) mod S of those that answer,  after a pause of backoff · 2^(k−1)

An attempt that fails in passing leaves nothing: its connection is closed, the server is told to drop it, and the next
one has another id. So no sample is lost or counted twice, whichever server dies.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field

from lit_interns1.rollout.engine import EngineError
from lit_interns1.rollout.remote.answers import Wanted, aborted
from lit_interns1.rollout.remote.dialects import Dialect
from lit_interns1.rollout.remote.http import PassingError, Patience, Server
from lit_interns1.rollout.samples import GenerationRequest, Sample

_log = logging.getLogger(__name__)

ABORT_SECONDS = 5.0
"""How long a server may take to confirm that it drops a request."""


@dataclass
class Batch:
    """Samples of several requests.

    Attributes:
        dialect: Of the servers.
        servers: Those whose weights are up to date, in the order in which they are asked.
        patience: With failures.
        concurrency: Requests under way at once.
        wanted: What answers must fit.
        expected: Version that servers must answer with, if they tell one; None = any.
        name: Beginning of all request ids.
    """

    dialect: Dialect
    servers: Sequence[Server]
    patience: Patience
    concurrency: int
    wanted: Wanted
    expected: str | None
    name: str
    _stop: threading.Event = field(default_factory=threading.Event)
    _failed: set[str] = field(default_factory=set)

    def run(self, requests: Sequence[GenerationRequest], enough: int | None) -> list[list[Sample]]:
        """The samples of each request, in order.

        Args:
            requests: What to continue.
            enough: Stop when so many requests are finished.

        Raises:
            EngineError: If a sample fails for good; no request is then under way any more.
        """
        places = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        samples: list[list[Sample]] = [[aborted(r.prompt_ids, seed) for seed in r.seeds] for r in requests]
        if not places or enough == 0:
            return samples
        left, whole = [len(request.seeds) for request in requests], 0
        with ThreadPoolExecutor(min(self.concurrency, len(places)), "rollout") as pool:
            try:
                futures: dict[Future[Sample | None], tuple[int, int]] = {
                    pool.submit(self._sample, requests[i], j, f"{self.name}-{i}-{j}", number): (i, j)
                    for number, (i, j) in enumerate(places)
                }
                for future in as_completed(futures):
                    i, j = futures[future]
                    sample = future.result()
                    if sample is None:
                        continue
                    samples[i][j] = sample
                    left[i] -= 1
                    whole += not left[i]
                    if enough is not None and whole >= enough:
                        self.end()
            except BaseException:
                self.end()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for server in self.servers:
                    server.pick_up()
        return samples

    def end(self) -> None:
        """Ends what is under way: samples that are not finished come back as "abort"."""
        self._stop.set()
        for server in self.servers:
            server.hang_up()

    def _sample(self, request: GenerationRequest, place: int, name: str, number: int) -> Sample | None:
        """One sample; None if it is not waited for."""
        try:
            return self._attempts(request, place, name, number)
        except EngineError:
            self.end()  # before this thread begins with another sample
            raise

    def _attempts(self, request: GenerationRequest, place: int, name: str, number: int) -> Sample | None:
        told = ""
        for attempt in range(self.patience.retries + 1):
            if self._stop.wait(self.patience.pause(attempt)):
                return None
            server = self._server(number + attempt)
            try:
                return self._attempt(server, request, place, f"{name}-{attempt}")
            except PassingError as error:
                if self._stop.is_set():
                    return None
                told = str(error)
                first = server.url not in self._failed
                _log.log(logging.WARNING if first else logging.DEBUG, "RemoteEngine: tried again: %s", told)
                self._failed.add(server.url)
        raise EngineError(
            f"RemoteEngine({self.dialect.name}): {self.patience.retries + 1} attempts failed, the last one with: {told}"
        )

    def _server(self, turn: int) -> Server:
        """The next one, of those that have not failed in this call if there are any."""
        fine = [server for server in self.servers if server.url not in self._failed] or list(self.servers)
        return fine[turn % len(fine)]

    def _attempt(self, server: Server, request: GenerationRequest, place: int, request_id: str) -> Sample:
        seed, wanted = request.seeds[place], self.wanted
        call = self.dialect.generate(request.prompt_ids, seed, wanted.options, request_id, wanted.shape is not None)
        try:
            content = server.call(call, self.patience.timeout)
        except PassingError:
            self._drop(server, request_id)
            raise
        where = f"{server.url}, sample {request_id}"
        try:
            answer = self.dialect.answer(content)
            if answer.request_id not in (None, request_id):
                raise PassingError(f"the answer is that of {answer.request_id}")
            if self.expected is not None and answer.version not in (None, self.expected):
                raise PassingError(
                    f"drawn with weights of version {answer.version!r}, not {self.expected!r}; the server was started "
                    "anew, or somebody else updates it"
                )
            if answer.finish == "abort":
                raise PassingError("aborted by the server")
            return wanted.sample(answer, request.prompt_ids, seed)
        except EngineError as error:
            raise type(error)(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EngineError(
                f"{where}: the answer has not the form of {self.dialect.name} ({error!r}): {str(content)[:200]}"
            ) from None

    def _drop(self, server: Server, request_id: str) -> None:
        """Tells a server that nobody waits for a request any more."""
        call = self.dialect.abort(request_id)
        if call is not None:
            with suppress(EngineError):
                Server(server.url, server.headers).call(call, ABORT_SECONDS)
