import dataclasses

import pytest
import torch

from lit_interns1.models import PRESETS, LanguageModel, LanguageModelConfig, MoEConfig, count_parameters, preset

PUBLISHED = {
    "tiny-s1": (2_270_464, 1_090_816),
    "tiny-s1-mini": (1_279_232, 1_279_232),
    "tiny-s1-pro": (3_851_520, 1_099_008),
    "small-50m": (53_288_320, 24_976_768),
    "s1-pro-1b-a0.5b": (1_589_956_608, 532_992_000),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "intern-s1-mini-8b": (8_201_221_120, 8_201_221_120),
    "intern-s1-241b": (235_104_120_320, 22_201_249_280),
    "intern-s1-pro-1t": (916_555_836_928, 22_363_778_560),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_equal_the_published_ones(name):
    with torch.device("meta"):
        model = LanguageModel(preset(name))
    counts = count_parameters(model)
    assert (counts.total, counts.active) == PUBLISHED[name]


def test_intern_s1_pro_keeps_45_frequencies_in_buffers_that_are_not_parameters():
    with torch.device("meta"):
        model = LanguageModel(preset("intern-s1-pro-1t"))
    assert model.rotary_emb.cos_coef.shape == (4, 45, 45)
    assert not any("coef" in name for name, _ in model.named_parameters())
    assert "rotary_emb.sin_coef" in model.state_dict()


def test_presets_take_changes_and_unknown_names_are_refused():
    assert preset("tiny-s1", vocab_size=7).vocab_size == 7
    with pytest.raises(ValueError, match="preset 'tiny' is unknown: choose one of tiny-s1"):
        preset("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads = 6 must be divisible by num_kv_heads = 4"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"moe": None}, "intermediate_size must be at least 1 for dense layers, got 0"),
        ({"dense_layers": (9,)}, r"dense_layers = \(9,\) must lie in 0 … num_layers − 1 = 3"),
        ({"attention_backend": "flash"}, "attention_backend = 'flash' is unknown"),
        ({"head_dim": 15}, "head_dim = 15 must be divisible by 2"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny-s1", **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3, "router": "grouped"}, "moe.num_experts = 16 must be divisible by moe.num_groups = 3"),
        ({"num_groups": 8, "router": "grouped"}, "moe.experts_per_token = 4 must be divisible by moe.num_groups = 8"),
        ({"num_groups": 2}, "moe.num_groups = 2 needs moe.router = 'grouped'"),
        ({"experts_per_token": 17}, "moe.experts_per_token = 17 exceeds moe.num_experts = 16"),
        ({"router": "sigmoid", "router_gradient": "ste"}, "moe.router_gradient = 'ste'"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 16, "experts_per_token": 4, "intermediate_size": 8, **options})


def test_configs_cannot_be_changed():
    config = preset("tiny-s1")
    assert isinstance(config, LanguageModelConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
