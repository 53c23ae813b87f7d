from collections import Counter

import jsonargparse
import numpy as np
import pytest

from lit_interns1.data.arithmetic import ArithmeticProblems
from lit_interns1.data.bundled_conversations import bundled_key, bundled_record, bundled_size
from lit_interns1.data.conversations import ConversationSource
from lit_interns1.data.responses import read_rows
from lit_interns1.data.tokenizer import load_tokenizer
from lit_interns1.rollout import ArithmeticPrompts, JoinedPrompts
from lit_interns1.rollout.prompts import PromptSource


def terms(question):
    """The signed terms of a chain sum, sorted."""
    text = question.removesuffix(" =").replace("- ", "-").replace("+ ", "")
    return tuple(sorted(int(term) for term in text.split()))


@pytest.mark.parametrize("operators", ["+", "-", "+-"])
def test_chain_sums_are_right_and_of_the_wanted_kind(operators):
    prompts = ArithmeticPrompts(
        min_digits=1, max_digits=3, min_terms=2, max_terms=4, operators=operators, size=2_000, seed=5
    )
    lengths, digits, signs = Counter(), Counter(), Counter()
    for index in range(len(prompts)):
        raw = prompts[index]
        assert raw.content.endswith(" =")
        assert raw.data == {"answer": str(eval(raw.content[:-2]))}
        parts = raw.content[:-2].split()
        lengths[(len(parts) + 1) // 2] += 1
        digits.update(len(part) for part in parts[::2])
        signs.update(parts[1::2])
    assert set(lengths) == {2, 3, 4}
    assert set(digits) == {1, 2, 3}
    assert set(signs) == set(operators)
    for counts in (lengths, digits, signs):  # each is as probable as any other
        mean = sum(counts.values()) / len(counts)
        assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values()), counts


def test_products():
    problems = ArithmeticProblems("product", 1, 9, 2, 5, size=500)
    assert all(eval(question[:-2]) == int(answer) for question, answer in (problems[i] for i in range(500)))
    assert max(len(problems[i].answer) for i in range(500)) > 19  # more than 64 bits


def test_train_and_test_share_no_problem_whatever_order_seed_and_size():
    train = [
        ArithmeticPrompts(max_digits=2, max_terms=3, size=20_000),
        ArithmeticPrompts(max_digits=1, size=3_000, seed=9),
    ]
    test = ArithmeticPrompts(max_digits=2, max_terms=3, size=2_000, seed=1, split="test")
    seen = {terms(prompts[i].content) for prompts in train for i in range(len(prompts))}
    unseen = {terms(test[i].content) for i in range(len(test))}
    assert len(unseen) > 500
    assert not seen & unseen
    # of all sums of two digits about a tenth is for testing
    small = {split: ArithmeticPrompts(max_digits=1, size=4_000, split=split) for split in ("train", "test")}
    counts = {split: len({terms(p[i].content) for i in range(4_000)}) for split, p in small.items()}
    assert counts["train"] + counts["test"] == 100 + 55 - 10  # a − b, a + b; a + 0 and a − 0 are the same
    assert 0.04 < counts["test"] / 145 < 0.18


def test_draws_depend_on_seed_and_number_alone():
    few, many = ArithmeticPrompts(size=50), ArithmeticPrompts(size=500)
    assert [few[i] for i in range(50)] == [many[i] for i in range(50)]
    other = ArithmeticPrompts(size=50, seed=1)
    assert sum(few[i] == other[i] for i in range(50)) < 5
    assert [ArithmeticPrompts(size=3)[i].content for i in range(3)] == ["9 - 85 =", "15 + 0 =", "39 - 9 ="]


def test_conversations_are_the_same_questions():
    for split, size in (("train", 10_000), ("test", 1_000)):
        path = f"bundled:chain-sum/{split}"
        assert bundled_size(path) == size
        prompts = ArithmeticPrompts(split=split, size=size)
        for index in (0, 1, size - 1):
            asked, answered = bundled_record(path, index)["messages"]
            raw = prompts[index]
            assert (asked["content"], answered["content"]) == (raw.content, raw.data["answer"])
        opened = ConversationSource(path).open()
        assert len(opened) == size
        assert opened.read(3).messages[0].parts[0].value == prompts[3].content
        assert opened.key == bundled_key(path)
        assert next(read_rows(path, 1)).fields["messages"][1]["content"] == prompts[0].data["answer"]
    assert bundled_key("bundled:chain-sum/train") != bundled_key("bundled:chain-sum/test")


def test_digits_are_single_tokens_of_the_bundled_tokenizer():
    tokenizer = load_tokenizer()
    for text in ("1234567890", "12 + 5 =", "39 - 9 =", "-76", "3 * 79 ="):
        pieces = [tokenizer.token(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert all(len(piece.strip()) <= 1 for piece in pieces), pieces


def test_joined_prompts():
    joined = JoinedPrompts([ArithmeticPrompts(size=3, source="a"), ArithmeticPrompts(size=2, source="b", seed=1)])
    assert len(joined) == 5
    assert [joined[i].source for i in range(5)] == ["a", "a", "a", "b", "b"]
    assert joined[3] == ArithmeticPrompts(size=2, source="b", seed=1)[0]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            joined[index]
    with pytest.raises(ValueError, match="at least one source"):
        JoinedPrompts([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sum"}, "kind = 'sum' is unknown: choose one of chain_sum, product"),
        ({"split": "validation"}, "split = 'validation'"),
        ({"min_digits": 3}, "min_digits = 3 ≤ max_digits = 2"),
        ({"max_digits": 10}, "max_digits = 10 ≤ 9"),
        ({"min_terms": 1}, "min_terms = 1"),
        ({"operators": "*"}, r"operators = '\*'"),
        ({"size": 0}, "size must be at least 1"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticPrompts(**options)


def test_a_range_without_test_problems_is_refused(monkeypatch):
    monkeypatch.setattr("lit_interns1.data.arithmetic._is_test", lambda term_NT, count_N: np.zeros(len(count_N), bool))
    with pytest.raises(ValueError, match="the test split has no problem of kind = 'chain_sum' with 1 to 2 digits"):
        ArithmeticPrompts(size=2, split="test")


def test_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--prompts", type=PromptSource)
    text = """
prompts:
  class_path: lit_interns1.rollout.JoinedPrompts
  init_args:
    sources:
      - {class_path: lit_interns1.rollout.ArithmeticPrompts, init_args: {size: 4, max_terms: 3}}
      - {class_path: lit_interns1.rollout.ArithmeticPrompts, init_args: {size: 2, kind: product}}
"""
    prompts = parser.instantiate(parser.parse_string(text)).prompts
    assert [prompts[i].source for i in (0, 5)] == ["chain_sum", "product"]
