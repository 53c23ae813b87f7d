"""Remote engines against servers that speak the three dialects: samples, log-probabilities, routing, failures."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from huggingface_folders import CONFIG
from lit_interns1.models import LanguageModel
from lit_interns1.rollout import EngineError, GenerationRequest, RolloutEngine, SamplingOptions
from lit_interns1.rollout.remote import RemoteEngine
from recorded_rollouts import SeededEngine
from rollout_servers import BACKENDS, GENERATE, FakeServer

OPTIONS = SamplingOptions(max_new_tokens=9, stop_ids=(2,))
REQUESTS = [
    GenerationRequest((11, 12, 13), (101, 102, 103)),
    GenerationRequest((21,), (201, 202)),
    GenerationRequest((31, 32), (301,)),
]
SOURCE = SeededEngine()
PASSING = ("500", "drop", "garbage", "late", "abort")


@pytest.fixture(scope="module")
def policy():
    return LanguageModel.create(CONFIG, seed=4)


def engine(servers, backend=None, **options):
    servers = servers if isinstance(servers, list) else [servers]
    options = {"weight_transfer": "none", "backoff": 0.01, "request_timeout": 20.0, **options}
    return RemoteEngine(backend or servers[0].backend, [server.url for server in servers], **options)


def connected(servers, policy, needs_routing=True, **options):
    remote = engine(servers, **options)
    remote.connect(policy, needs_routing)
    return remote


def right(samples, requests=REQUESTS, version=0):
    """Whether they are those that the seeds give, each in its place."""
    for request, group in zip(requests, samples, strict=True):
        assert len(group) == len(request.seeds)
        for seed, sample in zip(request.seeds, group, strict=True):
            wanted = SOURCE.sample(request.prompt_ids, seed)
            assert sample.prompt_ids == request.prompt_ids
            assert sample.response_ids == wanted.response_ids
            assert torch.equal(sample.logprobs, wanted.logprobs)
            assert torch.equal(sample.routed_experts, wanted.routed_experts)
            assert (sample.seed, sample.finish_reason) == (seed, wanted.finish_reason)
            assert sample.weight_versions.tolist() == [version] * len(wanted.response_ids)
    return True


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_samples_are_those_of_the_seeds(backend, policy):
    with FakeServer(backend) as first, FakeServer(backend) as second:
        remote = connected([first, second], policy)
        assert isinstance(remote, RolloutEngine)
        capabilities = remote.capabilities
        assert (capabilities.logprobs, capabilities.routed_experts, capabilities.concurrent) == ("sampling", True, True)
        assert right(remote.generate(REQUESTS, OPTIONS))
        counts = [server.paths().count(GENERATE[backend]) - 2 for server in (first, second)]
        assert sum(counts) == 6
        assert min(counts) == 3  # in turn
        assert remote.generate([], OPTIONS) == []


def test_lmdeploy_draws_seeds_of_its_own(policy):
    with FakeServer("lmdeploy") as server:
        remote = connected(server, policy)
        assert remote.capabilities.logprobs == "raw"
        samples = remote.generate(REQUESTS, OPTIONS)
        body = server.calls[-1][2]
    got = Counter((s.prompt_ids, tuple(s.response_ids)) for group in samples for s in group)
    assert got == Counter(server.given[2:])  # behind the two of the probe
    assert body["include_stop_str_in_output"] is True  # else the last token and its routing are cut
    assert all(len(s.routed_experts) == len(s.prompt_ids) + len(s.response_ids) - 1 for g in samples for s in g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_say_everything_that_decides_a_sample(backend, policy):
    options = SamplingOptions(max_new_tokens=9, temperature=1.0, stop_ids=(2, 5))
    with FakeServer(backend) as server:
        connected(server, policy).generate([GenerationRequest((4, 5), (2**62,))], options)
        body = server.calls[-1][2]
    sampling = body if backend == "lmdeploy" else body["sampling_params"]
    seeds = {"sglang": "sampling_seed", "vllm": "seed"}
    assert sampling.get(seeds.get(backend)) == (2**62 if backend in seeds else None)
    assert sampling["max_new_tokens" if backend == "sglang" else "max_tokens"] == 9
    assert sampling["top_k"] == (-1 if backend == "sglang" else 0)  # all tokens
    wanted = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2, 5]}
    assert {name: sampling[name] for name in wanted} == wanted  # whatever generation_config.json of the server says


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_of_all_layers_is_cut_to_the_sparse_ones(backend, policy):
    config = replace(CONFIG, num_layers=3, dense_layers=(1,), intermediate_size=24)
    model = LanguageModel.create(config, seed=1)
    with FakeServer(backend, layers=(3, [0, 2])) as server:
        remote = connected(server, model)
        (sample,) = remote.generate([GenerationRequest((4, 5), (77,))], OPTIONS)[0]
        _, ids = server.given[-1]
    expected = SOURCE.sample((4, 5), 77 if backend != "lmdeploy" else 10_001)
    assert tuple(sample.response_ids) == ids == tuple(expected.response_ids)
    assert torch.equal(sample.routed_experts, expected.routed_experts)


def test_without_routing_nothing_is_asked_and_nothing_is_kept(policy):
    with FakeServer("sglang", routing=False) as server:
        remote = connected(server, policy, needs_routing=False)
        samples = remote.generate(REQUESTS, OPTIONS)
        assert server.calls[-1][2]["return_routed_experts"] is False
    assert all(sample.routed_experts is None for group in samples for sample in group)


# -- what servers must give --------------------------------------------------------------------------------------------

FLAGS = {
    "sglang": "--enable-return-routed-experts", "vllm": "--enable-return-routed-experts",
    "lmdeploy": "--enable-return-routed-experts, without --distributed-executor-backend ray",
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no_routing", "it has no routing"), ("zero_routing", "routing is all zero"),
        ("short_routing", "for 3 tokens; wanted"), ("wild_routing", "the policy has 0 … 7"),
    ],
)  # fmt: skip
def test_a_server_without_good_routing_is_refused_before_anything_is_generated(backend, fault, told, policy):
    with FakeServer(backend) as server:
        server.faults.put(fault)
        with pytest.raises(EngineError, match=told) as error:
            connected(server, policy)
        assert f"start it with {FLAGS[backend]}" in str(error.value)
        assert server.url in str(error.value)
        assert server.paths().count(GENERATE[backend]) == 1  # not tried again: it would be the same


def test_a_key_of_a_store_in_ray_is_no_routing(policy):
    with (
        FakeServer("lmdeploy", store=True) as server,
        pytest.raises(EngineError, match=r"key 'b6f0e7' of a store in Ray"),
    ):
        connected(server, policy)


def test_servers_that_lack_an_endpoint_name_its_flag(policy):
    with FakeServer("vllm", missing=("/inference/v1/generate",)) as server:
        with pytest.raises(EngineError, match=r"404.*start it with --enable-scale-out"):
            connected(server, policy)
        assert server.paths().count("/inference/v1/generate") == 1


def test_what_is_no_policy_and_a_dense_one_that_needs_routing(policy):
    with FakeServer("sglang") as server:
        with pytest.raises(EngineError, match="needs a LanguageModel as policy, got Linear"):
            engine(server).connect(torch.nn.Linear(2, 2), False)
        dense = LanguageModel.create(replace(CONFIG, moe=None, intermediate_size=24), seed=1)
        with pytest.raises(EngineError, match="no MoE layers"):
            engine(server).connect(dense, True)
        with pytest.raises(EngineError, match="connect"):
            engine(server).generate(REQUESTS, OPTIONS)


# -- log-probabilities -------------------------------------------------------------------------------------------------

NUCLEUS, FEW, COLD = (replace(OPTIONS, **o) for o in ({"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7}))


@pytest.mark.parametrize(
    ("backend", "kind", "refused", "taken"),
    [
        ("sglang", "tempered", [NUCLEUS, FEW], [COLD]), ("sglang", "raw", [NUCLEUS, FEW, COLD], []),
        ("vllm", "drawn", [], [NUCLEUS, FEW, COLD]), ("vllm", "raw", [NUCLEUS, FEW, COLD], []),
        ("lmdeploy", "raw", [NUCLEUS, FEW, COLD], []),
    ],
)  # fmt: skip
def test_only_log_probabilities_of_the_distribution_that_is_drawn_from(backend, kind, refused, taken, policy):
    with FakeServer(backend, kind=kind) as server:
        remote, lenient = (connected(server, policy, other_logprobs=other) for other in ("refuse", "omit"))
        before = len(server.calls)
        for options in refused:
            with pytest.raises(EngineError, match=r"(top_p = 0.9|top_k = 5|temperature = 0.7).*from before") as error:
                remote.generate(REQUESTS, options)
            assert remote.dialect.logprobs_flag in str(error.value)
            assert len(server.calls) == before
        for options in refused:
            (sample,) = lenient.generate([GenerationRequest((5,), (1,))], options)[0]
            assert sample.logprobs.isnan().all()
        for options in [*taken, OPTIONS]:
            (sample,) = remote.generate([GenerationRequest((5,), (1,))], options)[0]
            assert not sample.logprobs.isnan().any()
        (greedy,) = remote.generate([GenerationRequest((5,), (1,))], replace(OPTIONS, temperature=0.0))[0]
        assert greedy.logprobs.isnan().all()


def test_raw_logits_are_no_log_probabilities(policy):
    with (
        FakeServer("lmdeploy", kind="logits") as server,
        pytest.raises(EngineError, match="--logprobs-mode raw_logprobs"),
    ):
        connected(server, policy)


def test_servers_of_different_modes_are_refused(policy):
    with FakeServer("vllm") as one, FakeServer("vllm", kind="raw") as other:
        told = f"{one.url}: drawn, {other.url}: raw.*processed_logprobs"
        with pytest.raises(EngineError, match=told):
            connected([one, other], policy)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "fault"),
    [*((backend, fault) for backend in ("sglang", "vllm") for fault in PASSING), ("sglang", "foreign")],
)
def test_what_passes_is_tried_again_and_no_sample_is_lost_or_doubled(backend, fault, policy):
    with FakeServer(backend) as server:
        remote = connected(server, policy, request_timeout=0.5 if fault == "late" else 20.0)
        for _ in range(2):
            server.faults.put(fault)
        assert right(remote.generate(REQUESTS, OPTIONS))
        tries = [b for path, _, b in server.calls if path == GENERATE[backend]][2:]
        assert len(tries) == 6 + 2
        names = [body["rid" if backend == "sglang" else "request_id"] for body in tries]
        assert len(set(names)) == len(names)  # a server would refuse the id of a request that it still works on
        if backend == "sglang" and fault in ("late", "drop"):
            dropped = [body["rid"] for path, _, body in server.calls if path == "/abort_request"]
            assert len(dropped) == 2
            assert set(dropped) <= set(names)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("count", "log-probabilities"), ("short_routing", "routing of shape"), ("no_routing", "no routing"),
        ("form", "has not the form of"), ("400", "HTTP 400.*the server says 400"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_at_once(backend, fault, told, policy):
    with FakeServer(backend) as server:
        remote = connected(server, policy, concurrency=1)
        server.faults.put(fault)
        with pytest.raises(EngineError, match=told) as error:
            remote.generate(REQUESTS, OPTIONS)
        assert server.url in str(error.value)
        assert server.paths().count(GENERATE[backend]) - 2 == 1  # never tried again
        got = remote.generate(REQUESTS, OPTIONS)  # it goes on
        assert backend == "lmdeploy" or right(got)


def test_failures_that_do_not_pass_end_after_the_last_attempt(policy):
    with FakeServer("sglang") as server:
        remote = connected(server, policy, retries=2, concurrency=1)
        for _ in range(3):
            server.faults.put("500")
        with pytest.raises(EngineError, match=r"3 attempts failed, the last one with: .*HTTP 500.*the server says 500"):
            remote.generate(REQUESTS[2:], OPTIONS)
        assert right(remote.generate(REQUESTS, OPTIONS))
    with pytest.raises(EngineError, match=r"3 attempts.*ConnectionRefused|Connection refused"):
        remote.generate(REQUESTS, OPTIONS)
    with pytest.raises(EngineError, match="/health"):
        connected(server, policy, retries=1)


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_a_server_that_dies_in_the_middle_leaves_its_samples_to_the_others(backend, policy):
    requests = [GenerationRequest((i,), (10 * i, 10 * i + 1)) for i in range(11, 23)]
    with FakeServer(backend) as dying, FakeServer(backend) as healthy:
        remote = connected([dying, healthy], policy, concurrency=4)
        answered, sample = [], dying.sample

        def dies(prompt, sampling):
            answered.append(prompt)
            if len(answered) == 3:
                dying.server.shutdown()
                dying.server.server_close()
            if len(answered) >= 3:
                raise ConnectionResetError  # the thread that answers ends without a word
            return sample(prompt, sampling)

        dying.sample = dies
        assert right(remote.generate(requests, OPTIONS), requests)
        assert len(answered) >= 3
        assert len(healthy.given) - 2 >= 24 - 2
        assert right(remote.generate(requests[:3], OPTIONS), requests[:3])


def test_a_dead_server_that_is_back_is_used_again(policy):
    with FakeServer("sglang") as server:
        remote = connected(server, policy, retries=0)
        port = server.port
    with pytest.raises(EngineError, match="1 attempts failed"):
        remote.generate(REQUESTS, OPTIONS)
    with FakeServer("sglang", port=port):
        assert right(remote.generate(REQUESTS, OPTIONS))


def test_errors_of_a_malformed_answer_do_not_leave_requests_behind(policy):
    """One sample is wrong while others wait: the call ends at once, the waiting ones are dropped."""
    with FakeServer("sglang") as server:
        remote = connected(server, policy)
        server.hold.add((21,))
        server.faults.put("form")
        with pytest.raises(EngineError, match="form"):
            remote.generate([REQUESTS[1], REQUESTS[0]], OPTIONS)
        assert not server.overslept
        server.release.set()


# -- enough ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_enough_finished_requests_end_the_others(backend, policy):
    with FakeServer(backend) as server:
        remote = connected(server, policy)
        server.hold |= {(21,)}  # never answered before the call returns
        first, second, third = remote.generate(REQUESTS, OPTIONS, enough=2)
        assert [sample.finish_reason for sample in second] == ["abort", "abort"]
        assert not server.overslept  # the call has not waited for them
        assert all(s.response_ids == [] and s.seed in REQUESTS[1].seeds for s in second)
        assert all(sample.finish_reason == "stop" for sample in [*first, *third])
        if backend == "sglang":
            waited = [b["rid"] for path, _, b in server.calls if path == "/generate" and b["input_ids"] == [21]]
            assert sorted(b["rid"] for path, _, b in server.calls if path == "/abort_request") == sorted(waited)
        server.release.set()
        server.hold.clear()
        got = remote.generate(REQUESTS, OPTIONS)
        assert backend == "lmdeploy" or right(got)
        assert remote.generate(REQUESTS, OPTIONS, enough=0)[0][0].finish_reason == "abort"


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "tgi"}, "backend = 'tgi' must be one of sglang, vllm, lmdeploy"),
        ({"urls": []}, "at least one server"), ({"urls": ["localhost:30000"]}, "must look like http://host:port"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "name a server twice"), ({"retries": -1}, "retries = -1 must be at"),
        ({"request_timeout": 0}, "request_timeout = 0 must be positive"), ({"concurrency": 0}, "concurrency = 0"),
        ({"backoff": -1.0}, "backoff = -1.0"), ({"other_logprobs": "guess"}, "other_logprobs = 'guess'"),
        ({"weight_transfer": "nccl"}, "weight_transfer = 'nccl' must be one of disk, tensor, none"),
        ({"weight_transfer": "disk"}, "weights_folder = None with weight_transfer = 'disk'"),
        ({"weights_folder": "x"}, "weights_folder = 'x' with weight_transfer = 'none'"),
        ({"backend": "vllm", "weight_transfer": "tensor"}, "needs vLLM's own package .*'disk' or 'none'"),
        ({"backend": "lmdeploy", "weight_transfer": "disk"}, "needs an endpoint that loads a folder"),
        ({"weights_layout": "nobody"}, "weights_layout = 'nobody'"), ({"bucket_bytes": 0}, "bucket_bytes = 0"),
    ],
)  # fmt: skip
def test_options_out_of_range(options, told):
    given = {"backend": "sglang", "urls": ["http://127.0.0.1:1"], "weight_transfer": "none", **options}
    with pytest.raises(ValueError, match=told):
        RemoteEngine(**given)


def test_logprobs_of_the_fake_are_a_distribution():
    with FakeServer("sglang") as server:
        assert math.isclose(server.logprob(1.0), 2 - math.log(math.exp(2) + math.exp(0.5) + 1 + math.exp(-1)))
