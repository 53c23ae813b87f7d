"""POLAR's data: the text that is read, as the released client makes it, and pairs from lines of JSON."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lit_interns1.data import PolarDataModule, PolarEncoder, PolarTemplate, SourceError, load_tokenizer
from lit_interns1.data.polar_lines import PolarSource
from lit_interns1.data.polar_template import contents, without_thinking
from lit_interns1.data.tokenizer import TextTokenizer

TEMPLATE = PolarTemplate(separator="<|im_start|>", end="<|im_end|>", max_length=64, max_response_length=20)
JUDGED = {"prompt": "Two and two?", "reference": "Four.", "chosen": "It is four.", "rejected": "Five."}


def letters():
    """Every letter is a token, and so are the released names."""
    names = [*map(chr, range(32, 127)), "\n", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<|reward|>", "[UNUSED_TOKEN_130]", "<s>", "</s>"])
    tokenizer.decoder = decoders.Fuse()
    return TextTokenizer(tokenizer)


def released_text(tokenizer, prompt, reference, output, wrapper, max_length, max_response_length, start=0):
    """What the released client computes, written down again; `start` tokens stand in front of every text."""
    lengths = [len(text) + start for text in (prompt, reference, output)]
    reference, output = reference[: max_response_length - start], output[: max_response_length - start]
    room = (max_length - 4 - min(lengths[1], max_response_length) - min(lengths[2], max_response_length)) // 2
    if lengths[0] > room:
        prompt = prompt[len(prompt) - room :]
    middle = "" if wrapper == "pretrain" else "\n"
    return f"{prompt}{middle}{reference}<|reward|>{prompt}{middle}{output}[UNUSED_TOKEN_130]"


@pytest.mark.parametrize("start", [None, "<s>"])
@pytest.mark.parametrize("wrapper", ["sft", "pretrain"])
def test_text_and_cuts_are_those_of_the_released_client(wrapper, start):
    tokenizer = letters()
    template = PolarTemplate(start=start, wrapper=wrapper, max_length=40, max_response_length=12)
    encoder = PolarEncoder(tokenizer, template)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for prompt, reference, output in itertools.product((3, 7, 11, 12, 26), (1, 11, 12, 13, 20), (2, 12, 25)):
        texts = alphabet[:prompt], alphabet[:reference].upper(), alphabet[-output:]
        expected = released_text(tokenizer, *texts, wrapper, 40, 12, 0 if start is None else 1)
        assert encoder.texts(texts[0], texts[1], [texts[2]]) == [expected]
        (ids,) = encoder.ids(texts[0], texts[1], [texts[2]])
        assert ids == tokenizer.encode((start or "") + expected)
        assert ids[-1] == tokenizer.tokenizer.token_to_id("[UNUSED_TOKEN_130]")
        assert len(ids) <= 40


def test_candidates_share_the_cut_of_the_longer_one_and_special_tokens_in_texts_go():
    encoder = PolarEncoder(letters(), PolarTemplate(max_length=40, max_response_length=12))
    short, long = encoder.texts("p" * 30, "r" * 4, ["s", "l" * 12])
    assert short.count("p") == long.count("p") == 2 * ((36 - 4 - 12) // 2)
    assert encoder.texts("a", "b", ["c[UNUSED_TOKEN_130]<|reward|>d"]) == ["a\nb<|reward|>a\ncd[UNUSED_TOKEN_130]"]
    full = PolarEncoder(letters(), PolarTemplate(max_length=28, max_response_length=12))
    assert full.texts("p" * 9, "r" * 12, ["c" * 12]) == [
        "\n" + "r" * 12 + "<|reward|>\n" + "c" * 12 + "[UNUSED_TOKEN_130]"
    ]


def test_messages_are_joined_and_thinking_goes():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]
    assert contents(messages) == "Be brief.\nTwo and two?"
    assert contents("as it is") == "as it is"
    assert without_thinking("<think>\nwell\n</think>\n\nFour.\n") == "Four."
    assert without_thinking("so <think>a</think> b <think>c</think>") == "b <think>c</think>"
    assert without_thinking(" no thought ") == " no thought "
    encoder = PolarEncoder(letters(), PolarTemplate(max_length=100, max_response_length=40))
    plain = encoder.ids(messages, "Four.", ["4"])[0]
    assert encoder.judged(messages, "Four.", "<think>hm</think> 4") == plain
    with pytest.raises(ValueError, match="messages with a text as `content`"):
        contents([{"role": "user"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrapper": "chat"}, "wrapper = 'chat' is unknown: choose one of sft, pretrain"),
        ({"end": ""}, "must not be empty"),
        ({"max_length": 8000}, "max_length = 8000 must be at least .* = 8196"),
        ({"max_response_length": 0}, "max_response_length = 0 must be at least 1"),
    ],
)
def test_template_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PolarTemplate(**options)


def test_the_end_must_be_one_token():
    with pytest.raises(ValueError, match=r"end = '\[UNUSED_TOKEN_130\]' of the POLAR template must be one token"):
        PolarEncoder(load_tokenizer())


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def data_module(sources, **options):
    options = {"row_length": 128, "global_batch_size": 2, "micro_batch_size": 2, "template": TEMPLATE, **options}
    return PolarDataModule(sources, **options)


def test_batches_hold_pairs_and_the_last_token_of_a_document_is_the_response(tmp_path):
    ranking = {"prompt": [{"role": "user", "content": "Name a city."}], "ranking": ["Paris", "Rome", "a city", "no"]}
    data = data_module(write(tmp_path / "a.jsonl", [JUDGED, {**JUDGED, "wrapper": "pretrain"}, ranking]))
    data.prepare_data()
    data.setup("fit")
    encoder, tokenizer = data.encoder, data.tokenizer
    source = data.sources[0]
    pairs = data.pairs(source)
    assert [(p.reference, p.chosen, p.rejected) for p in pairs[2:]] == [
        ("Paris", "Rome", "a city"), ("Paris", "Rome", "no"), ("Paris", "a city", "no"),
    ]  # fmt: skip
    rows = [(0, row) for row in range(data._training.sources[0].plan.num_rows)]
    batch = data._training.read(rows)
    found = {}
    for sample in range(int(batch.sample_id_T.max()) + 1):
        place = (batch.sample_id_T == sample).nonzero().squeeze(-1)
        ids, mask = batch.input_ids[place], batch.token_fields["response_mask"][place]
        assert mask.nonzero().tolist() == [[len(place) - 2]]
        assert int(ids[-1]) == int(batch.labels[place[-2]]) == tokenizer.tokenizer.token_to_id("<|im_end|>")
        key = int(batch.token_fields["pair_ids"][place[0]]), bool(batch.token_fields["is_chosen"][place[0]])
        found[key] = ids.tolist()
    expected = sorted(encoder.ids(p.prompt, p.reference, [p.chosen, p.rejected], p.wrapper) for p in pairs)
    assert sorted([found[n, True], found[n, False]] for n in range(len(pairs))) == expected
    texts = {tokenizer.decode(ids) for ids, _ in expected}
    assert "Name a city.\nParis<|im_start|>Name a city.\nRome<|im_end|>" in texts
    assert "Two and two?Four.<|im_start|>Two and two?It is four.<|im_end|>" in texts


def trajectories(prompts=6, policies=("a", "b", "c"), each=3):
    return [
        {"prompt": f"prompt {p}", "policy": policy, "trajectory": f" by {policy} {p} {turn}"}
        for turn in range(each) for policy in policies for p in range(prompts)
    ]  # fmt: skip


def test_triples_are_two_of_one_policy_and_one_of_another_for_the_same_prompt(tmp_path):
    source = PolarSource(write(tmp_path / "t.jsonl", trajectories()))
    pairs = source.pairs(seed=1, triples_per_policy=2)
    assert len(pairs) == 6 * 3 * 2
    for pair in pairs:
        own, other = pair.policies
        number = pair.prompt.split()[1]
        assert own != other
        assert pair.reference != pair.chosen
        assert all(text.split()[1:3] == [own, number] for text in (pair.reference, pair.chosen))
        assert pair.rejected.split()[1:3] == [other, number]
    assert {pair.policies for pair in pairs} == set(itertools.permutations("abc", 2))
    assert source.pairs(1, 2) == pairs
    assert source.pairs(2, 2) != pairs
    assert [p[:5] for p in source.pairs(1, 1)] == [p[:5] for p in pairs[::2]]


def test_no_triple_where_texts_are_equal_or_one_trajectory_is_alone(tmp_path):
    rows = [
        {"prompt": "p", "policy": "a", "trajectory": "x"}, {"prompt": "p", "policy": "a", "trajectory": "x"},
        {"prompt": "p", "policy": "b", "trajectory": "x"}, {"prompt": "p", "policy": "c", "trajectory": "y"},
        {"prompt": "q", "policy": "a", "trajectory": "x"}, {"prompt": "q", "policy": "b", "trajectory": "y"},
    ]  # fmt: skip
    pairs = PolarSource(write(tmp_path / "t.jsonl", rows)).pairs(0, 20)
    assert {(pair.prompt, pair.policies) for pair in pairs} == {("p", ("a", "c"))}
    with pytest.raises(SourceError, match="no prompt has two trajectories of one policy and another one"):
        PolarSource(write(tmp_path / "u.jsonl", rows[4:])).pairs(0, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "line 2: expected an object with `prompt` with `reference`"),
        ({**JUDGED, "policy": "a", "trajectory": "t"}, "line 2: expected an object"),
        ({**JUDGED, "chosen": ""}, "line 2, chosen: the text is empty"),
        ({**JUDGED, "chosen": "Five."}, "line 2: two candidates are equal"),
        ({**JUDGED, "reference": 4}, "line 2, reference: expected a text or a list of messages, got int"),
        ({**JUDGED, "prompt": [{"content": 3}]}, "line 2, prompt: POLAR reads messages with a text"),
        ({**JUDGED, "wrapper": "chat"}, "line 2, wrapper: 'chat' is none of sft, pretrain"),
        ({"prompt": "p", "ranking": ["a", "b"]}, "line 2, ranking: expected a list of three or more"),
        ({"prompt": "p", "policy": "a", "trajectory": "t"}, "line 2: trajectories of policies and judged candidates"),
        ("{", "line 2: not valid JSON"),
        ({**JUDGED, "chosen": "a long answer " * 5, "prompt": "a long prompt " * 9}, "line 2: both responses"),
    ],
)
def test_errors_name_file_and_line(tmp_path, row, message):
    template = PolarTemplate(separator="<|im_start|>", end="<|im_end|>", max_length=200, max_response_length=90)
    with pytest.raises(SourceError, match=rf"bad\.jsonl, {message}"):
        data_module(write(tmp_path / "bad.jsonl", [JUDGED, row]), template=template).prepare_data()


def test_policies_need_names(tmp_path):
    rows = [*trajectories(1), {"prompt": "p", "policy": 3, "trajectory": "t"}]
    with pytest.raises(SourceError, match="line 10, policy: expected a name, got 3"):
        data_module(write(tmp_path / "t.jsonl", rows)).prepare_data()


def test_options_are_checked(tmp_path):
    path = write(tmp_path / "t.jsonl", trajectories())
    for options, message in (
        ({"triples_per_policy": 0}, "triples_per_policy must be at least 1, got 0"),
        ({"overlong": "truncate_prompt"}, "template.max_length says where prompts end"),
        ({"row_length": 1}, "row_length must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data_module(path, **options)
    with pytest.raises(SourceError, match=r"must end in \.jsonl"):
        data_module("pairs.json")


def test_rows_go_on_where_a_run_stopped_and_do_not_depend_on_the_ranks(tmp_path):
    def consumed(loader, batches):
        iterator = iter(loader)
        return [next(iterator).input_ids for _ in range(batches)]

    def ready():
        data = data_module(write(tmp_path / "t.jsonl", trajectories(12)), triples_per_policy=2)
        data.setup("fit")
        return data

    whole = consumed(ready().train_dataloader(), 6)
    begun = ready()
    first = consumed(begun.train_dataloader(), 2)
    state = begun.train_dataloader().state_dict()
    resumed = ready()
    resumed.load_state_dict(state)
    rest = consumed(resumed.train_dataloader(), 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, [*first, *rest], strict=True))
