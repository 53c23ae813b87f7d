"""LightningModules: a model, an objective and an optimizer choice, put together."""

from lit_interns1.modules.language_model_module import LanguageModelModule

__all__ = ["LanguageModelModule"]
