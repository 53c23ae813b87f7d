"""Published models and small ones of the same shape. A preset is a function that returns a config.

Sizes of Intern-S1: arXiv 2508.15763; of Intern-S1-Pro: arXiv 2603.25040 and its released config; of Qwen3: its released
configs. The tiny and small ones are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lit_interns1.models.config import LanguageModelConfig, MoEConfig, PositionConfig, changed


def tiny_s1() -> LanguageModelConfig:
    """Intern-S1's shape in 2.3 M parameters."""
    return LanguageModelConfig(
        vocab_size=2048, hidden_size=128, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16,
        moe=MoEConfig(num_experts=16, experts_per_token=4, intermediate_size=64),
        positions=PositionConfig(theta=1e4, max_position_embeddings=512),
    )  # fmt: skip


def tiny_s1_mini() -> LanguageModelConfig:
    """Intern-S1-mini's shape (dense) in 1.3 M parameters."""
    return replace(tiny_s1(), moe=None, intermediate_size=384)


def tiny_s1_pro() -> LanguageModelConfig:
    """Intern-S1-Pro's shape in 3.9 M parameters: grouped router, straight-through gradient, FoPE."""
    return replace(
        tiny_s1(),
        moe=MoEConfig(
            num_experts=32,
            experts_per_token=4,
            intermediate_size=64,
            router="grouped",
            num_groups=4,
            router_gradient="ste",
        ),
        positions=PositionConfig(kind="fope", theta=1e4, max_position_embeddings=512),
    )


def small_50m() -> LanguageModelConfig:
    """Intern-S1-Pro's shape in 53 M parameters (25 M active), tied head."""
    return LanguageModelConfig(
        vocab_size=32000, hidden_size=384, num_layers=8, num_heads=6, num_kv_heads=2, head_dim=64,
        moe=MoEConfig(32, 8, 128, router="grouped", num_groups=8, router_gradient="ste"),
        positions=PositionConfig(kind="fope", theta=1e4, max_position_embeddings=4096),
        tie_word_embeddings=True,
    )  # fmt: skip


def s1_pro_1b() -> LanguageModelConfig:
    """Intern-S1-Pro's shape in 1.6 B parameters (0.5 B active)."""
    return LanguageModelConfig(
        vocab_size=155008, hidden_size=1024, num_layers=24, num_heads=16, num_kv_heads=4, head_dim=64,
        moe=MoEConfig(64, 8, 256, router="grouped", num_groups=8, router_gradient="ste"),
        positions=PositionConfig(kind="fope", theta=1e6, max_position_embeddings=32768),
    )  # fmt: skip


def qwen3_30b_a3b() -> LanguageModelConfig:
    """Qwen3-30B-A3B."""
    return LanguageModelConfig(
        vocab_size=151936, hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128,
        moe=MoEConfig(128, 8, 768),
    )  # fmt: skip


def qwen3_235b_a22b() -> LanguageModelConfig:
    """Qwen3-235B-A22B, which Intern-S1's language model starts from."""
    return LanguageModelConfig(
        vocab_size=151936, hidden_size=4096, num_layers=94, num_heads=64, num_kv_heads=4, head_dim=128,
        moe=MoEConfig(128, 8, 1536),
    )  # fmt: skip


def intern_s1_mini() -> LanguageModelConfig:
    """The language model of Intern-S1-mini (Qwen3-8B, larger vocabulary)."""
    return LanguageModelConfig(
        vocab_size=153216, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
        intermediate_size=12288,
    )  # fmt: skip


def intern_s1() -> LanguageModelConfig:
    """The language model of Intern-S1 (235 B parameters, 22 B active)."""
    return replace(qwen3_235b_a22b(), vocab_size=153216)


def intern_s1_pro() -> LanguageModelConfig:
    """The language model of Intern-S1-Pro (917 B parameters, 22 B active)."""
    return replace(
        intern_s1(),
        vocab_size=155008,
        moe=MoEConfig(512, 8, 1536, router="grouped", num_groups=8, router_gradient="ste"),
        positions=PositionConfig(kind="fope", theta=5e6, max_position_embeddings=262144),
    )


PRESETS: dict[str, Callable[[], LanguageModelConfig]] = {
    "tiny-s1": tiny_s1,
    "tiny-s1-mini": tiny_s1_mini,
    "tiny-s1-pro": tiny_s1_pro,
    "small-50m": small_50m,
    "s1-pro-1b-a0.5b": s1_pro_1b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "qwen3-235b-a22b": qwen3_235b_a22b,
    "intern-s1-mini-8b": intern_s1_mini,
    "intern-s1-241b": intern_s1,
    "intern-s1-pro-1t": intern_s1_pro,
}
"""Configs by name; the large ones give the language model of the named family member."""


def preset(name: str, **changes: Any) -> LanguageModelConfig:
    """The config of a preset, with any of its fields changed (see `changed`).

    Raises:
        ValueError: If no preset has this name, or a field does not exist.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return changed(PRESETS[name](), changes)
