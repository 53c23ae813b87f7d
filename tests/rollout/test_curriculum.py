import copy
import json
import math
from collections import Counter

import jsonargparse
import pytest

from lit_interns1.rollout import CurriculumPrompts
from lit_interns1.rollout.curriculum import OREAL_BUCKETS
from lit_interns1.rollout.prompts import PromptError, PromptOutcome

NAN = math.nan


@pytest.fixture
def file(tmp_path):
    def write(*rates):
        path = tmp_path / "rates.jsonl"
        lines = [rate if isinstance(rate, str) else json.dumps({"index": i, "pass_rate": rate}) for i, rate in rates]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def started(count=10, sources=None, seed=3, **options):
    sampler = CurriculumPrompts(**options)
    sampler.start(sources or ["s"] * count, seed)
    return sampler


def outcome(index, correct, rewards=(1.0, 0.0), source="s"):
    return PromptOutcome(index, source, rewards, correct)


def test_buckets_of_oreal_leave_out_and_repeat(file):
    rates = [0.0, 0.19, 0.2, 0.5, 0.6, 0.79, 0.8, 1.0]
    path = file(*enumerate(rates))
    sampler = started(9, pass_rates=path)  # number 8 was not measured
    expected = {0: 6, 1: 6, 2: 4, 3: 4, 4: 2, 5: 2, 8: 1}
    epoch = sum(expected.values())
    first, second = sampler.draw(epoch), sampler.draw(epoch)
    assert Counter(first) == Counter(second) == expected
    assert first != second
    assert [(low, high) for low, high, _ in OREAL_BUCKETS] == [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8)]
    everything = started(9, pass_rates=path, buckets=[(0.2, 1.0, 1)])
    assert Counter(everything.draw(7)) == dict.fromkeys([2, 3, 4, 5, 6, 7, 8], 1)  # high = 1 holds 1
    assert Counter(started(9, pass_rates=path, buckets=None).draw(9)) == dict.fromkeys(range(9), 1)


def test_outcomes_change_pass_rates_in_the_next_epoch():
    sampler = started(3, momentum=0.75)
    sampler.draw(1)
    sampler.report([outcome(0, 1.0), outcome(1, 0.5), outcome(1, 0.0), outcome(2, NAN), outcome(2, 0.0, (1.0, NAN))])
    assert sampler.rates[:2].tolist() == [1.0, 0.75 * 0.5]
    assert math.isnan(sampler.rates[2])  # no judge knows; and part of the group was not judged
    assert len(sampler.draw(2)) == 2  # the rest of the first epoch
    assert Counter(sampler.draw(5)) == {1: 4, 2: 1}
    assert math.isnan(started(3, online=False).rates[0])
    fixed = started(3, online=False)
    fixed.report([outcome(0, 1.0)])
    assert Counter(fixed.draw(6)) == {0: 2, 1: 2, 2: 2}


def test_when_everything_is_solved_the_epoch_takes_all():
    sampler = started(3)
    sampler.draw(3)
    sampler.report([outcome(i, 1.0) for i in range(3)])
    with pytest.warns(UserWarning, match="pass rates of all 3 prompts of a source are outside"):
        assert sorted(sampler.draw(3)) == [0, 1, 2]


def test_hard_prompts_are_replayed():
    sampler = started(1000, replay=0.3, replay_below=0.5, replay_memory=4, buckets=None, momentum=0.0)
    assert len(set(sampler.draw(100))) == 100  # nothing is hard yet
    hard = [700, 701, 702, 703, 704]
    sampler.report([outcome(i, 0.25) for i in hard] + [outcome(705, 0.5)])
    drawn = Counter(index for _ in range(250) for index in sampler.draw(2))
    replayed = sum(drawn[i] for i in hard[1:])  # the memory holds four
    assert abs(replayed - 0.3 * 500) < 3 * (500 * 0.3 * 0.7) ** 0.5
    assert min(drawn[i] for i in hard[1:]) > 15
    assert drawn[700] <= 1
    assert drawn[705] <= 1
    sampler.report([outcome(i, 1.0) for i in hard])  # solved
    assert len(set(sampler.draw(100))) == 100
    # not twice in one draw
    sampler.report([outcome(i, 0.0) for i in hard])
    assert all(Counter(sampler.draw(8))[i] <= 2 for _ in range(20) for i in hard)


def test_prompts_without_a_judgement_come_again_but_not_for_ever():
    sampler = started(100, requeue=2, buckets=None)
    first = sampler.draw(4)
    lost, kept = first[:2], first[2:]

    def report(indices, rewards):
        sampler.report([outcome(i, NAN, rewards) for i in indices])

    report(lost, (NAN, NAN))
    report(kept, (NAN, 1.0))
    for _ in range(2):
        drawn = sampler.draw(4)
        assert drawn[:2] == lost
        assert not set(drawn[2:]) & set(first)
        report(lost, (NAN, NAN))
    assert not set(sampler.draw(4)) & set(lost)
    report(lost, (1.0, 1.0))  # a judgement makes a new beginning
    report(lost, (NAN, NAN))
    assert sampler.draw(2) == lost


def test_weights_of_sources():
    sources = ["a"] * 90 + ["b"] * 10 + ["c"] * 5
    sampler = started(sources=sources, source_weights={"a": 1.0, "b": 3.0, "c": 0.0})
    drawn = sampler.draw(40)
    assert Counter(sources[i] for i in drawn) == {"a": 10, "b": 30}
    assert Counter(i for i in drawn if sources[i] == "b") == dict.fromkeys(range(90, 100), 3)  # three epochs
    assert Counter(sources[i] for i in started(sources=sources).draw(105)) == {"a": 90, "b": 10, "c": 5}
    by_default = started(sources=sources, source_weights={"a": 2.0})
    assert Counter(sources[i] for i in by_default.draw(40)) == {"a": 20, "b": 10, "c": 10}


OPTIONS = {"replay": 0.3, "requeue": 1, "source_weights": {"a": 1.0, "b": 2.0}, "replay_below": 0.5}


def life(sampler, rounds, first=0):
    """Draws and outcomes that depend on round and prompt alone."""
    drawn = []
    for turn in range(first, first + rounds):
        indices = sampler.draw(7)
        drawn.append(indices)
        lost = [i for i in indices if (i + turn) % 5 == 0]
        sampler.report([
            outcome(i, NAN, (NAN, NAN)) if i in lost else outcome(i, ((i * 7 + turn) % 4) / 4) for i in indices
        ])  # fmt: skip
    return drawn


def test_the_same_on_all_ranks_and_after_a_resume():
    sources = ["a", "b"] * 15
    whole = started(sources=sources, **OPTIONS)
    expected = life(whole, 30)
    assert life(started(sources=sources, **OPTIONS), 30) == expected
    assert life(started(sources=sources, seed=4, **OPTIONS), 30) != expected
    for stop in (1, 11, 23):
        first = started(sources=sources, **OPTIONS)
        assert life(first, stop) == expected[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        again = started(sources=sources, **OPTIONS)
        again.load_state_dict(copy.deepcopy(state))
        assert again.state_dict() == first.state_dict()
        assert life(again, 30 - stop, stop) == expected[stop:]
    assert again.state_dict() == whole.state_dict()


def test_the_state_of_other_prompts_is_refused():
    state = started(5).state_dict()
    with pytest.raises(ValueError, match=r"the state is that of 5 prompts in 1 sources .* here are 6 in 1"):
        started(6).load_state_dict(state)
    with pytest.raises(ValueError, match="must be those of the first run"):
        started(sources=["a", "b"] * 3, source_weights={"a": 0.0}).load_state_dict(started(6).state_dict())


def test_files_are_checked_by_line(file):
    for rates, message in (
        ([(0, 0.5), (1, 1.5)], "line 2: index = 1 .* pass_rate = 1.5"),
        ([(-1, 0.5)], "line 1: index = -1"),
        ([(0, 0.5), (0, 0.6)], "line 2: prompt 0 is in line 1, too"),
        ([(0, "{'index': 0}")], "line 1: an object with index and pass_rate"),
        ([(0, "[1]")], "line 1: an object with index and pass_rate"),
        ([(0, '{"index": 0}')], "line 1: an object with index and pass_rate"),
    ):
        with pytest.raises(PromptError, match=message):
            CurriculumPrompts(pass_rates=file(*rates))
    with pytest.raises(PromptError, match="line 2: there is no prompt 10, only 10"):
        started(10, pass_rates=file((0, 0.5), (10, 0.5)))
    with pytest.raises(PromptError, match="No such file"):
        CurriculumPrompts(pass_rates="nowhere.jsonl")
    with pytest.raises(ValueError, match="no prompt is left to be drawn: of 2, 2 have a pass rate"):
        started(2, pass_rates=file((0, 0.9), (1, 1.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": 1.0}, r"replay = 1.0 must lie in \[0, 1\)"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"replay_memory": 0}, "replay_memory = 0"),
        ({"requeue": -1}, "requeue = -1"),
        ({"buckets": []}, "at least one is needed"),
        ({"buckets": [(0.5, 0.2, 1)]}, r"got \(0.5, 0.2, 1\)"),
        ({"buckets": [(0.0, 0.5, 1), (0.4, 0.6, 1)]}, r"got \(0.4, 0.6, 1\)"),
        ({"buckets": [(0.0, 0.5, -1)]}, "times ≥ 0"),
        ({"source_weights": {"a": -1.0}}, "the weight of 'a' is -1.0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        CurriculumPrompts(**options)
    with pytest.raises(ValueError, match="there is no source 'x'; there are s"):
        started(3, source_weights={"x": 1.0})


def test_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(CurriculumPrompts, "sampler")
    config = parser.parse_string("sampler: {buckets: [[0.0, 0.5, 2]], replay: 0.1, source_weights: {a: 2.0}}")
    assert parser.instantiate(config).sampler.buckets == ((0.0, 0.5, 2),)
