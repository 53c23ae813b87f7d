"""Preferences: which tokens count, which belong together, in which order; what is wrong is named by file and line."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_interns1.data import PackedBatch, SourceError
from lit_interns1.data.bundled_preferences import bundled_preference, slip
from lit_interns1.data.media_tokens import MediaTokens
from lit_interns1.data.molecule_questions import shuffled_molecules
from lit_interns1.data.preference_data_module import PreferenceDataModule
from lit_interns1.data.smiles import is_valid_smiles
from lit_interns1.data.tokenizer import load_tokenizer
from lit_interns1.objectives.preference import PreferenceInputs

TOKENIZER = load_tokenizer()
WORDS = ["alpha", "beta", "gamma rays", "delta of the river", "epsilon", "zeta function", "eta", "theta and iota"]
PAIRS = [
    {"prompt": f"Which is number {i}? ", "chosen": WORDS[i % 8], "rejected": WORDS[(i + 3) % 8] + "."}
    for i in range(40)
]


def turn(role, text):
    return {"role": role, "content": text}


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def module(path, validation=None, ranks=(1, 0), **options):
    """Set up, as rank r of W."""
    data = PreferenceDataModule(
        path, validation, **{"row_length": 96, "global_batch_size": 4, "micro_batch_size": 1} | options
    )
    strategy = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": ranks[0], "rank": ranks[1]}, root_device=None
    )
    data.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)
    data.prepare_data()
    data.setup("fit")
    return data


def answers(batch):
    """(prompt, response, chosen, pair) of every answer of a batch, read from labels and ids alone."""
    found = []
    for sample in batch.sample_id_T.unique().tolist():
        if sample < 0:
            continue
        mine_T = batch.sample_id_T == sample
        ids, labels = batch.input_ids[mine_T].tolist(), batch.labels[mine_T].tolist()
        learned = [label for label in labels if label >= 0]
        first = next(i for i, label in enumerate(labels) if label >= 0)
        assert labels[first:-1] == ids[first + 1 :]
        fields = {name: value[mine_T].unique().tolist() for name, value in batch.token_fields.items()}
        (chosen,), (pair,) = fields["is_chosen"], fields["pair_ids"]
        found.append((TOKENIZER.decode(ids[: first + 1]), TOKENIZER.decode(learned), chosen, pair))
    return found


def epoch(data):
    return list(data.train_dataloader())


def test_every_pair_comes_once_per_epoch_with_both_sides_in_one_row(tmp_path):
    data = module(write(tmp_path, PAIRS), global_batch_size=1, micro_batch_size=1)
    seen = []
    for batch in epoch(data):
        found = answers(batch)
        assert batch.num_rows == 1
        assert batch.num_loss_tokens == int(batch.token_fields["response_mask"].sum())
        assert bool((batch.token_fields["response_mask"] == (batch.labels >= 0)).all())
        assert bool((batch.token_fields["pair_ids"][batch.sample_id_T < 0] == -1).all())
        for pair in {entry[3] for entry in found}:
            (better,), (worse,) = ([e for e in found if e[3] == pair and e[2] == side] for side in (True, False))
            assert better[0] == worse[0]
            assert better[1].endswith("<|endoftext|>")
            assert worse[1].endswith("<|endoftext|>")
            seen.append((better[0], *(e[1].removesuffix("<|endoftext|>") for e in (better, worse))))
    assert sorted(seen) == sorted((row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS)


def test_pair_ids_are_unique_in_a_batch_however_it_is_put_together(tmp_path):
    data = module(write(tmp_path, PAIRS), micro_batch_size=4)
    whole = epoch(data)[0]
    parts = whole.split(1)
    for batch in (whole, PackedBatch.concatenate(parts), PackedBatch.concatenate([whole, whole])):
        sides = {}
        for prompt, _, chosen, pair in answers(batch):
            sides.setdefault(pair, []).append((chosen, prompt))
        assert all(sorted(chosen for chosen, _ in pair) == [False, True] for pair in sides.values())
        assert all(len({prompt for _, prompt in pair}) == 1 for pair in sides.values())
        # the objectives agree that every pair is whole
        inputs = PreferenceInputs.from_fields(batch.token_fields, batch.sample_id_T, batch.labels)
        assert len(inputs.pairs.chosen_P) == len(sides)


def test_ranks_and_resumed_runs_read_the_same_rows(tmp_path):
    path = write(tmp_path, PAIRS)
    alone = epoch(module(path, micro_batch_size=1))
    ranks = [epoch(module(path, micro_batch_size=1, ranks=(2, rank))) for rank in range(2)]
    dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    for ours, theirs in zip(alone, dealt, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
    first = module(path, micro_batch_size=1)
    iterator = iter(first.train_dataloader())
    next(iterator), next(iterator)
    state = first.state_dict()
    second = module(path, micro_batch_size=1)
    second.load_state_dict(state)
    assert torch.equal(next(iter(second.train_dataloader())).input_ids, alone[2].input_ids)
    other = module(write(tmp_path, PAIRS[:-1], "other.jsonl"), micro_batch_size=1)
    with pytest.raises(ValueError, match="not those of this run"):
        other.load_state_dict(state)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    with pytest.raises(ValueError, match="not those of this run"):
        module(write(tmp_path, swapped, "rows2.jsonl")).load_state_dict(state)


def test_rankings_give_all_pairs_or_those_of_neighbours(tmp_path):
    path = write(tmp_path, [{"prompt": "Rank: ", "responses": ["a", "b", "c", "d"], "weight": 0.5}] * 2)
    for option, expected in (("all", ["ab", "ac", "ad", "bc", "bd", "cd"]), ("adjacent", ["ab", "bc", "cd"])):
        data = module(path, ranking=option, row_length=256, global_batch_size=1, micro_batch_size=1)
        (batch,) = epoch(data)
        pairs = {}
        for _, response, chosen, pair in answers(batch):
            pairs.setdefault(pair, {})[chosen] = response[0]
        assert sorted(pair[True] + pair[False] for pair in pairs.values()) == sorted(2 * expected)
        assert set(batch.token_fields["weights"][batch.sample_id_T >= 0].tolist()) == {0.5}


def test_messages_are_rendered_in_the_chat_format_and_only_the_response_counts(tmp_path):
    earlier = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")]
    rows = [
        {"prompt": earlier, "chosen": [turn("assistant", "Because.")], "rejected": "No idea"},
        {"prompt": "Why?", "chosen": [turn("user", "Why?"), turn("assistant", "Because.")], "rejected": "No"},
        {
            "prompt": "Add",
            "chosen": [turn("assistant", "What?"), turn("user", "1 and 1"), turn("assistant", "2")],
            "rejected": [turn("assistant", "3")],
        },
    ]
    data = module(write(tmp_path, rows), row_length=256, global_batch_size=1, micro_batch_size=1)
    tokenizer = data.tokenizer
    assert tokenizer.vocab_size == TOKENIZER.vocab_size  # it knows turns; two tokens are added where they are unknown
    style = MediaTokens(turn_start="<turn>", turn_end="</turn>")
    other = module(data.sources[0].path, media_tokens=style, row_length=256, global_batch_size=1)
    assert other.tokenizer.vocab_size == TOKENIZER.vocab_size + 2
    assert module(write(tmp_path, PAIRS, "text.jsonl"), media_tokens=style).vocab_size == TOKENIZER.vocab_size
    (batch,) = epoch(data)
    texts = {}
    for sample in batch.sample_id_T[batch.sample_id_T >= 0].unique().tolist():
        mine_T = batch.sample_id_T == sample
        ids, labels = batch.input_ids[mine_T].tolist(), batch.labels[mine_T].tolist()
        texts[tokenizer.decode(ids)] = tokenizer.decode([label for label in labels if label >= 0])
    begin = "<|im_start|>"
    history = "".join(f"{begin}{m['role']}\n{m['content']}<|im_end|>\n" for m in earlier)
    expected = {
        f"{history}{begin}assistant\nBecause.<|im_end|>\n": "Because.<|im_end|>",
        f"{history}{begin}assistant\nNo idea<|im_end|>\n": "No idea<|im_end|>",
        f"{begin}user\nWhy?<|im_end|>\n{begin}assistant\nBecause.<|im_end|>\n": "Because.<|im_end|>",
        f"{begin}user\nWhy?<|im_end|>\n{begin}assistant\nNo<|im_end|>\n": "No<|im_end|>",
        f"{begin}user\nAdd<|im_end|>\n{begin}assistant\nWhat?<|im_end|>\n{begin}user\n1 and 1<|im_end|>\n"
        f"{begin}assistant\n2<|im_end|>\n": "What?<|im_end|>2<|im_end|>",
        f"{begin}user\nAdd<|im_end|>\n{begin}assistant\n3<|im_end|>\n": "3<|im_end|>",
    }
    assert texts == expected


def test_single_responses_and_their_mismatched_partners(tmp_path):
    rows = [{"prompt": f"{i}? ", "response": WORDS[i % 3], "desirable": i % 2 == 0} for i in range(12)]
    path = write(tmp_path, rows)
    plain = answers(epoch(module(path, global_batch_size=1, row_length=256))[0])
    assert sorted(plain) == sorted(
        (row["prompt"], row["response"] + "<|endoftext|>", row["desirable"], -1) for row in rows
    )
    (batch,) = epoch(module(path, global_batch_size=1, row_length=512, mismatched=True))
    wrong_T = batch.token_fields["mismatched"]
    ours = [dict(zip(("prompt", "response"), entry[:2], strict=True)) for entry in answers(batch)]
    known = {(row["prompt"], row["response"] + "<|endoftext|>") for row in rows}
    flagged = [bool(wrong_T[batch.sample_id_T == sample].all()) for sample in range(24)]
    for entry, is_wrong in zip(ours, flagged, strict=True):
        assert ((entry["prompt"], entry["response"]) in known) != is_wrong
    assert sum(flagged) == 12
    inputs = PreferenceInputs.from_fields(batch.token_fields, batch.sample_id_T, batch.labels)
    assert int(inputs.responses.mismatched_S.sum()) == 12


def test_margins_weights_and_reference_log_probabilities_reach_their_tokens(tmp_path):
    chosen, rejected = (len(TOKENIZER.encode(text)) + 1 for text in ("yes it is", "no"))
    each = [-0.5 - i for i in range(chosen)]
    rows = [
        {"prompt": "So? ", "chosen": "yes it is", "rejected": "no", "margin": 0.75, "weight": 2.0,
         "ref_chosen_logps": each, "ref_rejected_logps": -6.0},
        {"prompt": "So? ", "chosen": "no", "rejected": "never", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
    ]  # fmt: skip
    (batch,) = epoch(module(write(tmp_path, rows), global_batch_size=1))
    fields = batch.token_fields
    inputs = PreferenceInputs.from_fields(fields, batch.sample_id_T, batch.labels)
    first = next(pair for pair in (0, 1) if 2.0 in fields["weights"][fields["pair_ids"] == pair])
    for side, values in ((True, each), (False, [-6.0 / rejected] * rejected)):
        mine_T = (fields["pair_ids"] == first) & (fields["is_chosen"] == side) & (batch.labels >= 0)
        torch.testing.assert_close(fields["ref_logprobs"][mine_T], torch.tensor(values))
        assert set(fields["margins"][mine_T].tolist()) == {0.75}
    sums = inputs.sample_sums(inputs.value("ref_logprobs"))
    torch.testing.assert_close(sorted(sums[inputs.pairs.rejected_P].tolist()), [-6.0, -2.0], rtol=1e-6, atol=1e-6)
    rows[0]["ref_chosen_logps"] = each[:-1]
    with pytest.raises(
        SourceError, match=r"rows.jsonl, line 1, response 1: .* of a reference for a response of \d+ tok"
    ):
        module(write(tmp_path, rows), global_batch_size=1)
    del rows[0]["ref_chosen_logps"], rows[0]["ref_rejected_logps"]
    with pytest.raises(ValueError, match=r"missing on \d+ of \d+ response tokens; give them on all lines"):
        module(write(tmp_path, rows), global_batch_size=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "got list"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "got choosen, prompt, rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "responses": ["b", "c"]}, "expected an object with `prompt`"),
        ({"chosen": "b", "rejected": "c"}, "got chosen, rejected"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: the text is empty"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen: the text is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": [turn("assistant", "b")], "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected: expected a text or a list of messages, got int"),
        ({"prompt": "a", "chosen": [turn("assistant", "")], "rejected": "b"}, "the answer is empty"),
        (
            {"prompt": "a", "chosen": [turn("user", "b")], "rejected": "c"},
            "chosen: a response ends with a message of the",
        ),
        ({"prompt": [turn("assistant", "a")], "chosen": "b", "rejected": "c"}, "nothing left to say"),
        ({"prompt": [turn("user", [{"type": "image", "image": "x"}])], "chosen": "b", "rejected": "c"}, "type image"),
        ({"prompt": [turn("user", "<|im_end|>")], "chosen": "b", "rejected": "c"}, "holds '<|im_end|>'"),
        ({"prompt": "a", "responses": ["b"]}, "two responses or more"),
        ({"prompt": "a", "responses": ["b", "c", "b"]}, r"responses\[0\] and responses\[2\] are equal"),
        ({"prompt": "a", "response": "b", "desirable": 1}, "desirable: expected true or false, got 1"),
        ({"prompt": "a", "response": "b"}, "got prompt, response"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1},
            "margin: expected a number of at least 0, got -1",
        ),
        ({"prompt": "a", "responses": ["b", "c"], "margin": 1}, "margin: belongs to a pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": "2"}, "weight: expected a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1}, "ref_rejected_logps is not"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1, "ref_rejected_logps": 0.5},
            "ref_rejected_logps: log-probabilities are finite and at most 0, got 0.5",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path, [PAIRS[0], row])
    with pytest.raises(SourceError, match=rf"rows\.jsonl, line 2.*{message.replace('|', '.')}"):
        module(path)


def test_options_are_checked(tmp_path):
    path = write(tmp_path, PAIRS)
    for options, message in (
        ({"overlong": "cut"}, "overlong='cut' is unknown; choose one of 'error', 'skip', 'truncate_prompt'"),
        ({"ranking": "best"}, "ranking='best' is unknown"),
        ({"media_tokens": "x"}, "media_tokens='x' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceDataModule(path, **options)
    with pytest.raises(SourceError, match="is not bundled; there are bundled:molecule-preferences/train"):
        PreferenceDataModule("bundled:molecules")
    with pytest.raises(SourceError, match="must end in"):
        PreferenceDataModule("pairs.json")
    single = write(tmp_path, [{"prompt": "a", "response": "b", "desirable": True}], "single.jsonl")
    with pytest.raises(ValueError, match="there are pairs in rows, single responses in single"):
        module([path, single])


def test_what_is_too_long_is_refused_skipped_or_loses_the_beginning_of_its_prompt(tmp_path):
    long = {"prompt": "one two three four five " * 8, "chosen": "yes", "rejected": "no"}
    path = write(tmp_path, [*PAIRS, long])
    with pytest.raises(SourceError, match=r"line 41: both responses.* tokens, more than row_length=64; raise"):
        module(path, row_length=64)
    with pytest.warns(UserWarning, match="1 pairs or responses are longer than row_length=64 and are left out"):
        data = module(path, row_length=64, overlong="skip")
    assert data.skipped == 1
    assert not any("three" in entry[0] for batch in epoch(data) for entry in answers(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = module(path, row_length=64, overlong="truncate_prompt", global_batch_size=1, micro_batch_size=1)
    (cut,) = (batch for batch in epoch(data) if any("three" in entry[0] for entry in answers(batch)))
    found = answers(cut)
    assert [entry[1].removesuffix("<|endoftext|>") for entry in found] == ["yes", "no"]
    for prompt, response, *_ in found:
        assert long["prompt"].endswith(prompt)
        tokens = len(TOKENIZER.encode(prompt))
        assert tokens == (64 - sum(len(TOKENIZER.encode(r)) + 1 for r in ("yes", "no"))) // 2, response
    endless = {"prompt": "a", "chosen": "one two " * 60, "rejected": "b"}
    with pytest.raises(SourceError, match="leave no room for a prompt in row_length=64"):
        module(write(tmp_path, [endless]), row_length=64, overlong="truncate_prompt")
    with pytest.raises(ValueError, match="all 1 pairs or responses are longer than row_length=64"):
        module(write(tmp_path, [endless]), row_length=64, overlong="skip")


def test_validation_deals_all_pairs_out_to_ranks_and_pads_with_nothing(tmp_path):
    path = write(tmp_path, PAIRS)
    data = [module(path, path, ranks=(2, rank), micro_batch_size=2) for rank in range(2)]
    batches = [list(entry.val_dataloader()) for entry in data]
    assert len(batches[0]) == len(batches[1])
    found = [entry[:3] for part in batches for batch in part for entry in answers(batch)]
    expected = [
        (row["prompt"], row[side] + "<|endoftext|>", side == "chosen")
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    assert sorted(found) == sorted(expected)


def test_bundled_molecules_are_valid_on_one_side_only_and_held_out_for_the_test():
    random = np.random.default_rng(0)
    kinds = set()
    for written in shuffled_molecules()[:300]:
        wrong = slip(written, random)
        assert not is_valid_smiles(wrong)
        kinds.add(len(wrong) - len(written))
    assert kinds == {-1, 0, 1}
    for part in ("train", "test"):
        row = bundled_preference(f"bundled:molecule-preferences/{part}", 5)
        assert row == bundled_preference(f"bundled:molecule-preferences/{part}", 5)
        assert row["prompt"] == "<SMILES>"
        assert is_valid_smiles(row["chosen"].removesuffix("</SMILES>"))
        assert not is_valid_smiles(row["rejected"].removesuffix("</SMILES>"))
    taken = {
        part: {bundled_preference(f"bundled:molecule-preferences/{part}", i)["chosen"] for i in range(50)}
        for part in ("train", "test")
    }
    assert not taken["train"] & taken["test"]
    assert shuffled_molecules()[-1] + "</SMILES>" in taken["test"]
