"""JSON over HTTP with one server, and which failures may pass.

    may pass   no connection, a connection that breaks, no answer in time, 5xx, an answer that is not JSON
    final      4xx: the same request would be refused again

One connection per request: a late answer cannot be taken for that of the next request.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lit_interns1.rollout.engine import EngineError

QUOTED = 400
"""Characters of a server's answer that an error repeats."""
LONGEST_PAUSE = 30.0
"""Seconds."""


class PassingError(EngineError):
    """Something failed that may work when it is tried again, or at another server."""


class RefusedError(EngineError):
    """The server answers that the request is wrong (4xx).

    Args:
        message: Names server and request.
        status: HTTP status.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class Call(NamedTuple):
    """One request.

    Attributes:
        path: With its query.
        body: What is sent as JSON; None = nothing.
        method: "POST" or "GET".
        optional: Old servers do not know the path; their 404 is then no error.
        flag: How a server is started so that it knows the path.
        is_json: Whether the answer is JSON; otherwise it is not read.
    """

    path: str
    body: Mapping[str, Any] | None = None
    method: str = "POST"
    optional: bool = False
    flag: str = ""
    is_json: bool = True


@dataclass(frozen=True)
class Patience:
    """How failures that may pass are met.

    Attributes:
        timeout: Seconds without a byte from a server.
        retries: Attempts after the first.
        backoff: Seconds before the second attempt; doubled before each further one, at most half a minute.
    """

    timeout: float = 1800.0
    retries: int = 3
    backoff: float = 1.0

    def pause(self, attempt: int) -> float:
        """Seconds before an attempt; the first has number 0."""
        return min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0


class Server:
    """One server.

    Args:
        url: "http://host:port", perhaps with a path in front of the endpoints; https, too.
        headers: Sent with every request, such as an Authorization.

    Raises:
        ValueError: If the URL is none.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"RemoteEngine: url {url!r} must look like http://host:port")
        self.url, self._parts = url.rstrip("/"), parts
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._hung_up = False

    def call(self, call: Call, timeout: float) -> Any:
        """The answer: decoded JSON; None if it is empty, or not read.

        Args:
            call: The request.
            timeout: Seconds without a byte from the server.

        Raises:
            PassingError: See the head of the module.
            RefusedError: On a 4xx.
        """
        where = f"{self.url}{call.path.partition('?')[0]}"
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=timeout)
        line: socket.socket | None = None
        try:
            connection.connect()
            line = connection.sock
            self._begin(line, where)
            content = None if call.body is None else json.dumps(call.body).encode()
            connection.request(call.method, self._parts.path.rstrip("/") + call.path, content, self.headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else repr(error)
            raise PassingError(f"{where}: {reason}") from None
        finally:
            with self._lock:
                self._open.discard(line)
            connection.close()
        if response.status >= 400:
            told = f"{where}: HTTP {response.status}: {_quoted(data)}"
            if response.status == 404:
                if call.optional:
                    return None
                told += f": start it with {call.flag}" if call.flag else ""
            raise PassingError(told) if response.status >= 500 else RefusedError(told, response.status)
        if not data or not call.is_json:
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise PassingError(f"{where}: the answer is not JSON: {_quoted(data)}") from None

    def patiently(self, call: Call, patience: Patience) -> Any:
        """The answer, after failures that pass."""
        for attempt in range(patience.retries + 1):
            time.sleep(patience.pause(attempt))
            try:
                return self.call(call, patience.timeout)
            except PassingError as error:
                last = error
        raise PassingError(f"{last} ({patience.retries + 1} attempts)")

    def _begin(self, line: socket.socket, where: str) -> None:
        with self._lock:
            if self._hung_up:
                raise PassingError(f"{where}: hung up")
            self._open.add(line)

    def hang_up(self) -> None:
        """Ends all requests that are under way, and refuses new ones until `pick_up`; servers notice and stop."""
        with self._lock:
            self._hung_up = True
            for line in self._open:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def pick_up(self) -> None:
        """Takes requests again."""
        with self._lock:
            self._hung_up = False


def _quoted(data: bytes) -> str:
    text = data.decode(errors="replace").strip()
    return text if len(text) <= QUOTED else f"{text[:QUOTED]} …"
