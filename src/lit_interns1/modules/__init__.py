"""LightningModules: a model, an objective and an optimizer choice, put together."""

from lit_interns1.modules.language_model_module import LanguageModelModule
from lit_interns1.modules.multimodal_module import MultimodalModule
from lit_interns1.modules.policy_module import PolicyModule
from lit_interns1.modules.preference_module import PreferenceModule
from lit_interns1.modules.reward_model_module import RewardModelModule
from lit_interns1.modules.vision_encoder_module import VisionEncoderModule

__all__ = [
    "LanguageModelModule",
    "MultimodalModule",
    "PolicyModule",
    "PreferenceModule",
    "RewardModelModule",
    "VisionEncoderModule",
]
