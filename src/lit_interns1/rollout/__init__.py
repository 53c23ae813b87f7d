"""Rollouts: engines that generate samples, judges that reward them, and the data module of reinforcement learning."""

from lit_interns1.rollout.curriculum import CurriculumPrompts
from lit_interns1.rollout.embedded import EmbeddedEngine, GenerationProgress
from lit_interns1.rollout.engine import EngineCapabilities, EngineError, RolloutEngine
from lit_interns1.rollout.mixture import JudgeEntry, MixtureOfRewards
from lit_interns1.rollout.prompt_tasks import ArithmeticPrompts, JoinedPrompts, ReasoningGymPrompts
from lit_interns1.rollout.samples import GenerationRequest, Prompt, Sample, SamplingOptions, ScoredSample

__all__ = [
    "ArithmeticPrompts", "CurriculumPrompts", "EmbeddedEngine", "EngineCapabilities", "EngineError",
    "GenerationProgress", "GenerationRequest", "JoinedPrompts", "JudgeEntry", "MixtureOfRewards", "Prompt",
    "ReasoningGymPrompts", "RolloutEngine", "Sample", "SamplingOptions", "ScoredSample",
]  # fmt: skip
