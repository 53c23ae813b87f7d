"""Mixture of rewards (arXiv 2508.15763, §5): every kind of feedback becomes one number per response.

    R_i = Σ_k w_k(source, rollout) · n_k(s_ik)        k over the judges that take the prompt's source

n is the identity, or (s − mean)/std over the group of responses to one prompt ("group": each reward is normalised
before they are mixed, arXiv 2601.05242, so that a judge with scores in −10 … 1 does not drown one with 0 and 1), or
over all that was judged in earlier rollout batches ("running"). The paper gives neither weights nor normalisation:
these are ours. A judge that fails gives no reward: see `JudgeEntry.required`.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal, get_args

from lit_interns1.rollout.collector import Rewards
from lit_interns1.rollout.judges.base import Failure, FailureCause, Judge, Judgement, Verdict, judge_samples
from lit_interns1.rollout.judges.workers import JudgePool, Task
from lit_interns1.rollout.running_moments import RunningMoments
from lit_interns1.rollout.samples import Prompt, Sample, ScoredSample

Normalization = Literal["none", "group", "running"]
CAUSES: tuple[FailureCause, ...] = get_args(FailureCause)
_Place = tuple[int, int]
"""(group, sample of the group)"""


@dataclass
class JudgeEntry:
    """A judge of the mixture.

    Attributes:
        judge: Who judges.
        name: Its name in metrics and messages, without "/".
        weight: w, or points (rollout, w) between which w is linear in the number of the rollout batch: a curriculum.
        sources: Sources whose prompts it judges, `*` stands for any characters; None = all.
        source_weights: Factor of w by source; sources that are not named have 1.
        normalize: n: "none", "group" or "running"; default: what the judge asks for, else "none".
        timeout: Seconds of a judgement in a worker process (of a whole group, for judges that judge groups).
        required: Whether a sample is masked if this judge fails. If not, the sample counts here as the mean of its
            group, which moves no advantage; it is masked only if all its judges fail.

    Raises:
        ValueError: If an option is out of range.
    """

    judge: Judge
    name: str
    weight: float | list[tuple[int, float]] = 1.0
    sources: list[str] | None = None
    source_weights: dict[str, float] | None = None
    normalize: Normalization | None = None
    timeout: float = 10.0
    required: bool = True

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"judge name = {self.name!r} must not be empty nor hold '/'")
        if self.normalize is None:
            self.normalize = getattr(self.judge, "normalize", "none")
        if self.normalize not in get_args(Normalization):
            choices = ", ".join(get_args(Normalization))
            raise ValueError(f"judge {self.name!r}: normalize = {self.normalize!r} must be one of {choices}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"judge {self.name!r}: timeout = {self.timeout} must be a positive number of seconds")
        points = self.weight if isinstance(self.weight, list) else [(0, self.weight)]
        rollouts = [rollout for rollout, _ in points]
        if not points or any(b <= a for a, b in pairwise(rollouts)):
            raise ValueError(f"judge {self.name!r}: weight = {self.weight} needs points with ascending rollouts")
        for weight in (*(weight for _, weight in points), *(self.source_weights or {}).values()):
            if not math.isfinite(weight):
                raise ValueError(f"judge {self.name!r}: a weight is {weight}")
        self._points = points

    @property
    def quick(self) -> bool:
        """Whether it runs in this process."""
        return bool(getattr(self.judge, "quick", False))

    def takes(self, source: str) -> bool:
        """Whether it judges prompts of a source."""
        return self.sources is None or any(fnmatchcase(source, pattern) for pattern in self.sources)

    def weight_at(self, source: str, rollout: int) -> float:
        """w of a source in a rollout batch."""
        factor = (self.source_weights or {}).get(source, 1.0)
        before = [point for point in self._points if point[0] <= rollout] or self._points[:1]
        after = [point for point in self._points if point[0] >= rollout] or self._points[-1:]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return factor * (y0 if x1 <= x0 else y0 + (y1 - y0) * (rollout - x0) / (x1 - x0))


class MixtureOfRewards(Rewards):
    """Judges samples and mixes what the judges say.

    The parts of each sample are the raw scores by judge, and 0 or 1 for `<judge>/failed_error`, `/failed_timeout` and
    `/failed_invalid`. A sample is `correct` if all judges that know right from wrong say so.

    Args:
        judges: At least one; prompts of a source need one that takes it.
        combine: How scores are combined; the weighted sum is the only way so far.
        binary: "plus_minus_one" makes ±1 of R, as OREAL needs it, "zero_one" 0 or 1; None leaves R as it is.
        threshold: R at and above it is 1.
        workers: Processes of this rank for judges that are not quick, started when the first is needed. 0 = all judges
            run in this process, and a judge that hangs stops the run.
        failed_rollouts: After so many rollout batches in a row in which a required judge failed on every sample it was
            asked about, the run ends with an error, since nothing can be learned.

    Raises:
        ValueError: If there is no judge, two have one name, or one cannot be sent to a worker process.
    """

    def __init__(
        self,
        judges: list[JudgeEntry],
        combine: Literal["weighted_sum"] = "weighted_sum",
        binary: Literal["plus_minus_one", "zero_one"] | None = None,
        threshold: float = 0.5,
        workers: int = 2,
        failed_rollouts: int = 3,
    ) -> None:
        names = [entry.name for entry in judges]
        if not judges or len(set(names)) < len(names):
            raise ValueError(f"judges: at least one, each with a name of its own, are wanted; got {names}")
        if combine != "weighted_sum":
            raise ValueError(f"combine = {combine!r} must be weighted_sum")
        if binary not in (None, "plus_minus_one", "zero_one"):
            raise ValueError(f"binary = {binary!r} must be plus_minus_one, zero_one or None")
        if workers < 0 or failed_rollouts < 1:
            raise ValueError(f"workers = {workers} must be at least 0, failed_rollouts = {failed_rollouts} at least 1")
        self.judges, self.binary, self.threshold, self.failed_rollouts = (
            list(judges),
            binary,
            threshold,
            failed_rollouts,
        )
        self.rollout = 0
        """Number of the rollout batch, for weights."""
        self.failures: dict[str, Counter[FailureCause]] = {name: Counter() for name in names}
        """How often each judge failed on this rank, by cause."""
        self.messages: dict[str, list[str]] = {name: [] for name in names}
        """What the first few failures of each judge were."""
        slow = [number for number, entry in enumerate(judges) if not entry.quick]
        self._pool = JudgePool([judges[number].judge for number in slow], workers) if slow and workers else None
        self._place_in_pool = {number: place for place, number in enumerate(slow)} if self._pool else {}
        self._moments: dict[tuple[str, str], RunningMoments] = {}
        self._new_moments: dict[tuple[str, str], RunningMoments] = {}
        self._tallies: dict[str, list[int]] = {}  # by judge: samples of this rollout batch, and those it failed on
        self._lost_rollouts: Counter[str] = Counter()

    def check_sources(self, sources: Iterable[str]) -> None:
        """Raises ValueError if no judge takes prompts of a source."""
        for source in sorted(set(sources)):
            if not any(entry.takes(source) for entry in self.judges):
                taken = "; ".join(f"{entry.name}: {', '.join(entry.sources or [])}" for entry in self.judges)
                raise ValueError(f"no judge takes prompts of source {source!r}; sources of the judges: {taken}")

    def close(self) -> None:
        """Ends the worker processes; they start again when they are needed."""
        if self._pool is not None:
            self._pool.close()

    # -- rollout batches ----------------------------------------------------------------------------------------------

    def start_rollout(self, number: int) -> None:
        """What is judged until `finish_rollout` belongs to this rollout batch, and to the statistics; what was judged
        before, since the last one, does not."""
        self.rollout, self._new_moments, self._tallies = number, {}, {}

    def finish_rollout(self, gather: Callable[[Any], list[Any]]) -> None:
        """Merges the statistics of all ranks.

        Args:
            gather: The value of every rank, in the same order everywhere.

        Raises:
            RuntimeError: If a required judge has failed on everything for too long; on all ranks.
        """
        parts = gather((self._new_moments, self._tallies, self.messages))
        for moments, _, _ in parts:
            for key, value in moments.items():
                self._moments[key] = self._moments.get(key, RunningMoments()).merged(value)
        for entry in self.judges:
            asked, failed = (sum(tallies.get(entry.name, [0, 0])[i] for _, tallies, _ in parts) for i in (0, 1))
            if asked:
                self._lost_rollouts[entry.name] = self._lost_rollouts[entry.name] + 1 if failed == asked else 0
            if entry.required and self._lost_rollouts[entry.name] >= self.failed_rollouts:
                told = "; ".join(dict.fromkeys(text for _, _, messages in parts for text in messages[entry.name]))
                raise RuntimeError(
                    f"judge {entry.name!r} failed on every sample of {self._lost_rollouts[entry.name]} rollout batches "
                    f"in a row (failed_rollouts = {self.failed_rollouts}): {told}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Statistics of the scores, and how long judges have failed."""
        moments = [[*key, *value.numbers()] for key, value in sorted(self._moments.items())]
        return {"rollout": self.rollout, "moments": moments, "lost_rollouts": dict(self._lost_rollouts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with them."""
        self.rollout = int(state["rollout"])
        self._moments = {(name, source): RunningMoments(*rest) for name, source, *rest in state["moments"]}
        self._lost_rollouts = Counter(state["lost_rollouts"])

    # -- judging ------------------------------------------------------------------------------------------------------

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]], texts: Sequence[Sequence[str]]
    ) -> list[list[ScoredSample]]:
        """The samples of each prompt with their rewards; NaN where there is no judgement, and for aborted samples.

        Raises:
            ValueError: If no judge takes a prompt's source.
        """
        self.check_sources(prompt.source for prompt in prompts)
        groups = [
            [i for i, sample in enumerate(group) if sample.finish_reason != "abort" and sample.response_ids]
            for group in samples
        ]
        verdicts = self._verdicts(prompts, samples, texts, groups)
        return [
            self._mixed(prompt, group, [dict(by[g]) for by in verdicts], samples[g], texts[g])
            for g, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]

    def _verdicts(
        self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]], texts: Sequence[Sequence[str]],
        groups: Sequence[Sequence[int]],
    ) -> list[list[list[tuple[int, Verdict]]]]:  # fmt: skip
        """By judge, then by group: (sample, verdict)."""
        found: list[list[list[tuple[int, Verdict]]]] = [[[] for _ in prompts] for _ in self.judges]
        tasks: list[Task] = []
        places: list[tuple[int, list[_Place]]] = []
        quick: list[tuple[int, list[_Place]]] = []
        for number, entry in enumerate(self.judges):
            asked = [[(g, i) for i in group] for g, group in enumerate(groups) if entry.takes(prompts[g].source)]
            if number not in self._place_in_pool:
                quick.append((number, [place for group in asked for place in group]))
                continue
            batched = getattr(entry.judge, "judge_batch", None) is not None
            for part in asked if batched else [[place] for group in asked for place in group]:
                if part:
                    chosen = [prompts[g] for g, _ in part], [texts[g][i] for g, i in part]
                    kept = [samples[g][i] for g, i in part]
                    tasks.append(Task(self._place_in_pool[number], entry.timeout, *chosen, kept))
                    places.append((number, part))
        for number, part in quick:
            judged = judge_samples(
                self.judges[number].judge, [prompts[g] for g, _ in part], [texts[g][i] for g, i in part],
                [samples[g][i] for g, i in part],
            ) if part else []  # fmt: skip
            for (g, i), verdict in zip(part, judged, strict=True):
                found[number][g].append((i, verdict))
        for (number, part), judged in zip(places, self._pool.run(tasks) if self._pool and tasks else [], strict=True):
            for (g, i), verdict in zip(part, judged, strict=True):
                found[number][g].append((i, verdict))
        return found

    def _mixed(
        self, prompt: Prompt, group: Sequence[int], verdicts: Sequence[dict[int, Verdict]], samples: Sequence[Sample],
        texts: Sequence[str],
    ) -> list[ScoredSample]:  # fmt: skip
        """The samples of one prompt."""
        scored = [
            ScoredSample(prompt, sample, text, math.nan) for sample, text in zip(samples, texts, strict=True)
        ]  # fmt: skip
        sums = dict.fromkeys(group, 0.0)
        judged: set[int] = set()
        for entry, by_sample in zip(self.judges, verdicts, strict=True):
            if not by_sample:
                continue
            self._tally(entry, prompt, by_sample)
            raw = {i: v.score for i, v in by_sample.items() if isinstance(v, Judgement)}
            value = self._normalized(entry, prompt.source, raw)
            instead = math.nan if entry.required else statistics.fmean(value.values()) if value else 0.0
            weight = entry.weight_at(prompt.source, self.rollout)
            for i in group:
                sums[i] += weight * value.get(i, instead)
                verdict = by_sample[i]
                failed = verdict.cause if isinstance(verdict, Failure) else None
                scored[i].parts[entry.name] = raw.get(i, math.nan)
                scored[i].parts |= {f"{entry.name}/failed_{cause}": float(failed == cause) for cause in CAUSES}
                if isinstance(verdict, Judgement):
                    judged.add(i)
                    if verdict.correct is not None:
                        scored[i].correct = verdict.correct and scored[i].correct is not False
        for i in judged:
            scored[i].reward = sums[i]
            if self.binary is not None and not math.isnan(sums[i]):
                passed = sums[i] >= self.threshold
                scored[i].reward = float(passed) if self.binary == "zero_one" else 2.0 * passed - 1.0
                scored[i].correct = passed if scored[i].correct is None else scored[i].correct
        return scored

    def _normalized(self, entry: JudgeEntry, source: str, raw: dict[int, float]) -> dict[int, float]:
        """n of the scores of a group."""
        if entry.normalize == "none" or not raw:
            return raw
        here = RunningMoments.of(raw.values())
        used = here
        if entry.normalize == "running":
            key = (entry.name, source)
            self._new_moments[key] = self._new_moments.get(key, RunningMoments()).merged(here)
            earlier = self._moments.get(key, RunningMoments())
            used = earlier if earlier.std > 0 else here  # nothing is known yet: as "group"
        return {i: (score - used.mean) / used.std if used.std > 0 else 0.0 for i, score in raw.items()}

    def _tally(self, entry: JudgeEntry, prompt: Prompt, by_sample: Mapping[int, Verdict]) -> None:
        """Counts failures, keeps the first few messages, and warns once."""
        failed = [verdict for verdict in by_sample.values() if isinstance(verdict, Failure)]
        asked, lost = self._tallies.get(entry.name, [0, 0])
        self._tallies[entry.name] = [asked + len(by_sample), lost + len(failed)]
        for failure in failed:
            where = f"{failure.cause}, prompt {prompt.index} of source {prompt.source!r}: {failure.message}"
            if not self.failures[entry.name]:
                effect = (
                    "such samples are masked" if entry.required else "such samples count as the mean of their group"
                )
                warnings.warn(f"judge {entry.name!r} failed ({where}); {effect}", UserWarning, stacklevel=2)
            self.failures[entry.name][failure.cause] += 1
            if len(self.messages[entry.name]) < 3:
                self.messages[entry.name].append(where)
