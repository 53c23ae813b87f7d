"""What a judge is, and what becomes of a judge that fails.

    judge(prompt, text, sample) → Judgement(score, correct)

A judge may fail: it raises, it hangs, or what it returns is no judgement. A failure is never turned into a score: not
into 0, which says "wrong", and not into any other number. The sample is masked, and the failure counted by its cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol

from lit_interns1.rollout.samples import Prompt, Sample

FailureCause = Literal["error", "timeout", "invalid"]
"""It raised or died; it took too long; what it returned is none (None, NaN, infinite, out of range, another type)."""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a response.

    Attributes:
        score: Larger is better; finite.
        correct: Whether the response is right; None = the judge does not know right from wrong.
    """

    score: float
    correct: bool | None = None


class Judge(Protocol):
    """Judges responses.

    Three attributes and a method are optional:

        quick           True: it always returns soon, so it runs in this process, without a timeout. Else it runs in a
                        worker process, which is stopped when the timeout is over: it must be picklable.
        score_range     (low, high): scores outside are failures.
        normalize       How `MixtureOfRewards` normalises its scores by default.
        judge_batch     (prompts, texts, samples) → a list of judgements, or of an exception for each that failed. A
                        worker gives it one group at a time; a quick judge gets whatever there is.
    """

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """The judgement of one response.

        Args:
            prompt: The task, with what judges need in `data`.
            text: The response, without special tokens.
            sample: The response as tokens.
        """


class Failure(NamedTuple):
    """Why there is no judgement."""

    cause: FailureCause
    message: str


Verdict = Judgement | Failure


def judge_samples(
    judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str], samples: Sequence[Sample]
) -> list[Verdict]:
    """What a judge says of each sample, in order; whatever it raises is a failure of the samples it was asked about."""
    batch = getattr(judge, "judge_batch", None)
    if batch is None:
        found: list[Any] = []
        for prompt, text, sample in zip(prompts, texts, samples, strict=True):
            try:
                found.append(judge.judge(prompt, text, sample))
            except Exception as error:
                found.append(error)
    else:
        try:
            found = list(batch(prompts, texts, samples))
            if len(found) != len(samples):
                raise ValueError(f"judge_batch gave {len(found)} judgements for {len(samples)} samples")
        except Exception as error:
            found = [error] * len(samples)
    limits = getattr(judge, "score_range", None)
    return [checked(verdict, limits) for verdict in found]


def checked(verdict: Any, limits: tuple[float, float] | None = None) -> Verdict:
    """A judgement with plain numbers, or a failure.

    Args:
        verdict: Whatever a judge returned, or the exception it raised.
        limits: The range of its scores.
    """
    if isinstance(verdict, Exception):
        return Failure("error", f"{type(verdict).__name__}: {verdict}"[:500])
    if not isinstance(verdict, Judgement):
        return Failure("invalid", f"a Judgement is wanted, got {type(verdict).__name__}: {verdict!r:.100}")
    if not isinstance(verdict.score, Real):
        return Failure("invalid", f"the score is no number: {verdict.score!r:.100}")
    score = float(verdict.score)
    if not math.isfinite(score):
        return Failure("invalid", f"the score is {score}")
    if limits is not None and not limits[0] <= score <= limits[1]:
        return Failure("invalid", f"the score {score} is not in [{limits[0]}, {limits[1]}]")
    if verdict.correct is not None and not isinstance(verdict.correct, bool):
        return Failure("invalid", f"correct must be True, False or None, got {verdict.correct!r:.100}")
    return Judgement(score, verdict.correct)
