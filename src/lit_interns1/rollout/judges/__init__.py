"""Judges of responses."""

from lit_interns1.rollout.judges.answers import AnswerJudge
from lit_interns1.rollout.judges.base import Failure, FailureCause, Judge, Judgement

__all__ = ["AnswerJudge", "Failure", "FailureCause", "Judge", "Judgement"]
