"""Judges that stand on packages of the extra `rl`: each trap of these packages, and that we do not fall in."""

import math
import sys
import threading
import warnings

import pytest

from judged_samples import judged, prompt, score_groups
from lit_interns1.rollout import JudgeEntry, MixtureOfRewards, ReasoningGymPrompts
from lit_interns1.rollout.judges import Judgement, MathVerifyJudge, ReasoningGymJudge
from lit_interns1.rollout.judges.base import judge_samples

# -- math-verify ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify")
    return MathVerifyJudge()


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("17", "so it is $17$", True),
        ("17", "so it is $18$", False),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        ("1/2", "the answer is 0.5", True),
        ("3", "$x=3$", True),
        ("10", r"\boxed{10\text{ cm}}", True),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        ("50%", r"\boxed{0.5}", True),
        ("A", r"\boxed{A}", True),
        ("A", r"\boxed{B}", False),
        ("-13", "answer: −13", True),  # not the ASCII sign
        ("1,2", r"$\{2,1\}$", True),  # read as 1.2 outside of a box
        ("1234", r"\boxed{1,234}", True),
        ("3", "no idea", False),
        ("3", r"\boxed{}", False),
        ("4", r"first \boxed{3}, no, \boxed{4}", True),  # read as {3, 4} together
        ("3", r"first \boxed{3}, no, \boxed{4}", False),
        ("3", r"<think>\boxed{3}</think>\boxed{4}", False),
        ("3", r"<think>\boxed{3}", False),
        (r"$1<x<3$", r"\boxed{(1,3)}", True),  # an interval for an inequality, but not the other way round
        (r"(1,3)", r"\boxed{1<x<3}", False),
    ],
)
def test_mathematics(mathematics, answer, text, right):
    assert judged(mathematics, text, answer=answer) == Judgement(float(right), right)


def test_the_reference_comes_first(mathematics):
    from math_verify import parse, verify

    relation, interval = (parse(text, parsing_timeout=None) for text in ("$1<x<3$", "$(1,3)$"))
    assert verify(relation, interval, timeout_seconds=None)
    assert not verify(interval, relation, timeout_seconds=None)


def test_an_unreadable_reference_is_a_failure_not_a_wrong_answer(mathematics):
    (failure,) = judge_samples(mathematics, [prompt(answer="$ $")], [r"\boxed{3}"], [None])
    assert failure.cause == "error"
    assert "cannot read the reference '$ $'" in failure.message


def test_mathematics_outside_of_the_main_thread(mathematics):
    from math_verify import parse

    found = []

    def run():
        try:
            parse("$3$")
        except ValueError as error:
            found.append(str(error))
        found.append(judged(mathematics, "$3$", answer="3"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "signal.alarm" in found[0]  # the trap
    assert found[1] == Judgement(1.0, True)


@pytest.mark.slow
def test_mathematics_that_never_ends_is_stopped(mathematics):
    mixture = MixtureOfRewards([JudgeEntry(mathematics, "mathematics", timeout=3.0)], workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = score_groups(mixture, [[r"\boxed{9^{9^{9^9}}}", r"\boxed{3}", r"\boxed{4}"]], data={"answer": "3"})
    mixture.close()
    assert math.isnan(group[0].reward)
    assert [scored.reward for scored in group[1:]] == [1.0, 0.0]
    assert mixture.failures["mathematics"] == {"timeout": 1}


# -- reasoning-gym: the package is not among the test tools, `make test-slow` installs it where it can -----------------


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


def answers(prompts, *texts, **options):
    """Judgements of texts for the first prompt."""
    raw = prompts[0]
    return [judged(ReasoningGymJudge(**options), text, **raw.data) for text in texts]


RIGHT, WRONG = Judgement(1.0, True), Judgement(0.0, False)


@pytest.mark.slow
def test_gym_prompts_are_the_items_of_the_data_set(gym):
    prompts = ReasoningGymPrompts("chain_sum", size=5, seed=3, config={"min_terms": 2, "max_terms": 2})
    items = gym.create_dataset("chain_sum", size=5, seed=3, min_terms=2, max_terms=2)
    assert len(prompts) == 5
    assert [prompts[i].content for i in range(5)] == [items[i]["question"] for i in range(5)]
    raw = prompts[4]
    assert (raw.source, raw.data["entry"]) == ("reasoning_gym_chain_sum", items[4])
    assert raw.data["answer"] == items[4]["answer"]
    for options, message in (({"name": "nothing"}, "not registered"), ({"name": "gcd", "config": {"x": 1}}, "'x'")):
        with pytest.raises(ValueError, match=message):
            ReasoningGymPrompts(**options)


@pytest.mark.slow
def test_a_reference_inside_of_an_answer_is_no_answer(gym):
    prompts = ReasoningGymPrompts("chain_sum", seed=1)
    answer = prompts[0].data["answer"]
    long = f"it may be {answer}, or not"
    assert gym.create_dataset("chain_sum").score_answer(long, prompts[0].data["entry"]) > 0  # the trap
    assert answers(prompts, long, answer, extraction="exact") == [WRONG, RIGHT]
    assert answers(prompts, long, extraction="last_number") == [RIGHT]
    tagged = [f"so <answer>{answer}</answer>", answer, f"<answer>{long}</answer>"]
    assert answers(prompts, *tagged) == [RIGHT, WRONG, WRONG]
    (raw,) = answers(prompts, long, extraction="exact", binary=False)
    assert 0 < raw.score < 1
    assert raw.correct is False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["countdown", "puzzle24", "fraction_simplification"])
def test_no_answer_is_no_reward(gym, name):
    prompts = ReasoningGymPrompts(name, size=1)
    entry = prompts[0].data["entry"]
    assert gym.create_dataset(name).score_answer(None, entry) == 0.01  # the trap
    assert answers(prompts, "no tag", "", "<answer></answer>") == [WRONG] * 3
    assert answers(prompts, "no tag", binary=False) == [WRONG]
    assert answers(prompts, "<answer>x</answer>", f"<answer>{entry['answer']}</answer>") == [WRONG, RIGHT]


@pytest.mark.slow
def test_a_task_without_a_reference_is_judged_by_its_rules(gym):
    prompts = ReasoningGymPrompts("propositional_logic", size=1, seed=1)
    data = prompts[0].data
    assert data["answer"] is None  # the trap: what compares with it finds every answer wrong, or None right
    right = data["entry"]["metadata"]["example_answer"]
    assert answers(prompts, f"<answer>{right}</answer>", "<answer>None</answer>", "<answer>Z</answer>", "x") == [
        RIGHT, WRONG, WRONG, WRONG,
    ]  # fmt: skip


@pytest.mark.slow
def test_gym_in_workers(gym):
    prompts = ReasoningGymPrompts("gcd", size=1)
    mixture = MixtureOfRewards([JudgeEntry(ReasoningGymJudge(), "gym", timeout=60.0)], workers=1)
    texts = [f"<answer>{prompts[0].data['answer']}</answer>", "none"]
    (group,) = score_groups(mixture, [texts], data=dict(prompts[0].data))
    mixture.close()
    assert [scored.reward for scored in group] == [1.0, 0.0]


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for make, package in (
        (ReasoningGymJudge, "reasoning-gym"),
        (lambda: ReasoningGymPrompts("gcd"), "reasoning-gym"),
        (MathVerifyJudge, "math-verify"),
    ):
        with pytest.raises(ImportError, match=rf"{package} is not installed: pip install 'lit-interns1\[rl\]'"):
            make()


def test_options():
    with pytest.raises(ValueError, match="extraction = 'pattern' must be"):
        ReasoningGymJudge(extraction="pattern")
    with pytest.raises(ValueError, match="float_rounding = -1"):
        MathVerifyJudge(float_rounding=-1)
