"""Judges of responses."""

from lit_interns1.rollout.judges.answers import AnswerJudge
from lit_interns1.rollout.judges.base import Failure, FailureCause, Judge, Judgement
from lit_interns1.rollout.judges.form import FormatJudge, LengthJudge
from lit_interns1.rollout.judges.functions import FunctionJudge, InternBootcampJudge
from lit_interns1.rollout.judges.math_verify import MathVerifyJudge
from lit_interns1.rollout.judges.polar import PolarJudge, PolarServer
from lit_interns1.rollout.judges.posterior import posterior_reward
from lit_interns1.rollout.judges.reasoning_gym import ReasoningGymJudge

__all__ = [
    "AnswerJudge", "Failure", "FailureCause", "FormatJudge", "FunctionJudge", "InternBootcampJudge", "Judge",
    "Judgement", "LengthJudge", "MathVerifyJudge", "PolarJudge", "PolarServer", "ReasoningGymJudge", "posterior_reward",
]  # fmt: skip
