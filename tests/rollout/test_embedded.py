"""The engine that generates with the trained network: against transformers, the network's own packed forward pass,
exact probabilities, and itself on other batches and on several ranks."""

import itertools
import math

import pytest
import torch

from distributed_harness import run_ranks
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig, decode_loop, preset
from lit_interns1.rollout import EmbeddedEngine, EngineError, GenerationRequest, RolloutEngine, SamplingOptions
from sharded_training import environment

PRO = {"vocab_size": 50, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "initializer_range": 0.1}
REQUESTS = [
    GenerationRequest((1, 2, 3), (5, 6, 7, 8)),
    GenerationRequest((4,), (1, 2)),
    GenerationRequest(tuple(range(20)), (9, 10, 11)),
    GenerationRequest((7, 7), (2**62 + 5,)),
]
SAMPLED = SamplingOptions(max_new_tokens=14, temperature=0.8, stop_ids=(3, 17))


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(preset("tiny-s1-pro", **PRO))


def engine(model, needs_routing=True, **options):
    made = EmbeddedEngine(**options)
    made.connect(model, needs_routing)
    return made


def tokens(groups):
    return [[sample.response_ids for sample in group] for group in groups]


def flat(groups):
    return [sample for group in groups for sample in group]


def packed_scores(model, samples, temperature, **options):
    """What the trainer computes: the samples packed into one row."""
    documents = [sample.document() for sample in samples]
    batch = PackedBatch.from_documents(documents, row_length=sum(len(d["input_ids"]) for d in documents))
    with torch.no_grad():
        return batch, model(
            batch.input_ids.flatten(), position_ids=batch.position_ids.flatten(), cu_seqlens=batch.cu_seqlens,
            targets=batch.labels.flatten(), temperature=temperature, record_routing=True, **options,
        )  # fmt: skip


def test_greedy_tokens_equal_transformers():
    transformers = pytest.importorskip("transformers")
    from reference_weights import load_reference_weights

    torch.manual_seed(0)
    reference = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, num_experts=8, num_experts_per_tok=2,
            moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        )
    ).eval()  # fmt: skip
    config = LanguageModelConfig(
        vocab_size=97, hidden_size=48, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16,
        moe=MoEConfig(8, 2, 24), positions=PositionConfig(theta=1e4, max_position_embeddings=64),
    )  # fmt: skip
    model = LanguageModel.create(config)
    load_reference_weights(model, dict(reference.state_dict()))
    prompts = [(5, 6, 7, 8, 9, 10, 11), (1, 2, 3), (40,), (90, 3, 90, 3), (12, 13)]
    stop = 8
    expected = [
        reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16, do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    assert len({len(reply) for reply in expected}) > 1  # the stop token is met
    options = SamplingOptions(max_new_tokens=16, temperature=0.0, stop_ids=(stop,))
    found = engine(model, max_batch_size=2).generate([GenerationRequest(p, (0,)) for p in prompts], options)
    assert [sample.response_ids for (sample,) in found] == expected


def test_greedy_tokens_equal_full_forward_passes(model):
    found = engine(model, max_batch_size=3).generate(REQUESTS, SamplingOptions(max_new_tokens=8, temperature=0.0))
    for request, samples in zip(REQUESTS, found, strict=True):
        ids = list(request.prompt_ids)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor(ids)).logits[-1].argmax()))
        assert [sample.response_ids for sample in samples] == [ids[len(request.prompt_ids) :]] * len(request.seeds)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_finds_the_same_log_probs_and_experts(model, temperature, noise):
    options = SamplingOptions(max_new_tokens=14, temperature=temperature)
    samples = flat(engine(model, max_batch_size=4, router_noise=noise).generate(REQUESTS, options))
    routing = torch.cat([sample.routed_experts for sample in samples])
    batch, replayed = packed_scores(model, samples, temperature, routed_experts_TLK=routing)
    assert torch.equal(replayed.routing.stacked(), routing)
    _, live = packed_scores(model, samples, temperature)
    mask, rollout = batch.token_fields["response_mask"], batch.token_fields["rollout_logprobs"]
    difference = (live.scores.logp_T - rollout)[mask].abs().max()
    if noise:
        assert difference > 1e-2
        assert (live.routing.stacked() != routing).any()
    else:
        assert difference < 1e-5
        assert (replayed.scores.logp_T - rollout)[mask].abs().max() < 1e-5
        assert torch.equal(live.routing.stacked(), routing)


def test_samples_do_not_depend_on_what_is_generated_beside_them(model, monkeypatch):
    for noise, alternatives in (
        (0.0, [{"max_batch_size": 1}, {"max_batch_size": 3}, {"group_prefill": False}, {"max_cache_tokens": 70}]),
        (0.5, [{"max_batch_size": 3, "group_prefill": False}]),
    ):
        expected = engine(model, router_noise=noise).generate(REQUESTS, SAMPLED)
        assert len({len(sample.response_ids) for sample in flat(expected)}) > 2
        for options in alternatives:
            if "max_cache_tokens" in options:  # prompts come one by one
                monkeypatch.setattr(decode_loop, "PREFILL_TOKENS", 4)
            order = [2, 3, 1, 0] if "max_batch_size" in options else [0, 1, 2, 3]
            found = engine(model, router_noise=noise, **options).generate([REQUESTS[i] for i in order], SAMPLED)
            for samples, wanted in zip(found, [expected[i] for i in order], strict=True):
                for sample, other in zip(samples, wanted, strict=True):
                    assert sample.response_ids == other.response_ids
                    assert sample.finish_reason == other.finish_reason
                    assert sample.seed == other.seed
                    assert torch.equal(sample.routed_experts, other.routed_experts)
                    torch.testing.assert_close(sample.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_a_sample_that_waits_takes_the_slot_of_another_prompt(model):
    options = SamplingOptions(max_new_tokens=3)  # all that began together end together
    order = [1, 0, 2]
    expected = engine(model).generate([REQUESTS[i] for i in order], options)
    found = engine(model, max_batch_size=3).generate([REQUESTS[i] for i in order], options)
    assert tokens(found) == tokens(expected)
    for sample, other in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(sample.logprobs, other.logprobs, atol=1e-5, rtol=0)
        assert torch.equal(sample.routed_experts, other.routed_experts)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"top_p": 0.8, "top_k": 4, "temperature": 1.5}],
    ids=str,
)
def test_pairs_of_tokens_have_their_exact_probabilities(options):
    model = LanguageModel.create(preset("tiny-s1", vocab_size=6, num_layers=1, initializer_range=0.4))
    count, prompt = 3000, (1, 4, 2)

    def exact(ids):
        """The formula, token by token, in float64."""
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits[-1].double()
        logits = logits / options.get("temperature", 1.0)
        ordered = logits.sort(descending=True).indices.tolist()[: options.get("top_k", 6)]
        mass = logits[ordered].softmax(0).tolist()
        kept = [t for n, t in enumerate(ordered) if sum(mass[:n]) < options.get("top_p", 1.0)]
        return dict(zip(kept, logits[kept].softmax(0).tolist(), strict=True))

    first = exact(prompt)
    pairs = {(a, b): p * q for a, p in first.items() for b, q in exact((*prompt, a)).items()}
    assert math.isclose(sum(pairs.values()), 1.0)
    request = GenerationRequest(prompt, tuple(range(count)))
    (samples,) = engine(model, max_batch_size=1000).generate([request], SamplingOptions(max_new_tokens=2, **options))
    found = dict.fromkeys(itertools.product(range(6), repeat=2), 0)
    for sample in samples:
        found[tuple(sample.response_ids)] += 1
    assert all(number == 0 for pair, number in found.items() if pair not in pairs)
    chi_square = sum((found[pair] - count * p) ** 2 / (count * p) for pair, p in pairs.items())
    freedom = len(pairs) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    for sample in samples[:200]:
        a, b = sample.response_ids
        wanted = torch.tensor([first[a], pairs[a, b] / first[a]]).log()
        torch.testing.assert_close(sample.logprobs, wanted, atol=2e-5, rtol=0)


def test_how_samples_end(model):
    made = engine(model, max_batch_size=3)
    made.sync_weights(iter(()), 7)
    reports = []
    made.progress = reports.append
    model.layers[0].eval()  # one part that is not in the mode of the others
    model.layers[1].train()
    found = made.generate(REQUESTS, SAMPLED)
    assert not model.layers[0].mlp.training
    assert model.layers[1].mlp.training
    assert {sample.finish_reason for sample in flat(found)} == {"stop", "length"}
    for sample in flat(found):
        stopped = sample.response_ids[-1] in SAMPLED.stop_ids
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.response_ids) == SAMPLED.max_new_tokens
        assert not set(sample.response_ids[:-1]) & set(SAMPLED.stop_ids)
        assert sample.weight_versions.tolist() == [7] * len(sample.response_ids)
        assert not sample.logprobs.requires_grad
    assert reports[-1].finished == reports[-1].samples == 10
    assert reports[-1].new_tokens == sum(len(sample.response_ids) for sample in flat(found))
    with pytest.raises(EngineError, match="version 6 cannot follow version 7"):
        made.sync_weights(iter(()), 6)


def test_enough_requests_end_the_call(model):
    whole = engine(model).generate(REQUESTS, SAMPLED)
    found = engine(model, max_batch_size=2).generate(REQUESTS, SAMPLED, enough=1)
    assert [sample.finish_reason for sample in found[0]] == [sample.finish_reason for sample in whole[0]]
    others = flat(found[1:])
    assert "abort" in {sample.finish_reason for sample in others}
    for sample, other in zip(flat(found), flat(whole), strict=True):
        length = len(sample.response_ids)
        assert sample.response_ids == other.response_ids[:length]
        assert len(sample.logprobs) == length
        if length:
            assert torch.equal(sample.routed_experts, other.routed_experts[: len(sample.routed_experts)])
        assert (sample.finish_reason == "abort") == (length < len(other.response_ids))


def test_no_requests_and_prompts_without_room(model, caplog):
    made = engine(model, max_cache_tokens=30)
    assert made.generate([], SAMPLED) == []
    requests = [GenerationRequest((1,) * length, (0, 1)) for length in (31, 30, 25, 2)]
    found = made.generate(requests, SamplingOptions(max_new_tokens=10))
    ends = [[(sample.finish_reason, len(sample.response_ids)) for sample in group] for group in found]
    assert ends == [[("abort", 0)] * 2, [("length", 1)] * 2, [("length", 6)] * 2, [("length", 10)] * 2]
    assert "a prompt of 31 tokens leaves no room" in caplog.text
    assert flat(found)[0].document((2, 4))["routed_experts"].eq(-1).all()
    found = engine(model).generate([GenerationRequest((1,) * 509, (0,))], SamplingOptions(max_new_tokens=10))
    assert len(found[0][0].response_ids) == 3  # max_position_embeddings is 512


def test_what_can_be_connected_and_recorded(model):
    assert isinstance(EmbeddedEngine(), RolloutEngine)
    request, options = [GenerationRequest((1, 2), (0,))], SamplingOptions(max_new_tokens=3)
    assert engine(model, needs_routing=False).generate(request, options)[0][0].routed_experts is None
    assert engine(model, False, record_routing=True).generate(request, options)[0][0].routed_experts.shape == (4, 2, 4)
    dense = LanguageModel.create(preset("tiny-s1-mini", vocab_size=50, num_layers=1))
    assert engine(dense).generate(request, options)[0][0].routed_experts is None
    with pytest.raises(EngineError, match="the module needs routing: set record_routing"):
        engine(model, record_routing=False)
    with pytest.raises(EngineError, match=r"LanguageModel or a MultimodalModel, got Linear"):
        engine(torch.nn.Linear(2, 2))
    closed = engine(model)
    closed.close()
    with pytest.raises(EngineError, match="connect"):
        closed.generate(request, options)
    for wrong, message in (
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_cache_tokens": 0}, "max_cache_tokens must be at least 1, got 0"),
        ({"router_noise": -1.0}, "router_noise must not be negative"),
        ({"record_routing": "yes"}, "record_routing must be true, false or 'auto', got 'yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddedEngine(**wrong)


def test_a_multimodal_policy_continues_text():
    from lit_interns1.models import MultimodalModel, multimodal_preset
    from lit_interns1.nn.initialization import initialize_parameters

    whole = MultimodalModel(multimodal_preset("tiny-s1-pro"))
    initialize_parameters(whole, std=0.1)
    found = engine(whole).generate(REQUESTS, SAMPLED)
    assert tokens(found) == tokens(engine(whole.language_model).generate(REQUESTS, SAMPLED))


def test_generated_tokens_are_in_no_statistic_of_routers(model):
    counts = []
    hook = model.register_forward_hook(
        lambda module, args, output: counts.extend(float(stats.counts_E.sum()) for stats in output.router_stats)
    )
    try:
        engine(model).generate(REQUESTS[:1], SamplingOptions(max_new_tokens=3))
        assert counts == [0.0] * 6  # 3 passes, 2 layers
        model(torch.arange(5))
        assert counts[6:] == [20.0] * 2
    finally:
        hook.remove()


def test_an_error_leaves_the_model_as_it_was(model):
    def fail(progress):
        raise KeyboardInterrupt

    model.train()
    made = engine(model, router_noise=1.0, progress=fail)
    with pytest.raises(KeyboardInterrupt):
        made.generate(REQUESTS, SAMPLED)
    assert all(module.training for module in model.modules())
    assert all("decide" not in vars(layer.router) for layer in model.moe_layers)


def test_router_noise_is_standard_normal_and_belongs_to_the_token():
    from lit_interns1.models.sampling import random_bits
    from lit_interns1.rollout.router_noise import RouterNoise

    keys = random_bits(torch.arange(4000), torch.tensor(0))
    logits = torch.zeros(4000, 8)

    def draw(key_T, seed, layer):
        noise = RouterNoise([], 1.0, seed)
        noise.on_tokens(key_T)
        return noise._normal(logits[: len(key_T)], layer).double()

    values = draw(keys, 1, 0)
    assert values.mean().abs() < 4 / math.sqrt(values.numel())
    assert (values.var() - 1).abs() < 4 * math.sqrt(2 / values.numel())
    assert (values**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / values.numel()))
    for other in (draw(keys, 2, 0), draw(keys, 1, 1), values.roll(1, 0), values.roll(1, 1)):
        assert (values * other).mean().abs() < 4 / math.sqrt(values.numel())
    assert torch.equal(draw(keys[7:9], 1, 0), values[7:9])


# -- several ranks -----------------------------------------------------------------------------------------------------

DIVIDED = [("tiny-s1-pro", {"tie_word_embeddings": True}), ("tiny-s1", {})]
ENGINES = [{}, {"keep_unsharded": True, "router_noise": 0.5}]
SPLITS = [([0, 1], [2, 3]), ([], [3])]


def divided_samples(rank, world):
    """Samples of this rank's requests, by model, options and split of the requests."""
    from torch.distributed.tensor import DTensor

    from lit_interns1.strategies import MoEParallelStrategy, ParallelDims

    environment(rank, world)
    results = {}
    for number, (name, changes) in enumerate(DIVIDED):
        holder = torch.nn.Module()
        holder.model = model = LanguageModel.create(preset(name, **PRO, **changes))
        dims = ParallelDims(world, "auto", 1, 2)
        MoEParallelStrategy(expert_parallel_size=2).divide(holder, dims.build_meshes("cpu"), dims)
        for options in ENGINES:
            made = engine(model, max_batch_size=3, **options)
            for split in SPLITS:
                found = made.generate([REQUESTS[i] for i in split[rank]], SAMPLED)
                results[number, str(options), str(split)] = [
                    (sample.response_ids, sample.logprobs, sample.routed_experts) for sample in flat(found)
                ]
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert made.generate([], SAMPLED) == []
        # ranks that have enough wait for the others
        found = made.generate([REQUESTS[i] for i in SPLITS[0][rank]], SAMPLED, enough=1 if rank == 0 else None)
        whole = [group for group in found if all(sample.finish_reason != "abort" for sample in group)]
        assert len(whole) >= 1 + rank
        # the network trains on, and its units give their parameters back after forward again
        with torch.no_grad():
            model(torch.arange(20))
        assert isinstance(model.layers[0].self_attn.q_proj.weight, DTensor)
        model.train()
        loss = model(torch.arange(20), targets=torch.arange(1, 21)).scores.logp_T.sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()
    return results


def test_ranks_that_share_a_network_give_the_samples_of_one_process():
    ranks = run_ranks(divided_samples, 2)
    for number, (name, changes) in enumerate(DIVIDED):
        model = LanguageModel.create(preset(name, **PRO, **changes))
        for options in ENGINES:
            expected = engine(model, router_noise=options.get("router_noise", 0.0)).generate(REQUESTS, SAMPLED)
            for split in SPLITS:
                for rank in range(2):
                    found = ranks[rank][number, str(options), str(split)]
                    wanted = flat([expected[i] for i in split[rank]])
                    assert [ids for ids, _, _ in found] == [sample.response_ids for sample in wanted]
                    for (_, logprobs, routing), sample in zip(found, wanted, strict=True):
                        torch.testing.assert_close(logprobs, sample.logprobs, atol=1e-5, rtol=0)
                        assert torch.equal(routing, sample.routed_experts)
