"""Servers on this machine that speak as SGLang, vLLM and LMDeploy do, as far as `rollout/fixtures` says, and may fail.

A server knows the fields of every request and refuses others, has a state (paused, version, folder that was loaded),
and draws from the seed of a request by a `SeededEngine`, so that a test knows what must arrive.
"""

import base64
import io
import json
import math
import queue
import threading
from contextlib import suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from recorded_rollouts import SeededEngine

FIXTURES = Path(__file__).parent / "rollout" / "fixtures"
BACKENDS = ("sglang", "vllm", "lmdeploy")
GENERATE = {"sglang": "/generate", "vllm": "/inference/v1/generate", "lmdeploy": "/generate"}
LOGITS = [2.0, 0.5, 0.0, -1.0]
"""Of the token that is drawn when nothing but the most probable one may be, and of three others."""
KINDS = {"sglang": "tempered", "vllm": "drawn", "lmdeploy": "raw"}
"""Distribution of the log-probabilities of a server that is started as its page says."""


def fixture(backend):
    return json.loads((FIXTURES / f"{backend}.json").read_text())


class FakeServer:
    """One server in threads of this process.

    `faults` are taken one per request for samples, in order; `hold` keeps samples of the prompts that it names from
    being answered until `release` is set.
    """

    def __init__(
        self, backend, engine=None, *, routing=True, kind=None, version="default", layers=None, store=False,
        missing=(), port=0,
    ):  # fmt: skip
        self.backend, self.engine = backend, engine or SeededEngine()
        self.routing, self.kind, self.layers, self.store = routing, kind or KINDS[backend], layers, store
        self.version, self.missing = version, missing
        self.fixture = fixture(backend)
        self.calls, self.given, self.faults = [], [], queue.Queue()
        self.paused, self.loaded, self.hold, self.release = False, None, set(), threading.Event()
        self.overslept = 0
        """Requests that were held until nobody released them."""
        self.broken, self._drawn, self._lock = {}, 0, threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """As a process that is killed: nothing answers any more."""
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def paths(self):
        return [path for path, _, _ in self.calls]

    def _handler(fake):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                address = urlsplit(self.path)
                with suppress(BrokenPipeError, ConnectionResetError):
                    status, answer = fake.answer(
                        address.path, parse_qs(address.query), json.loads(body) if body else None
                    )
                    self.reply(status, answer)

            do_GET = do_POST = handle_any

            def reply(self, status, answer):
                if status is None:  # the connection breaks
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else b""
                self.send_response(status)
                if not isinstance(answer, (str, bytes)):
                    data = json.dumps(answer).encode()
                    self.send_header("Content-Type", "application/json")
                elif isinstance(answer, str):
                    data = answer.encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        return Handler

    # -- what it says --------------------------------------------------------------------------------------------------

    def answer(self, path, query, body):
        with self._lock:
            self.calls.append((path, query, body))
        if path in self.missing or (path not in self.fixture["answers"]):
            return 404, {"detail": "Not Found"}
        known = self.fixture["request_fields"].get(path)
        if known is not None and (unknown := set(body or {}) - set(known)):
            return 400, {"error": {"message": f"unknown fields {sorted(unknown)}"}}
        if path in self.broken:
            return self.broken[path]
        answer = deepcopy(self.fixture["answers"][path])
        if path == GENERATE[self.backend]:
            return self.generate(body, answer)
        return 200, self.control(path, query, body, answer)

    def control(self, path, query, body, answer):
        if path in ("/pause_generation", "/pause", "/sleep"):
            self.paused = True
        elif path in ("/continue_generation", "/resume") or (path == "/wakeup" and query["tags"] == ["kv_cache"]):
            self.paused = False
        elif path == "/update_weights_from_disk":
            assert self.paused
            self.loaded, self.version = read_folder(body["model_path"]), body["weight_version"]
        elif path == "/update_weights_from_tensor":
            assert self.paused
            self.version = body["weight_version"]
        elif path == "/collective_rpc":
            assert self.paused
            assert body["method"] == "reload_weights"
            self.loaded = read_folder(body["kwargs"]["weights_path"])
        elif path == "/update_weight_version":
            self.version = answer["new_version"] = body["new_version"]
        elif path == "/weight_info":
            answer["weight_version"] = self.version
        return answer

    def generate(self, body, answer):
        sampling = body if self.backend == "lmdeploy" else body["sampling_params"]
        known = self.fixture["request_fields"].get(f"{GENERATE[self.backend]}:sampling_params")
        if known is not None and set(sampling) - set(known):
            return 400, {"error": {"message": f"unknown fields {sorted(set(sampling) - set(known))}"}}
        prompt = tuple(body["token_ids"] if self.backend == "vllm" else body["input_ids"])
        if self.paused:
            return 503, {"error": "paused"}
        if prompt in self.hold:
            self.overslept += not self.release.wait(8)
        fault = None if self.faults.empty() else self.faults.get()
        if fault == "drop":
            return None, None
        if fault == "late":
            self.release.wait(30)
        if fault in ("500", "400"):
            return int(fault), {"error": {"message": f"the server says {fault}"}}
        if fault == "garbage":
            return 200, b'{"text": "hal'
        if fault == "form":
            return 200, {"unexpected": 1}
        sample = self.sample(prompt, sampling)
        with self._lock:
            self.given.append((prompt, tuple(sample.response_ids)))
        return 200, self.filled(answer, body, sample, fault)

    def sample(self, prompt, sampling):
        if sampling["top_p"] <= 1e-3:
            sample = self.engine.sample(prompt, 0)
            sample.response_ids = [7]
            sample.logprobs = [self.logprob(sampling["temperature"])]
            sample.routed_experts = sample.routed_experts[: len(prompt)]
            if len(sample.routed_experts) < len(prompt):
                raise AssertionError("seed 0 must give routing for the whole prompt")
            return sample
        with self._lock:  # LMDeploy draws seeds of its own
            self._drawn += 1
            seed = {"sglang": sampling.get("sampling_seed"), "vllm": sampling.get("seed")}.get(
                self.backend, 10_000 + self._drawn
            )
        sample = self.engine.sample(prompt, seed)
        sample.logprobs = sample.logprobs.tolist()
        return sample

    def logprob(self, temperature):
        if self.kind == "drawn":
            return 0.0
        if self.kind == "logits":
            return LOGITS[0]
        scaled = [z / (temperature if self.kind == "tempered" else 1.0) for z in LOGITS]
        return scaled[0] - math.log(sum(math.exp(z) for z in scaled))

    def filled(self, answer, body, sample, fault):
        ids, logprobs, routing = list(sample.response_ids), list(sample.logprobs), sample.routed_experts
        if fault == "count":
            logprobs = logprobs[:-1]
        if fault == "no_routing" or not self.routing:
            routing = None
        elif fault == "short_routing":
            routing = routing[:-1]
        elif fault == "zero_routing":
            routing = routing * 0
        elif fault == "wild_routing":
            routing = routing + 100
        if routing is not None and self.layers is not None:  # of all layers, dense ones as zeros
            whole = np.zeros((len(routing), self.layers[0], routing.shape[-1]), dtype=np.int32)
            whole[:, self.layers[1]] = routing
            routing = whole
        routing = None if routing is None else np.asarray(routing)
        finish = "abort" if fault == "abort" else sample.finish_reason
        return getattr(self, f"as_{self.backend}")(answer, body, ids, logprobs, routing, finish, fault)

    def as_sglang(self, answer, body, ids, logprobs, routing, finish, fault):
        about = answer["meta_info"]
        answer["output_ids"] = ids
        about |= {
            "id": "another" if fault == "foreign" else body["rid"], "finish_reason": {"type": finish},
            "completion_tokens": len(ids), "prompt_tokens": len(body["input_ids"]),
            "weight_version": "default" if fault == "stale" else self.version,
            "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=False)],
        }  # fmt: skip
        if routing is not None and body["return_routed_experts"]:
            about["routed_experts"] = base64.b64encode(routing.astype("<i4").tobytes()).decode()
        return answer

    def as_vllm(self, answer, body, ids, logprobs, routing, finish, fault):
        content = [
            {"token": f"token_id:{i}", "logprob": p, "top_logprobs": []} for p, i in zip(logprobs, ids, strict=False)
        ]
        choice = answer["choices"][0]
        choice |= {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": finish}
        if routing is not None:
            stream = io.BytesIO()
            np.save(stream, routing.astype(np.uint8))
            choice["routed_experts"] = base64.b64encode(stream.getvalue()).decode()
        return answer

    def as_lmdeploy(self, answer, body, ids, logprobs, routing, finish, fault):
        about = answer["meta_info"]
        answer["output_ids"] = ids
        about |= {
            "finish_reason": {"type": finish}, "completion_tokens": len(ids), "prompt_tokens": len(body["input_ids"]),
            "output_token_logprobs": [[p, i] for p, i in zip(logprobs, ids, strict=False)],
        }  # fmt: skip
        if routing is not None and body["return_routed_experts"]:
            about["routed_experts"] = "b6f0e7" if self.store else routing.tolist()
        return answer


def read_folder(folder):
    """Tensors and config of a Hugging Face folder, as a server reads them."""
    from safetensors.torch import load_file

    folder = Path(folder)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors
