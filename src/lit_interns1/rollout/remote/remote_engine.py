"""The engine that has SGLang, vLLM or LMDeploy servers generate, over HTTP.

    rank r of W:  its requests  →  the servers, beginning with another one on every rank     no collective calls
    all ranks:    new weights: each writes what it holds, rank 0 tells the servers           collective

So a rank that generates never waits for another one, and generation may run beside training.
"""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from lit_interns1.checkpoints.agreement import gather, this_rank
from lit_interns1.checkpoints.huggingface import LAYOUTS, ModelSource, WeightsError, export_pretrained
from lit_interns1.models import LanguageModel
from lit_interns1.rollout.engine import EngineCapabilities, EngineError
from lit_interns1.rollout.remote.answers import RoutingShape, Wanted
from lit_interns1.rollout.remote.batch import Batch
from lit_interns1.rollout.remote.dialects import DIALECTS, Backend, WeightTransfer
from lit_interns1.rollout.remote.http import Patience, Server
from lit_interns1.rollout.remote.probe import LogprobsOf, probe, unlike_drawn
from lit_interns1.rollout.remote.weights import Update, buckets
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions

_log = logging.getLogger(__name__)

Value = TypeVar("Value")
_PACKAGES = {
    ("vllm", "tensor"): "vLLM's own package on the trainer's side (vllm.distributed.weight_transfer)",
    ("lmdeploy", "disk"): "an endpoint that loads a folder, which LMDeploy does not have",
}


class RemoteEngine:
    """Generates with servers that run the policy; implements `RolloutEngine`.

    Args:
        backend: What the servers are: "sglang", "vllm" or "lmdeploy".
        urls: One server, or several with the same model, such as "http://127.0.0.1:30000".
        weight_transfer: How servers get new weights. "disk": a Hugging Face folder (SGLang, vLLM). "tensor": the memory
            of the one GPU that trainer and server share (SGLang, LMDeploy). "none": not at all; samples are tagged with
            version 0.
        weights_folder: For "disk": a folder that all ranks and all servers see under this path. The folder of a version
            is removed when the next one has been loaded.
        weights_layout: How tensors are named, see `LAYOUTS`; default: the plainest that can say what the network is.
        weights_like: For "disk": a Hugging Face folder to resemble, usually the one that the servers were started with;
            gives types, encoders and tokenizer.
        weights_dtype: For "disk": as for `export_pretrained`.
        bucket_bytes: For "tensor": bytes of one message.
        request_timeout: Seconds in which a server must answer; longer than its longest sample, and than loading weights
            takes.
        retries: Attempts after the first, for what may pass: no connection, no answer in time, 5xx. Never for 4xx.
        backoff: Seconds before the second attempt; doubled before each further one.
        concurrency: Samples under way at once, on every rank.
        other_logprobs: What to do with samples whose log-probabilities the servers cannot give for the distribution
            that is drawn from: "refuse" to generate them, or "omit" the log-probabilities.
        headers: Sent with every request, such as {"Authorization": "Bearer …"}.

    Raises:
        ValueError: If an option is out of range, or options exclude one another.
    """

    def __init__(
        self, backend: Backend, urls: str | Sequence[str], weight_transfer: WeightTransfer = "disk",
        weights_folder: str | None = None, weights_layout: str | None = None, weights_like: str | None = None,
        weights_dtype: str = "native", bucket_bytes: int = 1 << 30, request_timeout: float = 1800.0, retries: int = 3,
        backoff: float = 1.0, concurrency: int = 64, other_logprobs: Literal["refuse", "omit"] = "refuse",
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        if backend not in DIALECTS:
            raise ValueError(f"RemoteEngine: backend = {backend!r} must be one of {', '.join(DIALECTS)}")
        self.dialect = DIALECTS[backend]
        self.servers = [Server(url, headers) for url in ([urls] if isinstance(urls, str) else urls)]
        _check_urls([server.url for server in self.servers])
        _check_numbers({
            "request_timeout": (request_timeout, request_timeout > 0, "positive"),
            "retries": (retries, retries >= 0, "at least 0"), "backoff": (backoff, backoff >= 0, "at least 0"),
            "concurrency": (concurrency, concurrency >= 1, "at least 1"),
            "bucket_bytes": (bucket_bytes, bucket_bytes >= 1, "at least 1"),
        })  # fmt: skip
        if other_logprobs not in ("refuse", "omit"):
            raise ValueError(f"RemoteEngine: other_logprobs = {other_logprobs!r} must be refuse or omit")
        _check_transfer(backend, weight_transfer, weights_folder)
        if weights_layout is not None and weights_layout not in LAYOUTS:
            raise ValueError(f"RemoteEngine: weights_layout = {weights_layout!r} must be one of {', '.join(LAYOUTS)}")
        self.weight_transfer, self.weights_folder = weight_transfer, weights_folder
        self.weights_layout, self.weights_like, self.weights_dtype = weights_layout, weights_like, weights_dtype
        self.bucket_bytes, self.concurrency, self.other_logprobs = bucket_bytes, concurrency, other_logprobs
        self.patience = Patience(request_timeout, retries, backoff)
        self.capabilities = EngineCapabilities(
            "sampling", True, concurrent=True, copies_weights=weight_transfer != "none"
        )
        self.weight_version: int | None = None
        """That of the servers; None before the first update."""
        self.up_to_date: list[str] = [server.url for server in self.servers]
        """URLs of the servers that have it."""
        self._policy: LanguageModel | None = None
        self._logprobs: LogprobsOf | None = None
        self._shape: RoutingShape | None = None
        self._written: Path | None = None
        self._batch: Batch | None = None
        self._calls = 0
        self._name = uuid.uuid4().hex[:12]
        self._busy = threading.Lock()

    # -- the contract --------------------------------------------------------------------------------------------------

    def connect(self, policy: nn.Module | Any, needs_routing: bool) -> None:
        """Asks every server for its health and for two tokens. All ranks call it together.

        Raises:
            EngineError: If a server cannot be reached, or does not give log-probabilities or the routing that is
                needed; it names the flag of the server.
        """
        if not isinstance(policy, LanguageModel):
            raise EngineError(f"RemoteEngine needs a LanguageModel as policy, got {type(policy).__name__}")
        shape = RoutingShape.of(policy.config) if needs_routing else None
        if needs_routing and shape is None:
            raise EngineError("RemoteEngine: routing is needed, but the policy has no MoE layers")
        wanted = self._wanted(SamplingOptions(), 0, shape)
        name = f"{self._name}-probe"

        def ask() -> list[LogprobsOf]:
            return [probe(server, self.dialect, self.patience, wanted, name) for server in self.servers]

        kinds = self._on_first(ask)
        if len(set(kinds)) > 1:
            told = ", ".join(f"{s.url}: {kind}" for s, kind in zip(self.servers, kinds, strict=True))
            raise EngineError(
                f"RemoteEngine: servers return log-probabilities of different distributions ({told}): start all with "
                f"{self.dialect.logprobs_flag}"
            )
        self._policy, self._shape, self._logprobs = policy, shape, kinds[0]
        self.capabilities = replace(
            self.capabilities, logprobs="raw" if kinds[0] == "raw" else "sampling", routed_experts=shape is not None
        )
        _log.info("RemoteEngine(%s): %d servers, log-probabilities %s", self.dialect.name, len(kinds), kinds[0])

    def generate(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """The samples of each request, in order. It calls no other rank, and may run in another thread.

        Args:
            requests: What to continue.
            options: How tokens are drawn.
            enough: Stop when so many requests are finished on this rank. Samples that are then unfinished come back
                without tokens, as "abort".

        Raises:
            EngineError: If the engine is not connected, log-probabilities would be those of another distribution, or a
                sample fails for good.
        """
        if self._logprobs is None:
            raise EngineError("RemoteEngine: connect(policy, ...) must come before generate")
        unlike = unlike_drawn(options, self._logprobs, self.dialect)
        if unlike is not None and self.other_logprobs == "refuse":
            raise EngineError(unlike)
        with self._busy:
            if not requests:
                return []
            self._calls += 1
            expected = None if self.weight_version is None else str(self.weight_version)
            wanted = replace(self._wanted(options, self.weight_version or 0, self._shape), keep_logprobs=unlike is None)
            self._batch = Batch(
                self.dialect, self._usable(expected), self.patience, self.concurrency, wanted, expected,
                f"{self._name}-{expected}-{self._calls}",
            )  # fmt: skip
            try:
                return self._batch.run(requests, enough)
            finally:
                self._batch = None

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Brings the servers up to date; nothing happens if they have this version. All ranks call it together, and it
        waits for generation to end.

        Args:
            weights: With "tensor" the stream is read to its end. With "disk" it is left alone: each rank writes what it
                holds of the policy that the engine is connected to.
            version: Of the weights; it grows.

        Raises:
            EngineError: If no server takes the weights, or the version does not grow.
        """
        if self.weight_transfer == "none" or version == self.weight_version:
            return
        if self._policy is None:
            raise EngineError("RemoteEngine: connect(policy, ...) must come before sync_weights")
        if self.weight_version is not None and version < self.weight_version:
            raise EngineError(f"RemoteEngine: weights of version {version} cannot follow {self.weight_version}")
        with self._busy:
            gather(None)  # no rank generates any more
            if self.weight_transfer == "disk":
                self.up_to_date = self._through_folder(self._policy, version)
            else:
                self.up_to_date = self._through_memory(weights, version)
            self.weight_version = version

    def close(self) -> None:
        """Ends a `generate` that is under way. The folder of the last version stays: servers may read it again."""
        batch = self._batch
        if batch is not None:
            batch.end()

    # -- requests ------------------------------------------------------------------------------------------------------

    def _wanted(self, options: SamplingOptions, version: int, shape: RoutingShape | None) -> Wanted:
        return Wanted(options, version, shape, self.dialect.logprobs_flag, self.dialect.routing_flag)

    def _usable(self, expected: str | None) -> list[Server]:
        """Servers with the present weights, beginning with another one on every rank and in every call."""
        usable = []
        for server in self.servers:
            if server.url in self.up_to_date and self._has(server, expected):
                usable.append(server)
        if not usable:
            raise EngineError(
                f"RemoteEngine({self.dialect.name}): no server has weights of version {expected}: they were started "
                "anew, or somebody else updates them; start the run again from its last checkpoint"
            )
        first = (this_rank()[0] + self._calls) % len(usable)
        return usable[first:] + usable[:first]

    def _has(self, server: Server, expected: str | None) -> bool:
        call = self.dialect.weight_version()
        if call is None or expected is None:
            return True
        try:
            found = (server.patiently(call, self.patience) or {}).get("weight_version")
        except EngineError as error:
            _log.warning("RemoteEngine: %s is left out: %s", server.url, error)
            return False
        if found not in (None, expected):
            _log.warning("RemoteEngine: %s has version %s, not %s, and is left out", server.url, found, expected)
        return found in (None, expected)

    # -- weights -------------------------------------------------------------------------------------------------------

    def _through_folder(self, policy: LanguageModel, version: int) -> list[str]:
        assert self.weights_folder is not None
        unique = gather(uuid.uuid4().hex[:8])[0]
        folder = Path(self.weights_folder).resolve() / f"version-{version}-{unique}"
        try:
            export_pretrained(
                ModelSource(policy), policy.config, folder, layout=self.weights_layout, dtype=self.weights_dtype,
                like=self.weights_like, progress=False,
            )  # fmt: skip
        except WeightsError as error:
            raise EngineError(f"RemoteEngine: weights of version {version} cannot be written: {error}") from error
        name, dialect = str(version), self.dialect

        def tell() -> list[str]:
            update = Update(dialect, self.servers, self.patience)
            update.step([
                *dialect.pause(), *dialect.load_folder(str(folder), name), *dialect.flush(name), *dialect.resume(),
            ])  # fmt: skip
            result = update.result()
            if self._written is not None:
                shutil.rmtree(self._written, ignore_errors=True)
            return result

        loaded = self._on_first(tell)
        self._written = folder
        return loaded

    def _through_memory(self, weights: Iterable[tuple[str, Tensor]], version: int) -> list[str]:
        """Rank 0 hands out buckets; the others take part in making them, also when rank 0 has failed."""
        name, dialect, first = str(version), self.dialect, this_rank()[0] == 0
        update = Update(dialect, self.servers, self.patience)
        error: EngineError | None = None
        if first:
            update.step(dialect.pause())
        for bucket, last in buckets(weights, self.bucket_bytes):
            if first and error is None:
                try:
                    update.step(dialect.load_tensors(bucket, name, last))
                except EngineError as wrong:
                    error = wrong

        def finish() -> list[str]:
            if error is not None:
                raise error
            update.step([*dialect.flush(name), *dialect.resume()])
            return update.result()

        return self._on_first(finish)

    def _on_first(self, work: Callable[[], Value]) -> Value:
        """What rank 0 gets; its error is one of all ranks."""
        outcome: tuple[Value | None, str | None] = None, None
        if this_rank()[0] == 0:
            try:
                outcome = work(), None
            except EngineError as error:
                outcome = None, str(error)
        value, told = gather(outcome)[0]
        if told is not None:
            raise EngineError(told)
        return value  # type: ignore[return-value]


def _check_urls(urls: Sequence[str]) -> None:
    if not urls:
        raise ValueError("RemoteEngine: urls must name at least one server")
    if len(set(urls)) != len(urls):
        raise ValueError(f"RemoteEngine: urls name a server twice: {', '.join(urls)}")


def _check_numbers(given: Mapping[str, tuple[float, bool, str]]) -> None:
    for name, (value, fits, wanted) in given.items():
        if not fits:
            raise ValueError(f"RemoteEngine: {name} = {value} must be {wanted}")


def _check_transfer(backend: str, transfer: str, folder: str | None) -> None:
    if transfer not in get_args(WeightTransfer):
        raise ValueError(
            f"RemoteEngine: weight_transfer = {transfer!r} must be one of {', '.join(get_args(WeightTransfer))}"
        )
    offered = DIALECTS[backend].transfers
    if transfer not in offered:
        raise ValueError(
            f"RemoteEngine: weight_transfer = {transfer!r} with {backend} needs {_PACKAGES[backend, transfer]}; here "
            f"it takes {' or '.join(map(repr, offered))}"
        )
    if (transfer == "disk") != (folder is not None):
        raise ValueError(
            f"RemoteEngine: weights_folder = {folder!r} with weight_transfer = {transfer!r}: it is needed for 'disk', "
            "and for nothing else"
        )
