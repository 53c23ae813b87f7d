"""LightningModules: a model, an objective and an optimizer choice, put together."""

from lit_interns1.modules.language_model_module import LanguageModelModule
from lit_interns1.modules.multimodal_module import MultimodalModule
from lit_interns1.modules.vision_encoder_module import VisionEncoderModule

__all__ = ["LanguageModelModule", "MultimodalModule", "VisionEncoderModule"]
