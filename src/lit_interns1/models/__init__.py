"""Whole networks, their configs and presets, and generation."""

from lit_interns1.models.config import LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.models.generation import Generation, generate
from lit_interns1.models.language_model import (
    LanguageModel,
    LanguageModelOutput,
    ParameterCounts,
    count_parameters,
    flops_per_token,
)
from lit_interns1.models.presets import PRESETS, preset

__all__ = [
    "PRESETS", "Generation", "LanguageModel", "LanguageModelConfig", "LanguageModelOutput", "MoEConfig",
    "ParameterCounts", "PositionConfig", "count_parameters", "flops_per_token", "generate", "preset",
]  # fmt: skip
