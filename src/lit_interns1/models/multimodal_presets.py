"""Whole models by name: published ones, and small ones of the same shape.

Sizes: arXiv 2508.15763 §2 (Intern-S1), arXiv 2603.25040 §2 (Intern-S1-Pro), released configs. The time-series encoder
of the released files has no public config; its sizes are those of Intern-S1-mini's public time-series variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lit_interns1.models import presets
from lit_interns1.models.multimodal import MultimodalConfig
from lit_interns1.models.time_series import TimeSeriesConfig
from lit_interns1.models.vision import InternVisionConfig, NativeVisionConfig

_TINY_SIGNALS = TimeSeriesConfig(
    hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, max_positions=64, patch_size=32, patch_heads=4,
    patch_intermediate_size=64, output_size=64,
)  # fmt: skip
_TINY_IMAGE, _TINY_VIDEO, _TINY_TIME_SERIES = 3, 4, 5
_S1_IMAGE, _S1_TIME_SERIES = 152957, 152973
_PRO_IMAGE, _PRO_VIDEO, _PRO_TIME_SERIES = 151655, 151656, 151685


def tiny_s1() -> MultimodalConfig:
    """Intern-S1's shape in 2.6 M parameters."""
    vision = InternVisionConfig(64, 2, 4, 128, image_size=56)
    return MultimodalConfig(presets.tiny_s1(), vision, _TINY_SIGNALS, _TINY_IMAGE, None, _TINY_TIME_SERIES)


def tiny_s1_mini() -> MultimodalConfig:
    """Intern-S1-mini's shape in 1.6 M parameters."""
    vision = InternVisionConfig(
        64, 2, 4, 128, image_size=56, norm="layer_norm", qk_norm=False, attention_bias=True
    )  # fmt: skip
    return MultimodalConfig(presets.tiny_s1_mini(), vision, _TINY_SIGNALS, _TINY_IMAGE, None, _TINY_TIME_SERIES)


def tiny_s1_pro() -> MultimodalConfig:
    """Intern-S1-Pro's shape in 4.2 M parameters."""
    vision = NativeVisionConfig(64, 2, 4, 128, patch_size=4, num_positions=64)
    return MultimodalConfig(presets.tiny_s1_pro(), vision, _TINY_SIGNALS, _TINY_IMAGE, _TINY_VIDEO, _TINY_TIME_SERIES)


def s1_pro_1b() -> MultimodalConfig:
    """Intern-S1-Pro's shape in 1.7 B parameters (0.5 B active)."""
    vision = NativeVisionConfig(512, 12, 8, 2048)
    signals = TimeSeriesConfig(384, 6, 6, 1536, output_size=512)
    return MultimodalConfig(presets.s1_pro_1b(), vision, signals, _PRO_IMAGE, _PRO_VIDEO, _PRO_TIME_SERIES)


def intern_s1_mini() -> MultimodalConfig:
    """Intern-S1-mini: Qwen3-8B and InternViT-300M."""
    vision = InternVisionConfig(1024, 24, 16, 4096, norm="layer_norm", qk_norm=False, attention_bias=True)
    return MultimodalConfig(presets.intern_s1_mini(), vision, image_token_id=_S1_IMAGE)


def intern_s1() -> MultimodalConfig:
    """Intern-S1: Qwen3-235B-A22B and InternViT-6B."""
    vision = InternVisionConfig(3200, 45, 25, 12800)
    return MultimodalConfig(presets.intern_s1(), vision, image_token_id=_S1_IMAGE)


def intern_s1_pro() -> MultimodalConfig:
    """Intern-S1-Pro with its native-resolution encoder."""
    vision = NativeVisionConfig(1024, 24, 16, 4096)
    return MultimodalConfig(presets.intern_s1_pro(), vision, None, _PRO_IMAGE, _PRO_VIDEO)


def with_time_series(config: MultimodalConfig, signals: TimeSeriesConfig | None = None) -> MultimodalConfig:
    """A published model with the time-series encoder, which its first release came without."""
    pro = isinstance(config.vision, NativeVisionConfig)
    token = _PRO_TIME_SERIES if pro else _S1_TIME_SERIES
    return replace(config, time_series=signals or TimeSeriesConfig(), time_series_token_id=token)


MULTIMODAL_PRESETS: dict[str, Callable[[], MultimodalConfig]] = {
    "tiny-s1": tiny_s1,
    "tiny-s1-mini": tiny_s1_mini,
    "tiny-s1-pro": tiny_s1_pro,
    "s1-pro-1b-a0.5b": s1_pro_1b,
    "intern-s1-mini-8b": intern_s1_mini,
    "intern-s1-241b": intern_s1,
    "intern-s1-pro-1t": intern_s1_pro,
}
"""Configs by name. Where a language model has the same name, it is the decoder of this one."""


def multimodal_preset(name: str, **changes: Any) -> MultimodalConfig:
    """The config of a preset, with fields changed as in `preset`: `text={"hidden_size": 64}`.

    Raises:
        ValueError: If no preset has this name, or a field does not exist.
    """
    if name not in MULTIMODAL_PRESETS:
        raise ValueError(f"multimodal preset {name!r} is unknown: choose one of {', '.join(MULTIMODAL_PRESETS)}")
    return presets.changed(MULTIMODAL_PRESETS[name](), changes)
