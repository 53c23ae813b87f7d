"""LightningModules: a model, an objective and an optimizer choice, put together."""

from lit_interns1.modules.language_model_module import LanguageModelModule
from lit_interns1.modules.multimodal_module import MultimodalModule

__all__ = ["LanguageModelModule", "MultimodalModule"]
