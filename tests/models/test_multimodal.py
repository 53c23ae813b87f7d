"""The whole model: sizes of the family, placeholders, rows without images."""

from dataclasses import asdict, replace

import pytest
import torch

from lit_interns1.models import MultimodalConfig, MultimodalModel, preset
from lit_interns1.models.multimodal import multimodal_config_from_dict
from lit_interns1.models.multimodal_presets import MULTIMODAL_PRESETS, multimodal_preset, with_time_series
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.media import MediaItems

PUBLISHED = {
    "tiny-s1": 2_567_920,
    "tiny-s1-mini": 1_577_072,
    "tiny-s1-pro": 4_169_456,
    "s1-pro-1b-a0.5b": 1_650_191_312,
    "intern-s1-mini-8b": 8_538_804_224,
    "intern-s1-241b": 240_709_856_128,
    "intern-s1-pro-1t": 916_895_644_160,
}


def on_meta(config):
    with torch.device("meta"):
        return MultimodalModel(config)


def built(config):
    return materialize(on_meta(config), std=0.1).eval()


@pytest.mark.parametrize("name", MULTIMODAL_PRESETS)
def test_parameters_equal_the_published_numbers(name):
    assert sum(p.numel() for p in on_meta(multimodal_preset(name)).parameters()) == PUBLISHED[name]


def test_time_series_encoder_of_the_large_models():
    model = on_meta(with_time_series(multimodal_preset("intern-s1-pro-1t")))
    assert sum(p.numel() for p in model.time_series.parameters()) == 145_973_200
    assert model.config.time_series_token_id == 151685


@pytest.mark.parametrize("name", [name for name in MULTIMODAL_PRESETS if name.startswith("tiny")])
def test_configs_survive_as_plain_values(name):
    config = multimodal_preset(name)
    assert multimodal_config_from_dict(asdict(config)) == config
    smaller = multimodal_preset(name, text={"hidden_size": 64}, vision={"num_layers": 1})
    assert (smaller.text.hidden_size, smaller.vision.num_layers) == (64, 1)
    with pytest.raises(ValueError, match="has no field 'colour'"):
        multimodal_preset(name, vision={"colour": 1})


def image(config, patches, grid, seed=0):
    values = torch.randn(patches, config.vision.patch_values, generator=torch.Generator().manual_seed(seed))
    return values, grid


def test_features_stand_at_their_placeholders_in_order():
    config = multimodal_preset("tiny-s1-pro")
    model = built(config)
    ids = torch.randint(10, 2048, (20,), generator=torch.Generator().manual_seed(1))
    ids[2:6], ids[10:12], ids[15] = 3, 3, 5
    (first, one), (second, two) = image(config, 16, (1, 4, 4)), image(config, 8, (1, 2, 4), 1)
    signal = torch.randn(4, generator=torch.Generator().manual_seed(2))
    media = {
        "image": MediaItems.of([first, second], [one, two]),
        "time_series": MediaItems.of([signal], [(4, 1, 1.0)]),
    }
    x = model.embed(ids, media)
    vectors = model.features(media)
    torch.testing.assert_close(x[2:6], vectors["image"][0])
    torch.testing.assert_close(x[10:12], vectors["image"][1])
    torch.testing.assert_close(x[15:16], vectors["time_series"][0])
    others = torch.tensor([i for i in range(20) if ids[i] > 5])
    torch.testing.assert_close(x[others], model.language_model.embed_tokens(ids[others]))
    # a row of two samples equals the samples alone
    logits = model(ids, media, cu_seqlens=torch.tensor([0, 8, 20])).logits
    alone = model(ids[8:], {"image": MediaItems.of([second], [two]), "time_series": media["time_series"]}).logits
    torch.testing.assert_close(logits[8:], alone, atol=1e-5, rtol=1e-5)


def test_placeholders_and_vectors_must_agree():
    config = multimodal_preset("tiny-s1-pro")
    model = built(config)
    values, grid = image(config, 16, (1, 4, 4))
    items = MediaItems.of([values], [grid])
    ids = torch.full((9,), 10)
    ids[:3] = 3
    with pytest.raises(ValueError, match=r"3 placeholders of the kind image \(id 3\), .* 1 items .* 4 vectors"):
        model(ids, {"image": items})
    with pytest.raises(ValueError, match=r"3 placeholders .* 0 items .* 0 vectors"):
        model(ids)
    text_only = built(MultimodalConfig(config.text))
    with pytest.raises(ValueError, match="takes text only"):
        text_only(ids, {"image": items})


def test_a_row_of_text_gives_every_parameter_a_gradient_and_changes_nothing():
    config = multimodal_preset("tiny-s1-pro")
    model = built(config)
    ids = torch.randint(10, 2048, (12,), generator=torch.Generator().manual_seed(1))
    alone = model.language_model(ids).logits
    torch.testing.assert_close(model(ids).logits, alone)
    model.train()
    output = model(ids)
    torch.testing.assert_close(output.logits, alone)
    output.logits.sum().backward()
    encoders = [p for name, p in model.named_parameters() if not name.startswith("language_model.")]
    assert all(p.grad is not None and not p.grad.any() for p in encoders)


def test_configs_that_do_not_fit_are_refused():
    text, vision = preset("tiny-s1-pro"), multimodal_preset("tiny-s1-pro").vision
    with pytest.raises(ValueError, match="needs image_token_id"):
        MultimodalConfig(text, vision)
    with pytest.raises(ValueError, match="placeholders must differ"):
        MultimodalConfig(text, vision, image_token_id=3, video_token_id=3)
    with pytest.raises(ValueError, match="must lie in the vocabulary of 2048"):
        MultimodalConfig(text, vision, image_token_id=2048)
    with pytest.raises(ValueError, match="needs rope positions"):
        MultimodalConfig(text, vision, image_token_id=3, mrope_section=(4, 2, 2))
    with pytest.raises(ValueError, match="must add up to head_dim/2 = 8"):
        replace(multimodal_preset("tiny-s1"), mrope_section=(4, 2, 1))
