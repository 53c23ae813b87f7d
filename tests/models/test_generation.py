import pytest
import torch

from lit_interns1.models import LanguageModel, generate, preset
from lit_interns1.models.sampling import draw, sampling_log_probs

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(preset("tiny-s1-pro", vocab_size=50, num_layers=2, initializer_range=0.3))


def test_log_probs_and_routing_are_those_of_a_forward_pass(model):
    out = generate(model, PROMPTS, max_new_tokens=12, temperature=0.7, seed=3, record_routing=True)
    for prompt, tokens, log_probs, routed in zip(
        PROMPTS, out.token_ids, out.log_probs, out.routed_experts, strict=True
    ):
        whole = torch.tensor(prompt + tokens)
        with torch.no_grad():
            output = model(whole[:-1], targets=whole[1:], temperature=0.7, record_routing=True)
        torch.testing.assert_close(log_probs, output.scores.logp_T[len(prompt) - 1 :], atol=2e-5, rtol=1e-4)
        assert torch.equal(routed, output.routing.stacked())


def test_text_depends_on_seed_and_index_and_not_on_the_batch(model):
    together = generate(model, PROMPTS, max_new_tokens=15, seed=1)
    assert together.token_ids == generate(model, PROMPTS, max_new_tokens=15, seed=1).token_ids
    assert together.token_ids != generate(model, PROMPTS, max_new_tokens=15, seed=2).token_ids
    assert generate(model, PROMPTS[:1], max_new_tokens=15, seed=1).token_ids[0] == together.token_ids[0]


def test_stop_tokens_end_sequences_one_by_one(model):
    free = generate(model, PROMPTS, max_new_tokens=20, seed=5)
    stop = free.token_ids[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=20, seed=5, stop_ids=[stop])
    for before, after, finished in zip(free.token_ids, stopped.token_ids, stopped.finished, strict=True):
        length = before.index(stop) + 1 if stop in before else 20
        assert after == before[:length]
        assert finished == (stop in before)
    assert len(stopped.token_ids[0]) <= 5
    assert [len(x) for x in stopped.log_probs] == [len(x) for x in stopped.token_ids]


def test_embeddings_in_place_of_ids(model):
    ids = generate(model, PROMPTS, max_new_tokens=6, temperature=0.0)
    embeds = [model.embed_tokens(torch.tensor(prompt)).detach() for prompt in PROMPTS]
    assert generate(model, prompt_embeds=embeds, max_new_tokens=6, temperature=0.0).token_ids == ids.token_ids


def test_nucleus_keeps_the_smallest_set_and_renormalises():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in (
        (0.45, [1.0]),
        (0.6, [5 / 8, 3 / 8]),
        (0.95, [10 / 19, 6 / 19, 3 / 19]),
        (1.0, [0.5, 0.3, 0.15, 0.05]),
    ):
        probabilities = sampling_log_probs(logits, 1.0, top_p).exp()[0]
        torch.testing.assert_close(probabilities, torch.tensor(kept + [0.0] * (4 - len(kept))))
    hot = sampling_log_probs(logits, 2.0, 1.0).exp()[0]
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    torch.testing.assert_close(hot, expected / expected.sum())


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
    count = 20000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(probabilities.log().expand(count, 5), uniforms)
    share = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(share, probabilities, atol=0.012, rtol=0)
    assert share[1] == share[4] == 0
    edges = torch.tensor([0.0, 1.0 - 1e-17], dtype=torch.float64)
    assert draw(probabilities.log().expand(2, 5), edges).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "every prompt needs at least one token"),
        ({"prompts": [[1]], "temperature": -1}, "temperature must not be negative"),
        ({"prompts": [[1]], "top_p": 0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"prompts": [[1]], "top_k": -1}, r"top_k must not be negative \(0 = all tokens\), got -1"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({}, "give either prompts or prompt_embeds"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **options)


def test_prompts_that_occur_again_keep_their_places(model):
    mixed = generate(model, [[1, 2], [4], [1, 2]], max_new_tokens=8, seed=1).token_ids
    for prompt, places in (([1, 2], (0, 2)), ([4], (1,))):
        alone = generate(model, [prompt] * 3, max_new_tokens=8, seed=1).token_ids
        assert [mixed[i] for i in places] == [alone[i] for i in places]


def test_top_k_draws_among_the_best(model):
    assert (
        generate(model, PROMPTS, max_new_tokens=8, temperature=3.0, top_k=1).token_ids
        == generate(model, PROMPTS, max_new_tokens=8, temperature=0.0).token_ids
    )


def test_samples_of_one_prompt_differ(model):
    out = generate(model, [[1, 2]] * 4, max_new_tokens=15, seed=1)
    assert len({tuple(tokens) for tokens in out.token_ids}) == 4
