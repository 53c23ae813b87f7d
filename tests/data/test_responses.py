"""Which tokens of a row are its response, and what is refused."""

import gzip
import json

import pytest
import tokenizers

from lit_interns1.data import load_tokenizer
from lit_interns1.data.media_tokens import PRO_TOKENS, with_media_tokens
from lit_interns1.data.responses import ResponseEncoder, ResponseRow, read_rows
from lit_interns1.data.tokenizer import TextTokenizer

PLAIN = load_tokenizer()
CHAT = with_media_tokens(PLAIN, PRO_TOKENS)


def response(fields, tokenizer=CHAT, **options):
    found = ResponseEncoder(tokenizer, **options).encode(ResponseRow("a.jsonl", 3, json.dumps(fields), fields))
    assert found is not None
    return found


def counted(found, tokenizer=CHAT) -> list[str]:
    """The spans that count, as text."""
    spans: list[list[int]] = []
    for place, (token, counts) in enumerate(zip(found.ids_N.tolist(), found.counts_N.tolist(), strict=True)):
        if counts:
            if not place or not found.counts_N[place - 1]:
                spans.append([])
            spans[-1].append(token)
    return [tokenizer.decode(span) for span in spans]


def test_plain_text_is_encoded_apart_and_ends_with_the_end_of_text():
    found = response({"prompt": "1 + 1 =", "response": " 2", "source": "x"}, PLAIN)
    assert found.ids_N.tolist() == [*PLAIN.encode("1 + 1 ="), *PLAIN.encode(" 2"), PLAIN.end_of_text_id]
    assert counted(found, PLAIN) == [" 2<|endoftext|>"]


def test_a_document_counts_but_for_its_first_token():
    ids = [*PLAIN.encode("To be or not"), PLAIN.end_of_text_id]
    for fields in ({"text": "To be or not"}, {"prompt": "", "response": "To be or not"}):
        found = response(fields, PLAIN)
        assert found.ids_N.tolist() == ids
        assert found.counts_N.tolist() == [False] + [True] * (len(ids) - 1)


def test_labels_stand_where_they_are_predicted():
    document = response({"prompt": "1 + 1 =", "response": " 2"}, PLAIN).document()
    ids, labels = document["input_ids"].tolist(), document["labels"].tolist()
    behind = [*PLAIN.encode(" 2"), PLAIN.end_of_text_id]
    before = len(ids) - len(behind)
    assert labels == [-100] * (before - 1) + behind + [-100]


IMAGE = {"type": "image", "image": "x.png"}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def test_conversations_count_every_answer_and_prompts_of_messages_only_the_response():
    whole = response({"messages": MESSAGES})
    assert CHAT.decode(whole.ids_N.tolist()).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert counted(whole) == ["Hi!<|im_end|>", "4<|im_end|>"]
    behind_messages = response({"prompt": MESSAGES[:-1], "response": "4"})
    assert behind_messages.ids_N.tolist() == whole.ids_N.tolist()
    assert counted(behind_messages) == ["4<|im_end|>"]


def test_chat_makes_a_text_the_turn_of_a_user():
    found = response({"prompt": "2 + 2?", "response": "4"}, chat=True)
    same = response({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]})
    assert found.ids_N.tolist() == same.ids_N.tolist()
    assert counted(found) == counted(same) == ["4<|im_end|>"]
    assert counted(response({"text": "a b c"}, chat=True))[0].endswith("<|endoftext|>")


def test_the_end_need_not_count():
    found = response({"prompt": "1 + 1 =", "response": " 2"}, PLAIN, count_end=False)
    assert counted(found, PLAIN) == [" 2"]
    assert counted(response({"messages": MESSAGES}, count_end=False)) == ["Hi!", "4"]


def test_long_rows():
    fields = {"prompt": "a b c d", "response": " e f g h"}
    whole = response(fields, PLAIN)
    length = len(whole.ids_N) - 2
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: {length + 2} tokens; max_length = {length}"):
        response(fields, PLAIN, max_length=length)
    cut = response(fields, PLAIN, max_length=length, overlong="cut")
    assert cut.ids_N.tolist() == whole.ids_N.tolist()[:-2]
    row = ResponseRow("a.jsonl", 3, "", fields)
    assert ResponseEncoder(PLAIN, max_length=length, overlong="skip").encode(row) is None
    assert ResponseEncoder(PLAIN, max_length=length + 2, overlong="skip").encode(row) is not None
    with pytest.raises(ValueError, match="no token of the response is within max_length = 2"):
        response(fields, PLAIN, max_length=2, overlong="cut")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a"}, "line 3: expected `prompt` and `response`, or `messages`, or `text`; got prompt"),
        ({"response": "a"}, "got response"),
        ({"text": "a", "messages": MESSAGES}, "got messages, text"),
        ({"prompt": "a", "response": ""}, "line 3, response: expected a text that is not empty"),
        ({"prompt": 3, "response": "a"}, "line 3, prompt: expected a text or a list of messages, got int"),
        ({"text": ["a"]}, "line 3, text: expected a text"),
        ({"messages": MESSAGES[:2]}, "no message has the role assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, MESSAGES[-1]]},
            "type image",
        ),
    ],
)
def test_refused_rows(fields, message: str):
    with pytest.raises(ValueError, match=message):
        response(fields)


def test_a_tokenizer_without_turns_refuses_conversations():
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")
    tokenizer = TextTokenizer(tokenizers.Tokenizer(words))
    assert response({"prompt": "a", "response": "a"}, tokenizer).ids_N.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"no token '<\|im_start\|>'"):
        response({"messages": MESSAGES}, tokenizer)
    with pytest.raises(ValueError, match="max_length = 1 must be at least 2"):
        ResponseEncoder(PLAIN, max_length=1)


def test_rows_of_files_and_bundled_sources(tmp_path):
    lines = ['{"text": "é"}', "", '{"text":"b",  "n": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        rows = list(read_rows(str(tmp_path / name)))
        assert [(row.number, row.line) for row in rows] == [(1, lines[0]), (3, lines[2])]
        assert rows[1].where == f"{tmp_path / name}, line 3"
    assert len(list(read_rows(str(tmp_path / "a.jsonl"), limit=1))) == 1
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert [row.fields["text"] for row in read_rows(str(tmp_path / "b.txt"))] == ["one", "two"]
    assert len(list(read_rows("bundled:molecules", limit=3))) == 3
    question = next(read_rows("bundled:molecule-questions/test"))
    assert counted(response(question.fields)) == [question.fields["messages"][1]["content"] + "<|im_end|>"]
    assert json.loads(question.line) == question.fields
    with pytest.raises(ValueError, match="about images or signals"):
        next(read_rows("bundled:digits/test"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there is no row"):
        list(read_rows(str(tmp_path / "empty.jsonl")))
