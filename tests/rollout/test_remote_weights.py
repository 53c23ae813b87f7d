"""Weights of remote engines: what servers load, in which order, what they are told, and what happens if they fail."""

import base64
import math
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from distributed_harness import run_ranks
from huggingface_folders import CONFIG
from lit_interns1.checkpoints.huggingface import exported_tensors
from lit_interns1.models import LanguageModel
from lit_interns1.rollout import EngineError, GenerationRequest, SamplingOptions
from lit_interns1.rollout.remote import RemoteEngine, dialects, gpu_handles
from recorded_rollouts import SeededEngine
from rollout_servers import GENERATE, FakeServer, fixture

OPTIONS = SamplingOptions(max_new_tokens=9)
REQUESTS = [GenerationRequest((11, 12, 13), (101, 102)), GenerationRequest((21,), (201, 202))]
SOURCE = SeededEngine()
LOADS = {"sglang": "/update_weights_from_disk", "vllm": "/collective_rpc"}


@pytest.fixture
def policy():
    return LanguageModel.create(CONFIG, seed=4)


def connected(servers, policy, folder, **options):
    options = {"weights_folder": str(folder), "backoff": 0.01, "request_timeout": 20.0, **options}
    remote = RemoteEngine(servers[0].backend, [server.url for server in servers], **options)
    remote.connect(policy, True)
    return remote


def changed(policy, step):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * step)


def right(samples, version):
    for request, group in zip(REQUESTS, samples, strict=True):
        for seed, sample in zip(request.seeds, group, strict=True):
            assert sample.response_ids == SOURCE.sample(request.prompt_ids, seed).response_ids
            assert set(sample.weight_versions.tolist()) == {version}
    return True


def updates(server):
    """Paths of requests that are neither samples nor questions."""
    rest = (GENERATE[server.backend], "/health", "/weight_info", "/abort_request")
    return [path for path in server.paths() if path not in rest]


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_servers_load_what_the_policy_has_in_order_and_with_a_version(backend, policy, tmp_path):
    with FakeServer(backend) as first, FakeServer(backend) as second:
        remote = connected([first, second], policy, tmp_path)
        assert remote.capabilities.copies_weights
        stream = iter([])
        for version in (3, 7):
            changed(policy, version)
            remote.sync_weights(stream, version)
            remote.sync_weights(stream, version)  # nothing happens
            for server in (first, second):
                config, tensors = server.loaded
                assert config["model_type"] == "qwen3_moe"
                assert tensors.keys() == dict(exported_tensors(policy)).keys()
                assert all(torch.equal(tensors[name], t) for name, t in exported_tensors(policy))
                assert (server.version, server.paused) == (str(version), False)
            assert right(remote.generate(REQUESTS, OPTIONS), version)
            assert len(list(tmp_path.iterdir())) == 1  # the folder before is gone
        assert updates(first) == updates(second) == 2 * fixture(backend)["update"]
        with pytest.raises(EngineError, match="weights of version 6 cannot follow 7"):
            remote.sync_weights(stream, 6)
        load = next(body for path, _, body in first.calls if path == LOADS[backend])
        assert str(tmp_path) in str(load)
        if backend == "sglang":
            assert load["flush_cache"] is True
    assert remote.weight_version == 7


def test_a_run_that_starts_again_at_the_same_version_overwrites_nothing(policy, tmp_path):
    with FakeServer("sglang") as server:
        for _ in range(2):
            connected([server], policy, tmp_path).sync_weights([], 5)
    assert len(list(tmp_path.glob("version-5-*"))) == 2


@pytest.mark.parametrize(
    ("backend", "path", "answer"),
    [
        ("sglang", "/update_weights_from_disk", (400, {"success": False, "message": "no such file"})),
        ("sglang", "/update_weights_from_disk", (200, {"success": False, "message": "no such file"})),
        ("sglang", "/flush_cache", (400, "Cache not flushed.")), ("vllm", "/collective_rpc", (500, {"error": "CUDA"})),
        ("vllm", "/reset_prefix_cache", (200, {"success": False})), ("sglang", "/pause_generation", (404, "Not Found")),
    ],
)  # fmt: skip
def test_a_server_that_misses_an_update_answers_nothing_until_it_has_one(
    backend, path, answer, policy, tmp_path, caplog
):
    with FakeServer(backend) as bad, FakeServer(backend) as good:
        remote = connected([bad, good], policy, tmp_path, retries=1)
        remote.sync_weights([], 1)
        bad.broken[path] = answer
        remote.sync_weights([], 2)
        assert remote.up_to_date == [good.url]
        assert f"{bad.url} has not got the new weights and is left out" in caplog.text
        step = fixture(backend)["update"].index(path)
        assert [p for p in updates(bad) if p != path][len(fixture(backend)["update"]) - 1 :] == (
            fixture(backend)["update"][:step]  # later steps are not made: it stays paused
        )
        asked = len(bad.given)
        assert right(remote.generate(REQUESTS, OPTIONS), 2)
        assert len(bad.given) == asked
        del bad.broken[path]
        remote.sync_weights([], 3)
        assert remote.up_to_date == [bad.url, good.url]
        bad.broken[path] = good.broken[path] = answer
        with pytest.raises(EngineError, match=path):
            remote.sync_weights([], 4)
        assert remote.weight_version == 3


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_a_server_that_was_started_anew_has_old_weights_and_is_not_used(backend, policy, tmp_path):
    with FakeServer(backend) as anew, FakeServer(backend) as kept:
        remote = connected([anew, kept], policy, tmp_path)
        remote.sync_weights([], 1)
        anew.version = "default"
        taken = len(kept.given)
        assert right(remote.generate(REQUESTS, OPTIONS), 1)
        assert len(kept.given) == taken + 4  # all of them
        kept.version = "somebody's"
        with pytest.raises(EngineError, match=r"(no server has weights of version 1|weights of version .*, not '1').*"):
            remote.generate(REQUESTS, OPTIONS)
        remote.sync_weights([], 2)
        assert right(remote.generate(REQUESTS, OPTIONS), 2)


def test_old_servers_without_versions_are_taken_at_their_word(policy, tmp_path):
    with FakeServer("vllm", missing=("/weight_info", "/update_weight_version")) as server:
        remote = connected([server], policy, tmp_path)
        remote.sync_weights([], 1)
        assert right(remote.generate(REQUESTS, OPTIONS), 1)
    with FakeServer("vllm", missing=("/pause",)) as server:
        remote = connected([server], policy, tmp_path)
        with pytest.raises(EngineError, match=r"/pause: HTTP 404.*start it with VLLM_SERVER_DEV_MODE=1"):
            remote.sync_weights([], 1)


def test_weights_that_cannot_be_written_are_an_error_of_the_engine(policy, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with FakeServer("sglang") as server:
        remote = connected([server], policy, tmp_path, weights_layout="llama")
        with pytest.raises(EngineError, match=r"version 1 cannot be written: .*llama"):
            remote.sync_weights([], 1)
        with pytest.raises(EngineError, match="connect"):
            RemoteEngine("sglang", server.url, weights_folder=str(tmp_path)).sync_weights([], 1)


# -- through the memory of a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sglang", "lmdeploy"])
def test_tensors_of_a_gpu_go_in_buckets(backend, policy, tmp_path, monkeypatch):
    """There is no GPU here: handles are names, the order and the messages are what is seen."""
    monkeypatch.setattr(dialects, "handles", lambda named, reduced: f"{reduced}:" + ",".join(n for n, _ in named))
    stream = dict(exported_tensors(policy))
    size = 3 * max(t.nbytes for t in stream.values())
    with FakeServer(backend) as server:
        remote = connected([server], policy, None, weights_folder=None, weight_transfer="tensor", bucket_bytes=size)
        remote.sync_weights(iter(stream.items()), 4)
        path = "/update_weights" if backend == "lmdeploy" else "/update_weights_from_tensor"
        bodies = [body for called, _, body in server.calls if called == path]
        sent = [body["serialized_named_tensors"] for body in bodies]
        sent = [one if backend == "lmdeploy" else one[0] for one in sent]
        assert {one.partition(":")[0] for one in sent} == {str(backend == "lmdeploy")}
        names = [one.partition(":")[2].split(",") for one in sent]
        assert [name for bucket in names for name in bucket] == list(stream)
        assert all(sum(stream[name].nbytes for name in bucket) <= size for bucket in names)
        last = [body["finished" if backend == "lmdeploy" else "flush_cache"] for body in bodies]
        assert last == [False] * (len(bodies) - 1) + [True]
        order = list(dict.fromkeys(updates(server)))
        if backend == "lmdeploy":
            assert order == ["/sleep", "/wakeup", "/update_weights"]
            assert updates(server)[-1] == "/wakeup"
            queries = [query for called, query, _ in server.calls if called in ("/sleep", "/wakeup")]
            assert queries == [
                {"level": ["2"], "tags": ["weights", "kv_cache"]},
                {"tags": ["weights"]},
                {"tags": ["kv_cache"]},
            ]
        else:
            assert order == ["/pause_generation", path, "/flush_cache", "/continue_generation"]
        samples = remote.generate(REQUESTS, OPTIONS)
        assert {v for group in samples for s in group for v in s.weight_versions.tolist()} == ({4})


def test_tensors_that_are_not_on_a_gpu_are_refused(policy):
    with FakeServer("lmdeploy") as server:
        remote = connected([server], policy, None, weights_folder=None, weight_transfer="tensor")
        with pytest.raises(EngineError, match=r"shares the memory of a GPU .* is on cpu: train on that GPU"):
            remote.sync_weights(exported_tensors(policy), 1)


def test_handles_are_what_the_servers_unpickle():
    """Pairs of a function and its arguments that give the tensor back, as LMDeploy calls them."""
    tensor = torch.arange(6.0).reshape(2, 3)
    text = gpu_handles.pickled([("w", gpu_handles.reduce_tensor(tensor))])
    ((name, (function, arguments)),) = ForkingPickler.loads(base64.b64decode(text))
    assert name == "w"
    assert torch.equal(function(*arguments), tensor)


# -- ranks -------------------------------------------------------------------------------------------------------------


def on_ranks(rank, world, url, folder):
    """A divided policy: folders of the whole, samples of each rank's own requests, errors of rank 0 everywhere."""
    from pathlib import Path

    from lit_interns1.nn.initialization import materialize
    from lit_interns1.strategies.parallel_dims import ParallelDims
    from lit_interns1.strategies.parallelize import parallelize

    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    dims = ParallelDims(world, expert_parallel_size=2)
    parallelize(model, model.parallel_plan(), dims.build_meshes("cpu"), dims)
    materialize(model, "cpu", seed=4, std=CONFIG.initializer_range)
    remote = RemoteEngine("sglang", url, weights_folder=folder, backoff=0.01, retries=1, request_timeout=20.0)
    remote.connect(model, True)
    remote.sync_weights(iter(()), 1)
    found = {}
    requests = [GenerationRequest((30 + rank,), (rank, 10 + rank))] * (1 + rank)
    found["samples"] = [[s.response_ids for s in group] for group in remote.generate(requests, OPTIONS)]
    found["folders"] = len(list(Path(folder).iterdir()))
    remote.servers[0] = type(remote.servers[0])("http://127.0.0.1:9")  # nobody is there
    try:
        remote.sync_weights(iter(()), 2)
    except EngineError as error:
        found["error"] = str(error)
    return found


def test_ranks_write_together_and_generate_alone(policy, tmp_path):
    with FakeServer("sglang") as server:
        results = run_ranks(on_ranks, 2, server.url, str(tmp_path))
        _, tensors = server.loaded
        assert all(torch.equal(tensors[name], t) for name, t in exported_tensors(policy))
        assert updates(server) == fixture("sglang")["update"]  # rank 0 alone tells
    for rank, found in enumerate(results):
        wanted = [[SOURCE.sample((30 + rank,), seed).response_ids for seed in (rank, 10 + rank)]] * (1 + rank)
        assert found["samples"] == wanted
        assert found["folders"] == 1
        assert "http://127.0.0.1:9/pause_generation" in found["error"]


def test_probabilities_of_the_fake_sum_to_one():
    with FakeServer("sglang") as server:
        assert math.exp(server.logprob(1.0)) < math.exp(server.logprob(0.25)) < 1
