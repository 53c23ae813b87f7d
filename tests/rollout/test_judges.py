import pytest
import torch

from judged_samples import judged, prompt, sample
from lit_interns1.objectives.policy import soft_overlong_penalty
from lit_interns1.rollout.judges import (
    AnswerJudge,
    FormatJudge,
    FunctionJudge,
    InternBootcampJudge,
    Judgement,
    LengthJudge,
    PolarJudge,
    posterior_reward,
)
from lit_interns1.rollout.judges.answers import boxed, last_number, number
from lit_interns1.rollout.judges.base import judge_samples

# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so it is 17.", "17"),
        ("12 + 5 = 17", "17"),
        ("-5", "-5"),
        ("it is −5", "−5"),
        ("5-3", "3"),  # an operator
        ("(2)-3", "3"),
        ("x = -3", "-3"),
        ("1,234,567 people", "1,234,567"),
        ("3,4", "4"),  # a list
        ("3,4567", "4567"),
        ("0.5", "0.5"),
        (".25", ".25"),
        ("2.", "2"),
        ("v1.2.3", "3"),
        ("$7", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, found):
    assert last_number(text) == found


def test_numbers_are_compared_as_numbers():
    same = ["7", "7.0", "007", "7.", "+7", " 7 "]
    assert {number(text) for text in same} == {7}
    assert (number("−1,234.50"), number("1,23"), number("7 8"), number("seven")) == (-1234.5, None, None, None)
    assert number("0.1") * 10 == 1  # exactly


def test_boxed_is_the_last_complete_one():
    assert boxed(r"\boxed{3} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{3} then \boxed{\frac{1") == "3"
    assert boxed(r"\boxed {\{1,2\}}") == r"\{1,2\}"
    assert boxed(r"\boxed{a}b}") == "a"
    assert boxed("3") is None


@pytest.mark.parametrize(
    ("options", "text", "answer", "right"),
    [
        ({}, "it is 17", "17", True),
        ({}, "it is 17, not 18", "17", False),
        ({}, "it is 17.0", 17, True),
        ({}, "no idea", "17", False),
        ({}, "it is 2", ["1", "2"], True),
        ({}, "<think>17</think> it is 18", "17", False),
        ({}, "<think>17", "17", False),  # still thinking
        ({}, "17</think>18", "18", True),  # the prompt opened the tag
        ({"extraction": "exact"}, " 17\n", "17", True),
        ({"extraction": "exact"}, "17.0", "17", False),
        ({"extraction": "exact"}, "it is 17", "17", False),
        ({"extraction": "exact"}, "Yes", "yes", False),
        ({"extraction": "exact", "ignore_case": True}, "Yes", "yes", True),
        ({"extraction": "boxed"}, r"\boxed{17}", "17", True),
        ({"extraction": "boxed"}, "17", "17", False),
        ({"extraction": "tag"}, "<answer>1</answer> no, <answer> CCO </answer>", "CCO", True),
        ({"extraction": "tag"}, "<answer>CCO", "CCO", False),
        ({"extraction": "tag", "tag": "smiles"}, "<smiles>CCO</smiles>", "CCO", True),
        ({"extraction": "pattern", "pattern": r"Answer: (\w+)"}, "Answer: A\nAnswer: B", "B", True),
        ({"extraction": "pattern", "pattern": r"Answer: (\w+)"}, "B", "B", False),
    ],
)
def test_answers(options, text, answer, right):
    assert judged(AnswerJudge(**options), text, answer=answer) == Judgement(float(right), right)


def test_a_missing_reference_is_a_failure_that_says_so():
    (failure,) = judge_samples(AnswerJudge(), [prompt("maths", 7, solution="4")], ["4"], [sample()])
    assert failure.cause == "error"
    assert "prompt 7 of source 'maths' has no 'answer' in its data (solution)" in failure.message


def test_patterns_run_where_they_can_be_stopped():
    assert AnswerJudge().quick
    assert not AnswerJudge(extraction="pattern", pattern="(a+)+$").quick
    assert FormatJudge().quick
    assert not FormatJudge("pattern", pattern="(a+)+$").quick


# -- form and length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "fits"),
    [
        ({}, "<think>hm</think>\n7", True),
        ({}, "<think>hm</think>", False),
        ({}, "<think> </think>7", False),
        ({}, "7", False),
        ({}, "x<think>hm</think>7", False),
        ({}, "<think>a</think>b<think>c</think>7", False),
        ({}, "</think>hm<think>7", False),
        ({"opened": True}, "hm</think>7", True),
        ({"opened": True}, "<think>hm</think>7", False),
        ({"form": "think_answer"}, "<think>hm</think>\n<answer>7</answer>\n", True),
        ({"form": "think_answer"}, "<think>hm</think> so <answer>7</answer>", False),
        ({"form": "think_answer"}, "<think>hm</think><answer>7</answer>.", False),
        ({"form": "think_answer"}, "<think>hm</think><answer></answer>", False),
        ({"form": "pattern", "pattern": "a.*b"}, "a\nb", True),
        ({"form": "pattern", "pattern": "a"}, "ab", False),
    ],
)
def test_forms(options, text, fits):
    assert judged(FormatJudge(**options), text) == Judgement(float(fits), None)


def test_length_is_the_penalty_of_dapo():
    judge = LengthJudge(max_completion_length=20, soft_punish_cache=5)
    lengths = [1, 15, 16, 18, 20, 25]
    scores = [judged(judge, "", length).score for length in lengths]
    assert scores == soft_overlong_penalty(torch.tensor(lengths), 20, 5).tolist()
    assert scores == pytest.approx([0, 0, -0.2, -0.6, -1, -1])


# -- functions of others ----------------------------------------------------------------------------------------------


def of_one(prompt, text, sample):
    return {"yes": True, "no": False, "some": 0.25, "tensor": torch.tensor(0.5), "judged": Judgement(2.0, True)}.get(
        text
    )


def of_trl(prompts, completions, answer, completion_ids, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(completion_ids) == len(columns["level"])
    return [None if c == "skip" else float(c == a) for c, a in zip(completions, answer)]


def of_messages(completions, prompts):
    assert prompts[0] == [{"role": "user", "content": "2 + 2"}]
    return [len(c[0]["content"]) for c in completions]


def test_functions():
    judge = FunctionJudge(of_one)
    prompts, texts = [prompt()] * 6, ["yes", "no", "some", "tensor", "judged", "else"]
    found = judge_samples(judge, prompts, texts, [sample()] * 6)
    assert found[:5] == [
        Judgement(1.0, True), Judgement(0.0, False), Judgement(0.25), Judgement(0.5), Judgement(2.0, True),
    ]  # fmt: skip
    assert (found[5].cause, "NoneType" in found[5].message) == ("invalid", True)
    assert not hasattr(judge, "judge_batch")


def test_functions_in_the_form_of_trl():
    judge = FunctionJudge(of_trl, score_range=(0.0, 1.0))
    prompts = [prompt(answer=str(i), level=3) for i in range(3)]
    found = judge_samples(judge, prompts, ["0", "skip", "1"], [sample()] * 3)
    assert (found[0], found[2]) == (Judgement(1.0), Judgement(0.0))
    assert found[1].cause == "invalid"
    assert judge.judge(prompts[1], "1", sample()) == Judgement(1.0)
    messages = FunctionJudge(of_messages, conversational=True)
    assert judge_samples(messages, [prompt(text="2 + 2", unused=1)], ["four"], [sample()]) == [Judgement(4.0)]


def test_dotted_paths():
    assert judged(FunctionJudge("strange_judges.of_length"), "abc") == Judgement(3.0)
    for path, message in (
        ("nothing", "package.module.name"),
        ("no_such_module.f", "no module 'no_such_module'"),
        ("strange_judges.nothing", "'strange_judges' has no 'nothing'"),
        ("math.pi", "not callable"),
        ("strange_judges._refuse", r"_refuse\(\): it must take \(prompt, text, sample\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FunctionJudge(path)


class Bootcamp:
    """`verify_score` with the defaults of InternBootcamp."""

    def __init__(self, offset=0):
        self.offset = offset

    def verify_score(
        self, model_output, identity, format_score=0, short_penalty=True, short_threshold=100, format_penalty=True
    ):
        if short_penalty and len(model_output) < short_threshold:
            return 0.0
        if format_penalty and "</think>" not in model_output:
            return 0.0
        return 1.0 if model_output.endswith(str(identity["n"] + self.offset)) else float(format_score)


class PlainBootcamp:
    def verify_score(self, model_output, identity):
        return float(model_output == identity)


def test_bootcamps_without_their_penalties():
    assert Bootcamp().verify_score("7", {"n": 7}) == 0.0  # the trap: right, but short and without a thought
    assert judged(InternBootcampJudge(Bootcamp()), "7", identity={"n": 7}) == Judgement(1.0, True)
    assert judged(InternBootcampJudge(Bootcamp, {"offset": 1}), "7", identity={"n": 7}) == Judgement(0.0, False)
    assert judged(InternBootcampJudge(Bootcamp(), short_penalty=True), "7", identity={"n": 7}).score == 0.0
    long = "7".rjust(200)
    assert judged(InternBootcampJudge(Bootcamp(), short_penalty=True), long, identity={"n": 7}).score == 1.0
    assert judged(InternBootcampJudge(Bootcamp(), format_penalty=True), long, identity={"n": 7}).score == 0.0
    assert judged(InternBootcampJudge(PlainBootcamp), "a", identity="a") == Judgement(1.0, True)
    with pytest.raises(ImportError, match="internbootcamp is not installed; clone"):
        InternBootcampJudge("internbootcamp.bootcamp.game24.Game24Bootcamp")
    with pytest.raises(ValueError, match="has no verify_score"):
        InternBootcampJudge(object)


# -- POLAR ------------------------------------------------------------------------------------------------------------


class Overlap:
    """Letters that candidate and reference share; fails on some."""

    def __init__(self):
        self.calls = []

    def score(self, prompts, references, candidates):
        self.calls.append(len(prompts))
        if "broken" in candidates:
            raise OSError("no answer")
        return [len(set(r) & set(c)) - 10.0 for r, c in zip(references, candidates)]


def test_polar_scores_in_batches_that_fail_alone():
    scorer = Overlap()
    judge = PolarJudge(scorer, batch=2)
    prompts = [prompt(reference="abc")] * 4 + [prompt()] + [prompt(reference="x")]
    found = judge_samples(judge, prompts, ["ab", "c", "broken", "b", "a", "x"], [sample()] * 6)
    assert scorer.calls == [2, 2, 1]
    assert (found[0], found[1], found[5]) == (Judgement(-8.0), Judgement(-9.0), Judgement(-9.0))
    assert [f.message for f in found[2:4]] == ["OSError: no answer"] * 2
    assert "has no 'reference'" in found[4].message
    assert judge.judge(prompts[0], "ab", sample()) == Judgement(-8.0)
    assert (judge.normalize, judge.quick) == ("group", True)


# -- the posterior reward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "k0", "n0"), [(0, 0, 0, 0), (3, 4, 0, 0), (4, 4, 1, 3), (0, 5, 5, 5), (6, 8, 7, 8)])
def test_posterior_is_the_integral(k, n, k0, n0):
    p = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mine, other = (p**a * (1 - p) ** b for a, b in ((k, n - k), (k0, n0 - k0)))
    below = other.cumsum(0) - other / 2
    expected = (mine * below).sum() / (mine.sum() * other.sum())
    assert posterior_reward(k, n, k0, n0) == pytest.approx(float(expected), abs=1e-7)
    assert posterior_reward(k, n, k0, n0) + posterior_reward(k0, n0, k, n) == pytest.approx(1.0)
    assert posterior_reward(k, n) == pytest.approx((k + 1) / (n + 2))


def test_posterior_of_impossible_counts():
    with pytest.raises(ValueError, match="passed = 3 must lie between 0 and checks = 2"):
        posterior_reward(3, 2)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerJudge("first"), "extraction = 'first' is unknown"),
        (lambda: AnswerJudge("tag", pattern="x"), "a pattern is for 'pattern' alone"),
        (lambda: AnswerJudge("pattern"), "a pattern is for 'pattern' alone"),
        (lambda: AnswerJudge("pattern", pattern="x"), "must have one group, it has 0"),
        (lambda: AnswerJudge("pattern", pattern="(x"), r"pattern = '\(x'"),
        (lambda: FormatJudge("xml"), "form = 'xml' is unknown"),
        (lambda: FormatJudge("think", pattern="x"), "a pattern is for 'pattern' alone"),
        (lambda: LengthJudge(10, 20), "soft_punish_cache"),
        (lambda: PolarJudge(Overlap(), batch=0), "batch = 0"),
    ],
)
def test_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
