"""The three servers: the same few steps in three spellings.

    generate   token ids in; token ids, log-probabilities and routing out
    update     pause → load → flush the prefix cache → resume

Everything here was read from public sources, which `docs/remote-engines.md` names; no live server has confirmed it.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lit_interns1.rollout.engine import EngineError
from lit_interns1.rollout.remote.answers import Answer
from lit_interns1.rollout.remote.gpu_handles import handles
from lit_interns1.rollout.remote.http import Call
from lit_interns1.rollout.samples import SamplingOptions

Backend = Literal["sglang", "vllm", "lmdeploy"]
WeightTransfer = Literal["disk", "tensor", "none"]


class Dialect(Protocol):
    """How one kind of server is talked to.

    Attributes:
        name: As users write it.
        routing_flag: How a server is started so that it gives routing.
        logprobs_flag: How a server is started so that it gives log-probabilities after temperature.
        transfers: Ways by which it takes weights, by what the trainer needs for them.
    """

    name: str
    routing_flag: str
    logprobs_flag: str
    transfers: tuple[WeightTransfer, ...]

    def generate(
        self, prompt_ids: Sequence[int], seed: int, options: SamplingOptions, request_id: str, routing: bool
    ) -> Call:
        """The request of one sample."""

    def answer(self, content: Any) -> Answer:
        """Reads the answer.

        Raises:
            EngineError: If routing is there in a form that cannot be read.
            KeyError, TypeError, ValueError, IndexError: If it has another form than the server's.
        """

    def abort(self, request_id: str) -> Call | None:
        """Ends a request at the server; None: it notices that the connection is gone."""

    def weight_version(self) -> Call | None:
        """Asks for the version of the weights, `weight_version` in the answer; None: answers to `generate` tell, or
        nothing does."""

    def pause(self) -> list[Call]:
        """Before weights change."""

    def load_folder(self, folder: str, version: str) -> list[Call]:
        """Loads a Hugging Face folder that trainer and server see."""

    def load_tensors(self, named: Sequence[tuple[str, Tensor]], version: str, last: bool) -> list[Call]:
        """Loads tensors that lie in the memory of a GPU that trainer and server share; they must live until the server
        has answered."""

    def flush(self, version: str) -> list[Call]:
        """Forgets what was computed with the old weights."""

    def resume(self) -> list[Call]:
        """Generates again."""


class SGLang:
    """SGLang's native API. Its log-probabilities are those after temperature and before top-p and top-k."""

    name = "sglang"
    routing_flag = "--enable-return-routed-experts"
    logprobs_flag = "SGLANG_RETURN_ORIGINAL_LOGPROB unset"
    transfers: tuple[WeightTransfer, ...] = ("disk", "tensor", "none")

    def generate(
        self, prompt_ids: Sequence[int], seed: int, options: SamplingOptions, request_id: str, routing: bool
    ) -> Call:
        """See `Dialect`. Seeds count under `--enable-deterministic-inference` only."""
        sampling = {
            "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
            "top_k": options.top_k or -1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
            "repetition_penalty": 1.0, "stop_token_ids": list(options.stop_ids), "skip_special_tokens": False,
            "no_stop_trim": True, "sampling_seed": seed,
        }  # fmt: skip
        body = {
            "rid": request_id, "input_ids": list(prompt_ids), "sampling_params": sampling, "return_logprob": True,
            "return_routed_experts": routing, "stream": False,
        }  # fmt: skip
        return Call("/generate", body)

    def answer(self, content: Any) -> Answer:
        """See `Dialect`."""
        about = content["meta_info"]
        pairs = about["output_token_logprobs"]
        ids = [int(pair[1]) for pair in pairs]
        if int(about.get("completion_tokens", len(ids))) != len(ids):
            raise EngineError(f"{about['completion_tokens']} tokens with {len(ids)} log-probabilities")
        encoded = about.get("routed_experts")
        routing = None if encoded is None else _int32(encoded)
        return Answer(
            ids, [float(pair[0]) for pair in pairs], about["finish_reason"]["type"], routing,
            about.get("weight_version"), about.get("id"),
        )  # fmt: skip

    def abort(self, request_id: str) -> Call | None:
        """See `Dialect`."""
        return Call("/abort_request", {"rid": request_id}, is_json=False)

    def weight_version(self) -> Call | None:
        """See `Dialect`: every answer has it."""
        return None

    def pause(self) -> list[Call]:
        """See `Dialect`."""
        return [Call("/pause_generation", {"mode": "abort"})]

    def load_folder(self, folder: str, version: str) -> list[Call]:
        """See `Dialect`."""
        return [
            Call("/update_weights_from_disk", {"model_path": folder, "flush_cache": True, "weight_version": version})
        ]

    def load_tensors(self, named: Sequence[tuple[str, Tensor]], version: str, last: bool) -> list[Call]:
        """See `Dialect`."""
        payload = handles(named, reduced=False)
        body = {"serialized_named_tensors": [payload], "flush_cache": last, "weight_version": version}
        return [Call("/update_weights_from_tensor", body)]

    def flush(self, version: str) -> list[Call]:
        """See `Dialect`."""
        return [Call("/flush_cache", {}, is_json=False)]

    def resume(self) -> list[Call]:
        """See `Dialect`."""
        return [Call("/continue_generation", {})]


class VLLM:
    """vLLM's endpoint of tokens, and its endpoints for development."""

    name = "vllm"
    routing_flag = "--enable-return-routed-experts"
    logprobs_flag = "--logprobs-mode processed_logprobs"
    transfers: tuple[WeightTransfer, ...] = ("disk", "none")

    def generate(
        self, prompt_ids: Sequence[int], seed: int, options: SamplingOptions, request_id: str, routing: bool
    ) -> Call:
        """See `Dialect`. Routing is a matter of the server alone."""
        sampling = {
            "n": 1, "max_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
            "top_k": options.top_k, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
            "repetition_penalty": 1.0, "stop_token_ids": list(options.stop_ids), "seed": seed, "logprobs": 0,
            "detokenize": False,
        }  # fmt: skip
        body = {"request_id": request_id, "token_ids": list(prompt_ids), "sampling_params": sampling, "stream": False}
        return Call("/inference/v1/generate", body, flag="--enable-scale-out")

    def answer(self, content: Any) -> Answer:
        """See `Dialect`."""
        choice = content["choices"][0]
        entries = (choice["logprobs"] or {}).get("content") or []
        ids = [int(i) for i in choice["token_ids"]]
        named = [entry["token"] for entry in entries]
        if len(named) == len(ids) and named != [f"token_id:{i}" for i in ids]:
            raise EngineError(f"log-probabilities of {named[:3]} … for tokens {ids[:3]} …")
        encoded, logprobs = choice.get("routed_experts"), [float(entry["logprob"]) for entry in entries]
        # without a request id: the server's answers do not repeat that of the request
        return Answer(ids, logprobs, choice["finish_reason"], None if encoded is None else _npy(encoded))

    def abort(self, request_id: str) -> Call | None:
        """See `Dialect`."""
        return None

    def weight_version(self) -> Call | None:
        """See `Dialect`."""
        return Call("/weight_info", None, "GET", optional=True)

    def pause(self) -> list[Call]:
        """See `Dialect`."""
        return [Call("/pause?mode=wait", {}, flag="VLLM_SERVER_DEV_MODE=1")]

    def load_folder(self, folder: str, version: str) -> list[Call]:
        """See `Dialect`."""
        return [Call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})]

    def load_tensors(self, named: Sequence[tuple[str, Tensor]], version: str, last: bool) -> list[Call]:
        """See `Dialect`; not offered."""
        raise NotImplementedError

    def flush(self, version: str) -> list[Call]:
        """See `Dialect`."""
        named = Call("/update_weight_version", {"new_version": version}, optional=True)
        return [Call("/reset_prefix_cache", {}), named]

    def resume(self) -> list[Call]:
        """See `Dialect`."""
        return [Call("/resume", {})]


class LMDeploy:
    """LMDeploy's API server with the PyTorch backend. Its log-probabilities are those before temperature, its samples
    have no seeds, and it has no versions of weights."""

    name = "lmdeploy"
    routing_flag = "--enable-return-routed-experts, without --distributed-executor-backend ray"
    logprobs_flag = "--logprobs-mode raw_logprobs"
    transfers: tuple[WeightTransfer, ...] = ("tensor", "none")

    def generate(
        self, prompt_ids: Sequence[int], seed: int, options: SamplingOptions, request_id: str, routing: bool
    ) -> Call:
        """See `Dialect`."""
        body = {
            "input_ids": list(prompt_ids), "max_tokens": options.max_new_tokens, "temperature": options.temperature,
            "top_p": options.top_p, "top_k": options.top_k, "min_p": 0.0, "repetition_penalty": 1.0,
            "stop_token_ids": list(options.stop_ids), "include_stop_str_in_output": True,
            "skip_special_tokens": False, "return_logprob": True, "return_routed_experts": routing, "stream": False,
        }  # fmt: skip
        return Call("/generate", body)

    def answer(self, content: Any) -> Answer:
        """See `Dialect`."""
        about = content["meta_info"]
        pairs = about["output_token_logprobs"] or []
        ids = [int(i) for i in content["output_ids"]]
        if len(pairs) == len(ids) and [int(pair[1]) for pair in pairs] != ids:
            raise EngineError(f"log-probabilities of {[pair[1] for pair in pairs[:3]]} … for tokens {ids[:3]} …")
        routing = about.get("routed_experts")
        if isinstance(routing, str):
            raise EngineError(
                f"routing is the key {routing!r} of a store in Ray, which only processes of that Ray cluster can read: "
                f"start it with {self.routing_flag}"
            )
        finish = (about["finish_reason"] or {}).get("type", "none")
        return Answer(
            ids, [float(pair[0]) for pair in pairs], finish, None if routing is None else torch.tensor(routing)
        )

    def abort(self, request_id: str) -> Call | None:
        """See `Dialect`."""
        return None

    def weight_version(self) -> Call | None:
        """See `Dialect`: it has none."""
        return None

    def pause(self) -> list[Call]:
        """See `Dialect`: it gives back the cache, and takes the memory of weights again."""
        return [Call("/sleep?level=2&tags=weights&tags=kv_cache", {}), Call("/wakeup?tags=weights", {})]

    def load_folder(self, folder: str, version: str) -> list[Call]:
        """See `Dialect`; not offered."""
        raise NotImplementedError

    def load_tensors(self, named: Sequence[tuple[str, Tensor]], version: str, last: bool) -> list[Call]:
        """See `Dialect`."""
        return [Call("/update_weights", {"serialized_named_tensors": handles(named, reduced=True), "finished": last})]

    def flush(self, version: str) -> list[Call]:
        """See `Dialect`: the cache was given back by `pause`."""
        return []

    def resume(self) -> list[Call]:
        """See `Dialect`."""
        return [Call("/wakeup?tags=kv_cache", {})]


DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (SGLang(), VLLM(), LMDeploy())}
"""By the name of the backend."""


def succeeded(content: Any) -> bool:
    """Whether an answer to a step of an update says so; one that says nothing does."""
    return not (isinstance(content, Mapping) and content.get("success") is False)


def _int32(encoded: str) -> Tensor:
    data = _bytes(encoded)
    if len(data) % 4:
        raise EngineError(f"routing of {len(data)} bytes, which are no int32 numbers")
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").copy())


def _npy(encoded: str) -> Tensor:
    try:
        array = np.load(io.BytesIO(_bytes(encoded)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise EngineError(f"routing is no array of numpy: {error}") from None
    return torch.from_numpy(array.astype(np.int32))


def _bytes(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise EngineError(f"routing is not base64: {error}") from None
