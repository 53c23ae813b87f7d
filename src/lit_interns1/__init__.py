"""lit-interns1: PyTorch Lightning components for the Intern-S1 family of scientific foundation models.

The names below are loaded when they are first used: ``import lit_interns1`` imports neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY_EXPORTS: dict[str, str] = {
    "LanguageModel": "lit_interns1.models",
    "LanguageModelConfig": "lit_interns1.models",
    "PRESETS": "lit_interns1.models",
    "preset": "lit_interns1.models",
    "generate": "lit_interns1.models",
    "LanguageModelModule": "lit_interns1.modules",
    "MultimodalModel": "lit_interns1.models",
    "MultimodalModule": "lit_interns1.modules",
    "PolicyModule": "lit_interns1.modules",
    "PreferenceModule": "lit_interns1.modules",
    "RewardModelModule": "lit_interns1.modules",
    "RolloutDataModule": "lit_interns1.rollout.rollout_data_module",
    "TextDataModule": "lit_interns1.data",
    "ConversationDataModule": "lit_interns1.data",
    "PackedBatch": "lit_interns1.data",
    "SummedLoss": "lit_interns1.training",
    "TokenClock": "lit_interns1.callbacks",
}

__all__ = ["__version__", *_LAZY_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _LAZY_EXPORTS:
        value = getattr(import_module(_LAZY_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lit_interns1' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
