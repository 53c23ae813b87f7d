"""Whole networks, their configs and presets, and generation."""

from lit_interns1.models.config import LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.models.decoder import Decoder, ParameterCounts, count_parameters, flops_per_token
from lit_interns1.models.generation import Generation, generate
from lit_interns1.models.language_model import LanguageModel, LanguageModelOutput
from lit_interns1.models.multimodal import MultimodalConfig, MultimodalModel
from lit_interns1.models.multimodal_presets import MULTIMODAL_PRESETS, multimodal_preset
from lit_interns1.models.presets import PRESETS, preset
from lit_interns1.models.reward_model import RewardModel, RewardModelOutput
from lit_interns1.models.time_series import TimeSeriesConfig, TimeSeriesEncoder
from lit_interns1.models.vision import InternVisionConfig, NativeVisionConfig

__all__ = [
    "MULTIMODAL_PRESETS", "PRESETS", "Decoder", "Generation", "InternVisionConfig", "LanguageModel",
    "LanguageModelConfig", "LanguageModelOutput", "MoEConfig", "MultimodalConfig", "MultimodalModel",
    "NativeVisionConfig", "ParameterCounts", "PositionConfig", "RewardModel", "RewardModelOutput", "TimeSeriesConfig",
    "TimeSeriesEncoder", "count_parameters", "flops_per_token", "generate", "multimodal_preset", "preset",
]  # fmt: skip
