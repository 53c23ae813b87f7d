import copy
import math
import os
import statistics
import warnings
from collections import Counter

import jsonargparse
import pytest
import torch

from judged_samples import prompt, sample, score_groups
from lit_interns1.rollout import JudgeEntry, MixtureOfRewards, Sample, SamplingOptions
from lit_interns1.rollout.collector import Collector, Selection
from lit_interns1.rollout.judges import AnswerJudge, Judgement
from lit_interns1.rollout.plan import RolloutPlan
from lit_interns1.rollout.prompt_format import PromptFormat
from lit_interns1.rollout.prompts import RawPrompt, ShuffledPrompts
from lit_interns1.rollout.rollout_data_module import RolloutDataModule
from lit_interns1.rollout.running_moments import RunningMoments
from strange_judges import ODD, GroupJudge, ProcessJudge, StrangeJudge, UnloadableJudge


class Lookup:
    """The score of a text is in the prompt's data, if the judge's name is."""

    quick = True

    def __init__(self, name, normalize=None):
        self.name = name
        if normalize:
            self.normalize = normalize

    def judge(self, prompt, text, sample):
        score = prompt.data[self.name][int(text)]
        if score is None:
            raise ValueError("no score")
        return Judgement(score, score > 0 if self.name == "right" else None)


def quiet(mixture, *arguments, **options):
    """Scores with failures that are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score_groups(mixture, *arguments, **options)


def rewards(groups):
    return [[scored.reward for scored in group] for group in groups]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooled():
    """Judges in worker processes, which start but once."""
    judges = [
        JudgeEntry(StrangeJudge(), "strange", timeout=1.0, sources=["tasks"]),
        JudgeEntry(ProcessJudge(), "process", sources=["process"]),
        JudgeEntry(GroupJudge(), "group", timeout=1.0, sources=["group"]),
    ]
    original = MixtureOfRewards(judges, workers=2)
    mixture = copy.deepcopy(original)  # as a spawning strategy would
    yield mixture
    assert original._pool.processes == []
    mixture.close()


CAUSES = {"raise": "error", "exit": "error", "die": "error", "hang": "timeout", "sleep": "timeout"} | dict.fromkeys(
    ODD, "invalid"
)


def test_failures_mask_their_sample_alone_and_are_counted(pooled):
    texts = ["1234567", *CAUSES, "12"]
    with pytest.warns(UserWarning, match="judge 'strange' failed .*such samples are masked") as told:
        (group,) = score_groups(pooled, [texts], "tasks")
    assert len(told) == 1  # the first alone
    assert group[0].reward == 0.7
    assert (group[0].correct, group[-1].correct) == (True, False)
    assert group[-1].reward == 0.2
    for scored in group[1:-1]:
        cause = CAUSES[scored.text]
        assert math.isnan(scored.reward), scored.text
        assert (scored.counts, scored.correct) == (False, None), scored.text
        assert math.isnan(scored.parts["strange"])
        assert {c: scored.parts[f"strange/failed_{c}"] for c in ("error", "timeout", "invalid")} == {
            c: float(c == cause) for c in ("error", "timeout", "invalid")
        }, scored.text
    assert pooled.failures["strange"] == Counter(CAUSES.values())
    assert len(pooled.messages["strange"]) == 3
    assert "prompt 0 of source 'tasks': KeyError: 'no such thing'" in pooled.messages["strange"][0]
    # nothing is left behind, and the next call is served
    assert rewards(quiet(pooled, [["123", "1"], ["12"]], "tasks")) == [[0.3, 0.1], [0.2]]


def test_quick_judges_fail_in_the_same_way():
    judge = StrangeJudge(quick=True)
    mixture = MixtureOfRewards([JudgeEntry(judge, "strange")], workers=2)
    (group,) = quiet(mixture, [["1234567", "raise", *ODD]])
    assert [scored.counts for scored in group] == [True] + [False] * (1 + len(ODD))
    assert mixture.failures["strange"] == Counter(error=1, invalid=len(ODD))
    assert not mixture._pool
    judge.score_range = None  # where any number may be a score, these are still none
    (group,) = quiet(mixture, [["not a number", "infinite", "text", "too large"]])
    assert [scored.counts for scored in group] == [False, False, False, True]


def test_judges_of_groups_get_one_group_and_lose_one_group(pooled):
    found = rewards(quiet(pooled, [["b", "a", "c"], ["hang", "d"], ["x", ""]], "group"))
    assert found[0] == [1, 0, 2]
    assert all(math.isnan(value) for value in (*found[1], found[2][1]))
    assert found[2][0] == 1
    assert pooled.failures["group"] == Counter(timeout=2, error=1)


def test_judges_run_beside_each_other_in_processes_that_stay(pooled):
    seen = {scored.reward for _ in range(3) for scored in score_groups(pooled, [["a"] * 20], "process")[0]}
    assert seen == set(pooled._pool.processes)
    assert os.getpid() not in seen
    pooled.close()
    assert pooled._pool.processes == []
    for process in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
    here = MixtureOfRewards([JudgeEntry(ProcessJudge(), "process")], workers=0)
    assert rewards(score_groups(here, [["a"]])) == [[os.getpid()]]


def test_a_worker_that_cannot_load_its_judges_is_an_error():
    mixture = MixtureOfRewards([JudgeEntry(UnloadableJudge(), "judge")], workers=1)
    with pytest.raises(RuntimeError, match="could not load the judges: OSError: the licence server is down"):
        score_groups(mixture, [["a"]])


def test_judges_that_cannot_be_sent_are_refused_at_once():
    judge = StrangeJudge()
    judge.function = lambda: None
    with pytest.raises(ValueError, match=r"StrangeJudge cannot be sent to a worker process .* workers = 0"):
        MixtureOfRewards([JudgeEntry(judge, "judge")])
    judge.function = type("Local", (), {"__module__": "__main__"})
    with pytest.raises(ValueError, match=r"StrangeJudge"):
        MixtureOfRewards([JudgeEntry(judge, "judge")])
    assert MixtureOfRewards([JudgeEntry(judge, "judge")], workers=0)


def test_aborted_samples_are_not_judged():
    mixture = MixtureOfRewards([JudgeEntry(StrangeJudge(quick=True), "strange")])
    samples = [sample(), sample(finish_reason="abort"), sample(0, "abort"), sample(finish_reason="length")]
    (group,) = mixture([prompt()], [samples], [["123", "raise", "", "1"]])
    assert [scored.counts for scored in group] == [True, False, False, True]
    assert group[1].parts == {}
    assert mixture.failures["strange"] == Counter()


# -- mixing -----------------------------------------------------------------------------------------------------------


def test_worked_example():
    """The example of docs/rewards.md, by hand."""
    judges = [
        JudgeEntry(Lookup("right"), "right", weight=1.0),
        JudgeEntry(Lookup("polar", normalize="group"), "polar", weight=0.5),
        JudgeEntry(Lookup("length"), "length", weight=[(0, 0.0), (100, 0.2)]),
    ]
    mixture = MixtureOfRewards(judges)
    data = {"right": [1, 0, 1, 0], "polar": [-1.0, -4.0, -2.0, -5.0], "length": [0.0, 0.0, -1.0, -0.5]}
    mixture.start_rollout(50)  # half of the way to 0.2
    (group,) = score_groups(mixture, [["0", "1", "2", "3"]], data=data)
    # polar: mean −3, std √(10/3) = 1.8257 → 1.0954, −0.5477, 0.5477, −1.0954
    expected = [1 + 0.5477, 0 - 0.27386, 1 + 0.27386 - 0.1, 0 - 0.5477 - 0.05]
    assert [scored.reward for scored in group] == pytest.approx(expected, abs=1e-4)
    assert [scored.correct for scored in group] == [True, False, True, False]
    assert [scored.parts["polar"] for scored in group] == data["polar"]  # raw


def test_group_normalisation_is_that_of_statistics_and_exact_at_equal_scores():
    mixture = MixtureOfRewards([JudgeEntry(Lookup("a"), "a", normalize="group")])
    scores = [0.1, 3.0, -7.5, 2.25, None]
    (group,) = quiet(mixture, [["0", "1", "2", "3", "4"]], data={"a": scores})
    known = scores[:4]
    assert [scored.reward for scored in group[:4]] == pytest.approx(
        [(s - statistics.mean(known)) / statistics.stdev(known) for s in known], rel=1e-12
    )
    assert math.isnan(group[4].reward)
    equal = score_groups(mixture, [["0", "0", "0"], ["0"]], data={"a": [0.1]})
    assert rewards(equal) == [[0.0, 0.0, 0.0], [0.0]]


def test_sources_choose_judges_and_weights():
    judges = [
        JudgeEntry(Lookup("a"), "a", sources=["math", "gym_*"], source_weights={"gym_sum": 3.0}),
        JudgeEntry(Lookup("b"), "b", sources=["gym_*", "chat"], weight=0.5),
    ]
    mixture, data = MixtureOfRewards(judges), {"a": [1.0], "b": [10.0]}
    found = {
        source: score_groups(mixture, [["0"]], source, data)[0][0] for source in ("math", "gym_sum", "gym_x", "chat")
    }
    assert {source: scored.reward for source, scored in found.items()} == {
        "math": 1.0, "gym_sum": 3.0 + 5.0, "gym_x": 1.0 + 5.0, "chat": 5.0,
    }  # fmt: skip
    assert "b" not in found["math"].parts
    with pytest.raises(ValueError, match=r"no judge takes prompts of source 'code'.* a: math, gym_\*; b: gym_\*, chat"):
        score_groups(mixture, [["0"]], "code", data)
    with pytest.raises(ValueError, match="'code'"):
        mixture.check_sources(["math", "code"])


def test_optional_judges_move_no_advantage_when_they_fail():
    data = {"right": [1, 0, None], "b": [4.0, None, 2.0]}
    judges = [JudgeEntry(Lookup("right"), "right"), JudgeEntry(Lookup("b"), "b", required=False)]
    (group,) = quiet(MixtureOfRewards(judges), [["0", "1", "2"]], data=data)
    assert [scored.reward for scored in group[:2]] == [1 + 4.0, 0 + 3.0]  # the mean of 4 and 2
    assert math.isnan(group[2].reward)  # a required judge failed
    # without any score of the group it adds nothing; where every judge fails there is no reward
    (group,) = quiet(MixtureOfRewards(judges), [["0", "1"]], data={"right": [1, 0], "b": [None, None]})
    assert [scored.reward for scored in group] == [1.0, 0.0]
    both = [JudgeEntry(Lookup(name), name, required=False) for name in ("a", "b")]
    (group,) = quiet(MixtureOfRewards(both), [["0", "1"]], data={"a": [None, 1.0], "b": [None, 1.0]})
    assert math.isnan(group[0].reward)
    assert group[1].reward == 2.0


def test_correct_is_what_all_judges_that_know_say():
    class Says(Lookup):
        def judge(self, prompt, text, sample):
            return Judgement(0.0, prompt.data[self.name][int(text)])

    both = [(True, True), (True, False), (False, True), (None, True), (None, False), (None, None)]
    data = {"a": [a for a, _ in both], "b": [b for _, b in both]}
    mixture = MixtureOfRewards([JudgeEntry(Says(name), name) for name in ("a", "b")])
    (group,) = score_groups(mixture, [[str(i) for i in range(len(both))]], data=data)
    assert [scored.correct for scored in group] == [True, False, False, True, False, None]


@pytest.mark.parametrize(("binary", "values"), [("plus_minus_one", (1.0, -1.0)), ("zero_one", (1.0, 0.0))])
def test_binary_rewards(binary, values):
    judges = [JudgeEntry(Lookup("a"), "a"), JudgeEntry(Lookup("b"), "b", weight=0.1)]
    mixture = MixtureOfRewards(judges, binary=binary, threshold=1.0)
    (group,) = quiet(mixture, [["0", "1", "2"]], data={"a": [1.0, 1.0, None], "b": [0.0, -1.0, 1.0]})
    assert [scored.reward for scored in group[:2]] == list(values)
    assert [scored.correct for scored in group] == [True, False, None]  # no judge knows, so the threshold does
    assert math.isnan(group[2].reward)


def test_curriculum_of_weights():
    entry = JudgeEntry(Lookup("a"), "a", weight=[(10, 1.0), (20, 0.0), (40, 2.0)], source_weights={"x": 0.5})
    assert [entry.weight_at("", n) for n in (0, 10, 15, 20, 30, 40, 99)] == [1.0, 1.0, 0.5, 0.0, 1.0, 2.0, 2.0]
    assert entry.weight_at("x", 30) == 0.5


def test_running_normalisation_uses_earlier_rollouts_of_all_ranks_and_continues():
    def new():
        return MixtureOfRewards([JudgeEntry(Lookup("a"), "a", normalize="running")])

    first, second = [1.0, 2.0, 4.0, 9.0], [10.0, -3.0]
    ranks = [new(), new()]
    for mixture, scores in zip(ranks, (first, second)):
        mixture.start_rollout(0)
        score_groups(mixture, [[str(i)] for i in range(len(scores))], "s", {"a": scores})
    parts = [(m._new_moments, m._tallies, m.messages) for m in ranks]
    for mixture in ranks:
        mixture.finish_rollout(lambda _: parts)
    everything = first + second
    expected = (7.0 - statistics.mean(everything)) / statistics.stdev(everything)
    resumed = new()
    resumed.load_state_dict(copy.deepcopy(ranks[1].state_dict()))
    for mixture in (*ranks, resumed):
        mixture.start_rollout(1)
        (((scored,)),) = score_groups(mixture, [["0"]], "s", {"a": [7.0]})
        assert scored.reward == pytest.approx(expected, rel=1e-12)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    # validation, between rollout batches, leaves no trace
    alone, other = new(), new()
    for mixture, validation in ((alone, []), (other, [1e6])):
        for number, scores in enumerate((first, validation, second)):
            if scores is not validation:
                mixture.start_rollout(number)
            score_groups(mixture, [[str(i) for i in range(len(scores))]], "s", {"a": scores})
            if scores is not validation:
                mixture.finish_rollout(lambda mine: [mine])
    assert alone.state_dict() == other.state_dict()


def test_moments_of_parts_are_those_of_the_whole():
    values = [1e6 + x for x in (0.1, 0.2, 0.5, 0.9, 1.4)]
    merged = RunningMoments.of(values[:2]).merged(RunningMoments()).merged(RunningMoments.of(values[2:]))
    assert merged.std == pytest.approx(statistics.stdev(values), rel=1e-6)
    assert merged.mean == pytest.approx(statistics.mean(values))


def test_a_judge_that_always_fails_ends_the_run_on_all_ranks():
    mixture = MixtureOfRewards([JudgeEntry(Lookup("a"), "a")], failed_rollouts=2)

    def rollout(number, scores, gather=lambda mine: [mine]):
        mixture.start_rollout(number)
        quiet(mixture, [[str(i) for i in range(len(scores))]], data={"a": scores})
        mixture.finish_rollout(gather)

    rollout(0, [None, None])
    rollout(1, [None, 1.0])
    rollout(2, [None])
    rollout(3, [None], lambda mine: [mine, ({}, {"a": [4, 3]}, {"a": []})])  # another rank has a judgement
    rollout(4, [None])
    with pytest.raises(
        RuntimeError, match=r"judge 'a' failed on every sample of 2 rollout batches.*ValueError: no score"
    ):
        rollout(5, [None])


class Numbers:
    """Prompts of one source, with the scores of their samples."""

    def __init__(self, scores, source="s"):
        self.scores, self.source = scores, source

    def __len__(self):
        return len(self.scores)

    def __getitem__(self, index):
        return RawPrompt("number", self.source, {"a": self.scores[index]})


def test_in_a_rollout_batch():
    """What the collector does with the mixture: numbers of rollouts, statistics, figures."""
    form = PromptFormat(style="plain")
    mixture = MixtureOfRewards([JudgeEntry(Lookup("a"), "a", weight=[(0, 1.0), (4, 3.0)])], failed_rollouts=2)
    sampler = ShuffledPrompts()
    sampler.start(["s"] * 2, 0)
    prompts = Numbers([[1.0, None], [4.0, 5.0]])

    def generate(requests, options, enough):
        texts = [[form.tokenizer.encode(str(i)) for i in range(len(r.seeds))] for r in requests]
        return [
            [Sample(r.prompt_ids, ids, torch.zeros(1), "stop", 0, torch.zeros(1, dtype=torch.int64)) for ids in group]
            for r, group in zip(requests, texts)
        ]

    options = SamplingOptions(8, stop_ids=form.stop_ids)
    collector = Collector(prompts, sampler, form, mixture, RolloutPlan(2, 2, 1, 2), Selection(), options)
    with pytest.warns(UserWarning, match="no score"):
        collected = collector.collect(2, generate)
    assert mixture.rollout == 2
    assert sorted(s.reward for s in collected.samples if s.counts) == [2.0, 8.0, 10.0]  # weight 2
    figures = {name: total / count for name, (total, count) in collected.sums.items()}
    assert figures["judge/a"] == 10 / 3
    assert figures["judge/a/failed_error"] == figures["failed"] == 0.25
    assert figures["judge/a/failed_timeout"] == figures["judge/a/failed_invalid"] == 0
    assert figures["reward/s"] == 20 / 3
    prompts.scores = [[None, None], [None, None]]
    collector.collect(3, generate)
    with pytest.raises(RuntimeError, match="failed on every sample of 2 rollout batches"):
        collector.collect(4, generate)


def test_the_data_module_checks_sources_before_anything_is_generated():
    mixture = MixtureOfRewards([JudgeEntry(Lookup("a"), "a", sources=["s"])])
    data = RolloutDataModule(Numbers([[1.0]]), mixture, Numbers([[1.0]], "other"), PromptFormat(style="plain"))
    with pytest.raises(ValueError, match="no judge takes prompts of source 'other'"):
        data.setup("fit")


def test_options_are_checked():
    judge = Lookup("a")
    for options, message in (
        ({"name": "a/b"}, "must not be empty nor hold"),
        ({"normalize": "batch"}, "normalize = 'batch' must be one of none, group, running"),
        ({"timeout": 0}, "timeout = 0 must be a positive"),
        ({"weight": []}, "ascending"),
        ({"weight": [(5, 1.0), (5, 2.0)]}, "ascending"),
        ({"weight": math.inf}, "a weight is inf"),
        ({"source_weights": {"x": math.nan}}, "a weight is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeEntry(**{"judge": judge, "name": "a"} | options)
    entry = JudgeEntry(judge, "a")
    for arguments, message in (
        ({"judges": []}, "at least one"),
        ({"judges": [entry, JudgeEntry(judge, "a")]}, "a name of its own"),
        ({"combine": "product"}, "combine = 'product'"),
        ({"binary": "yes"}, "binary = 'yes'"),
        ({"workers": -1}, "workers = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfRewards(**{"judges": [entry]} | arguments)


def test_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(MixtureOfRewards, "rewards")
    config = parser.parse_string("""
rewards:
  judges:
    - judge: {class_path: AnswerJudge, init_args: {extraction: tag}}
      name: answer
      weight: [[0, 1.0], [50, 0.5]]
      sources: [chain_sum]
  binary: plus_minus_one
""")
    mixture = parser.instantiate(config).rewards
    assert isinstance(mixture.judges[0].judge, AnswerJudge)
    assert mixture.judges[0].weight_at("", 25) == 0.75
