"""Whole models against the authors' code and transformers: images in, logits out, weights both ways."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_interns1.checkpoints.huggingface import (
    FolderSource,
    ModelSource,
    WeightsError,
    export_pretrained,
    load_pretrained_multimodal_model,
    multimodal_config_from_pretrained,
)
from lit_interns1.models import MultimodalModel
from lit_interns1.models.multimodal_presets import MULTIMODAL_PRESETS
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.media import MediaItems

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"
MOE = {
    "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 4,
    "moe_intermediate_size": 24, "norm_topk_prob": True, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
DENSE = {k: v for k, v in MOE.items() if "expert" not in k and k not in ("moe_intermediate_size", "norm_topk_prob")}
NORMS = {
    "6b": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    "300m": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True},
}


def tensors_of(folder):
    return {key: value for file in Path(folder).glob("model*.safetensors") for key, value in load_file(file).items()}


def assert_same_bytes(first, second):
    first, second = tensors_of(first), tensors_of(second)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


def drawn(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


def test_the_authors_intern_s1_pro_sees_images_and_comes_back_byte_by_byte(tmp_path):
    golden = load_file(GOLDEN / "golden.safetensors")
    model = load_pretrained_multimodal_model(GOLDEN).eval()
    grid = golden["image_grid_thw"]
    items = MediaItems.of(golden["pixel_values"].split(grid.prod(1).tolist()), grid.tolist())
    features = torch.cat(model.features({"image": items})["image"])
    torch.testing.assert_close(features, golden["image_features"], atol=1e-5, rtol=1e-5)
    logits = model(golden["multimodal_input_ids"], {"image": items}).logits
    torch.testing.assert_close(logits, golden["multimodal_logits"], atol=1e-5, rtol=1e-5)
    result = export_pretrained(ModelSource(model), model.config, tmp_path / "like", like=GOLDEN)
    assert result.copied == 0
    assert_same_bytes(tmp_path / "like", GOLDEN)
    export_pretrained(ModelSource(model), model.config, tmp_path / "plain")
    assert_same_bytes(tmp_path / "plain", GOLDEN)
    assert multimodal_config_from_pretrained(tmp_path / "plain") == model.config
    written = json.loads((tmp_path / "like" / "config.json").read_text())
    for part in (None, "text_config", "vision_config"):
        read = json.loads((GOLDEN / "config.json").read_text())
        ours, theirs = (values if part is None else values[part] for values in (written, read))
        assert {k: v for k, v in theirs.items() if ours.get(k) != v and not isinstance(v, dict)} == {}


def internvl(norm, text):
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
        "image_size": [28, 28], "patch_size": [7, 7], **NORMS[norm],
    }  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=100, image_seq_length=4, tie_word_embeddings=False
    )
    return drawn(transformers.InternVLForConditionalGeneration(config))


@pytest.mark.parametrize(("norm", "text"), [("6b", MOE), ("300m", MOE), ("300m", DENSE)])
def test_internvl(tmp_path, norm, text):
    theirs = internvl(norm, text)
    theirs.save_pretrained(tmp_path / "in")
    model = load_pretrained_multimodal_model(tmp_path / "in").eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 28, 28, generator=generator)
    ids = torch.randint(0, 99, (1, 20), generator=generator)
    ids[0, 3:7] = ids[0, 12:16] = 100
    expected = theirs(input_ids=ids, pixel_values=images).logits
    patches = images.view(2, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, -1)
    items = {"image": MediaItems.of(list(patches), [(1, 4, 4)] * 2)}
    logits = model(ids, items).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    export_pretrained(ModelSource(model), model.config, tmp_path / "out", layout="internvl")
    assert_same_bytes(tmp_path / "out", tmp_path / "in")
    again, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    torch.testing.assert_close(again.eval()(input_ids=ids, pixel_values=images).logits, expected)
    for layout, more in (("interns1", {}), ("internvl_chat", {"image_token_id": 100})):
        export_pretrained(ModelSource(model), model.config, tmp_path / layout, layout=layout)
        other = load_pretrained_multimodal_model(tmp_path / layout, **more).eval()
        assert other.config == model.config
        assert torch.equal(other(ids, items).logits, logits)
    source = FolderSource(tmp_path / "interns1", whole=True)
    export_pretrained(source, source.config, tmp_path / "back", layout="internvl")
    assert_same_bytes(tmp_path / "back", tmp_path / "in")


def test_qwen3_vl_turns_images_by_row_and_column(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(
        text_config={**MOE, "model_type": "qwen3_vl_moe_text", "rope_parameters": rope}, vision_config=vision,
        image_token_id=100, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = drawn(transformers.Qwen3VLMoeForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path / "in")
    model = load_pretrained_multimodal_model(tmp_path / "in").eval()
    assert model.config.mrope_section == (4, 2, 2)
    generator = torch.Generator().manual_seed(2)
    grid, video = torch.tensor([[1, 4, 6], [1, 2, 4]]), torch.tensor([[2, 4, 4]])
    pixels, frames = torch.randn(32, 96, generator=generator), torch.randn(32, 96, generator=generator)
    ids = torch.randint(0, 99, (1, 40), generator=generator)
    ids[0, 3:9], ids[0, 14:16], ids[0, 20:24], ids[0, 27:31] = 100, 100, 101, 101
    expected = theirs(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid, pixel_values_videos=frames, video_grid_thw=video,
        mm_token_type_ids=(ids == 100).int() + 2 * (ids == 101).int(),
    ).logits  # fmt: skip
    items = {
        "image": MediaItems.of(pixels.split([24, 8]), grid.tolist()),
        "video": MediaItems.of([frames], video.tolist()),
    }
    logits = model(ids, items).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # two documents in one row
    both = {kind: MediaItems.joined([part, part], [0, 0]) for kind, part in items.items()}
    packed = model(torch.cat([ids[0], ids[0]]), both, cu_seqlens=torch.tensor([0, 40, 80])).logits
    torch.testing.assert_close(packed, torch.cat([logits[0], logits[0]]), atol=1e-5, rtol=1e-5)

    export_pretrained(ModelSource(model), model.config, tmp_path / "like", like=tmp_path / "in")
    assert_same_bytes(tmp_path / "like", tmp_path / "in")
    export_pretrained(ModelSource(model), model.config, tmp_path / "out", layout="qwen3_vl_moe")
    _, info = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())


@pytest.mark.parametrize("name", [name for name in MULTIMODAL_PRESETS if name.startswith("tiny")])
def test_presets_with_time_series_come_back(tmp_path, name):
    config = MULTIMODAL_PRESETS[name]()
    with torch.device("meta"):
        model = MultimodalModel(config)
    materialize(model, seed=5)
    export_pretrained(ModelSource(model), config, tmp_path / "a")
    assert multimodal_config_from_pretrained(tmp_path / "a").time_series is not None
    other = load_pretrained_multimodal_model(tmp_path / "a")
    for (key, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    wider = replace(config, time_series=replace(config.time_series, channels="separate"))
    with pytest.raises(WeightsError, match=r"time_series.channels: 'separate' → 'interleaved'"):
        export_pretrained(ModelSource(model), wider, tmp_path / "b", dry_run=True)


def test_what_encoders_cannot_do_is_refused(tmp_path):
    values = json.loads((GOLDEN / "config.json").read_text())
    for change, message in (
        ({"out_hidden_size": 48}, "out_hidden_size = 48 must be the decoder's 64"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"num_position_embeddings": 60}, "num_positions = 60 must be a square number"),
    ):
        folder = tmp_path / str(len(message))
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({**values, "vision_config": {**values["vision_config"], **change}})
        )
        with pytest.raises(WeightsError, match=message):
            multimodal_config_from_pretrained(folder)
