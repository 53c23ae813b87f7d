"""How samples become micro-batches, and the loader that hands them out."""

import pytest
import torch

from lit_interns1.rollout.plan import EMPTY_SLOT, RolloutPlan, blank_document, deal, documents_of, micro_batches
from lit_interns1.rollout.rollout_loader import ReadyRollout, RolloutLoader
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions, sample_seeds


def document(slot, length, seed=0):
    generator = torch.Generator().manual_seed(seed * 1000 + slot)
    ids = torch.randint(3, 50, (length,), generator=generator)
    labels = torch.where(torch.arange(length) < 2, -100, ids.roll(-1))
    return {
        "input_ids": ids, "labels": labels, "response_mask": labels >= 0,
        "rollout_logprobs": torch.randn(length, generator=generator), "sample_slot": torch.full((length,), slot),
        "group_id": torch.full((length,), slot // 2),
        "routed_experts": torch.randint(0, 4, (length, 2, 2), generator=generator).to(torch.int16),
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_prompt_and_slot_belongs_to_one_rank_and_step(ranks):
    plan = RolloutPlan(16, 3, updates_per_rollout=2, samples_per_micro_batch=2, data_parallel_size=ranks)
    places = [p for rank in range(ranks) for update in plan.places(rank) for p in update]
    assert sorted(places) == list(range(16))
    slots = [[s for rank in range(ranks) for s in plan.slots(update, rank)] for update in range(2)]
    assert slots == [list(range(24)), list(range(24, 48))]  # the same samples per step on any number of ranks
    assert plan.accumulation * plan.samples_per_micro_batch * ranks * 2 == plan.samples_per_rollout == 48
    for rank in range(ranks):
        for update in range(2):
            groups = {slot // 3 for slot in plan.slots(update, rank)}
            assert groups == set(plan.places(rank)[update])  # whole groups


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 4, 2, 2, 1), "prompts_per_rollout = 3 must be divisible by updates_per_rollout × ranks = 2 × 1"),
        ((4, 4, 1, 3, 1), "samples_per_micro_batch = 3 must divide the 16 samples"),
        ((4, 0, 1, 1, 1), "num_generations must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        RolloutPlan(*sizes)


def test_dealing_is_even_and_complete():
    lengths = [9, 1, 1, 8, 2, 7, 3, 3]
    bins = deal(lengths, 4, 2)
    assert sorted(i for b in bins for i in b) == list(range(8))
    assert [len(b) for b in bins] == [2, 2, 2, 2]
    assert max(sum(lengths[i] for i in b) for b in bins) == 10  # 9 + 1: no deal does better
    assert deal([5] * 6, 3, 2) == deal([5] * 6, 3, 2)


def test_documents_come_back_from_micro_batches():
    plan = RolloutPlan(4, 2, 1, samples_per_micro_batch=2)
    documents = [document(slot, 4 + 3 * (slot % 3)) for slot in range(7)]  # one place stays empty
    batches = micro_batches(documents, plan, documents[0])
    assert [len(batch.cu_seqlens) - 1 for batch in batches] == [2] * 4
    assert sum(batch.num_tokens for batch in batches) == sum(len(d["input_ids"]) for d in documents)
    back = documents_of(batches)
    assert len(back) == 7
    for mine, theirs in zip(documents, back, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    empty = [b for b in batches if bool((b.token_fields["sample_slot"] == EMPTY_SLOT).any())]
    assert len(empty) == 1
    outside = empty[0].token_fields["sample_slot"] == EMPTY_SLOT
    assert (empty[0].labels[outside] == -100).all()
    assert (empty[0].sample_id_T[outside] == -1).all()
    assert (empty[0].token_fields["routed_experts"][outside] == -1).all()
    assert not empty[0].token_fields["response_mask"][outside].any()


def test_a_rank_without_samples_still_has_micro_batches():
    batches = micro_batches([], RolloutPlan(2, 2, 1, samples_per_micro_batch=2), blank_document((2, 2)))
    assert len(batches) == 2
    assert all(batch.num_tokens == 0 and batch.num_loss_tokens == 0 for batch in batches)
    assert batches[0].token_fields.keys() == blank_document((2, 2)).keys() - {"input_ids", "labels"}
    with pytest.raises(ValueError, match="5 samples for the 4 places"):
        micro_batches([document(s, 4) for s in range(5)], RolloutPlan(2, 2, 1, 2), document(0, 4))


def loader(plan, made, rank=0, rollouts=3, **identity):
    def make(number):
        made.append(number)
        updates = [
            micro_batches(
                [document(s, 4 + (s * 7 + number) % 5, number) for s in plan.slots(u, rank)], plan, document(0, 4)
            )
            for u in range(plan.updates_per_rollout)
        ]
        return ReadyRollout(number, updates)

    return RolloutLoader(make, plan, rollouts, rank, identity)


def content(batch):
    return [(int(d["sample_slot"][0]), d["input_ids"].tolist()) for d in documents_of([batch])]


def test_each_rollout_is_made_once_and_just_before_its_first_micro_batch():
    plan, made = RolloutPlan(4, 2, 2, samples_per_micro_batch=2), []
    training = loader(plan, made)
    assert len(training) == 3 * 4
    counts = [len(made) for _ in training]
    assert counts == [1] * 4 + [2] * 4 + [3] * 4
    assert made == [0, 1, 2]
    assert len(list(training)) == 12  # the next epoch
    assert made == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_in_the_middle_of_a_rollout(ranks, monkeypatch):
    """Saved after the first of two steps, on one rank; continued on one and on two, without generating again."""
    plan, made = RolloutPlan(4, 2, 2, samples_per_micro_batch=2), []
    training = loader(plan, made)
    batches = iter(training)
    for _ in range(6):  # rollout 0, and the first step of rollout 1
        next(batches)
    state, rollout = training.state_dict(), training.rollout_state()
    assert rollout["number"] == 1
    rest = [content(batch) for batch in batches]

    found = {}
    for rank in range(ranks):
        again = []
        resumed = loader(RolloutPlan(4, 2, 2, 2, data_parallel_size=ranks), again, rank)
        resumed.load_state_dict(state)
        resumed.load_rollout(rollout)
        found[rank] = [content(batch) for batch in resumed]
        assert again == [2]
    want = sorted(pair for batch in rest[:2] for pair in batch)
    have = sorted(pair for rank in found for batch in found[rank][: 2 // ranks] for pair in batch)
    assert have == want
    if ranks == 1:
        assert found[0] == rest


def test_a_state_of_other_prompts_or_inside_a_step_is_refused():
    plan = RolloutPlan(4, 2, 2, samples_per_micro_batch=2)
    training = loader(plan, [], seed=3)
    state = training.state_dict()
    with pytest.raises(ValueError, match="seed: 3 in the checkpoint, 4 now"):
        loader(plan, [], seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="inside an optimizer step"):
        training.load_state_dict({**state, "rows": 2})


def test_samples_check_their_parts_and_become_documents():
    sample = Sample((5, 6, 7), [8, 9], torch.tensor([-1.0, -2.0]), "stop", 0, torch.tensor([3, 3]))
    document = sample.document(pad_routing=(2, 2))
    assert document["input_ids"].tolist() == [5, 6, 7, 8]
    assert document["labels"].tolist() == [-100, -100, 8, 9]
    assert document["response_mask"].tolist() == [False, False, True, True]
    assert document["rollout_logprobs"][2:].tolist() == [-1.0, -2.0]
    assert document["rollout_logprobs"][:2].isnan().all()
    assert document["weight_versions"].tolist() == [-1, -1, 3, 3]
    assert document["routed_experts"].shape == (4, 2, 2)
    with pytest.raises(ValueError, match=r"logprobs \(1,\) for 2 response tokens"):
        Sample((5,), [8, 9], torch.tensor([-1.0]), "stop", 0, torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"routed_experts \(4, 2, 2\) for 2 tokens"):
        Sample((5,), [8, 9], torch.zeros(2), "stop", 0, torch.zeros(2).long(), torch.zeros(4, 2, 2).to(torch.int16))
    with pytest.raises(ValueError, match="at least one token"):
        GenerationRequest((), (1,))
    with pytest.raises(ValueError, match="top_p must lie in"):
        SamplingOptions(top_p=0.0)


def test_seeds_are_distinct_over_prompts_and_rollouts():
    seeds = [s for rollout in range(20) for place in range(30) for s in sample_seeds(7, rollout, place, 16)]
    assert len(set(seeds)) == len(seeds)
    assert sample_seeds(7, 0, 0, 2) != sample_seeds(8, 0, 0, 2)
