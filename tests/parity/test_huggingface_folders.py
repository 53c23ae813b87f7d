"""Folders that transformers writes, and one of the official Intern-S1-Pro code, give the logits of their own models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_interns1.checkpoints import WeightsError, config_from_pretrained, load_pretrained_model
from lit_interns1.models import preset

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"
SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}  # fmt: skip
SPARSE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
IDS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(3))


def relative(ours, reference):
    return float((ours.detach() - reference.detach()).norm() / reference.detach().norm())


def reference(kind, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes})).eval()
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SHAPE, **changes})).eval()
    if kind == "qwen3_moe":
        shape = {**SHAPE, **SPARSE, "norm_topk_prob": True, **changes}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)).eval()
    if kind == "internvl":
        text = {"model_type": "qwen3_moe", **SHAPE, **SPARSE, "norm_topk_prob": True}
        vision = {
            "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48,
            "image_size": [28, 28], "patch_size": [7, 7],
        }  # fmt: skip
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=95, image_seq_length=4, tie_word_embeddings=False
        )
        return transformers.InternVLForConditionalGeneration(config).eval()
    assert kind == "qwen3_vl_moe"
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    text = {**SHAPE, **SPARSE, "rope_parameters": rope, **changes}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=95, video_token_id=94)
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"max_shard_size": "20KB"}),
        ("qwen3", {"tie_word_embeddings": True}, {}),
        ("qwen3", {}, {"max_shard_size": "20KB"}),
        ("qwen3_moe", {}, {}),
        ("qwen3_moe", {"mlp_only_layers": [0]}, {"max_shard_size": "20KB"}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"save_original_format": False}),
        ("internvl", {}, {}),
        ("qwen3_vl_moe", {}, {}),
    ],
    ids=str,
)
def test_logits_of_a_folder_are_those_of_transformers(kind, changes, options, tmp_path):
    theirs = reference(kind, **changes)
    theirs.save_pretrained(tmp_path, **options)
    assert ("max_shard_size" in options) == (len(list(tmp_path.glob("*.safetensors"))) > 2)
    ours = load_pretrained_model(tmp_path)
    with torch.no_grad():
        assert relative(ours(IDS).logits, theirs(IDS).logits) < 1e-5
    loaded = {parameter.dtype for parameter in ours.parameters()}
    assert loaded == {torch.float32}


@pytest.mark.parametrize("width", [20, 24, 48])
def test_transposed_stacks_are_told_by_their_shape(tmp_path, width):
    """As Qwen3-VL-MoE is published: (E, D, 2I) and (E, I, D); D = 2I or D = I leaves one of the two ambiguous."""
    theirs = reference("qwen3_vl_moe", moe_intermediate_size=width)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    published = {k: v.mT.contiguous() if ".experts." in k else v for k, v in stored.items()}
    for tensors in (stored, published):
        save_file(tensors, tmp_path / "model.safetensors")
        loaded = load_pretrained_model(tmp_path).state_dict()
        for layer in range(2):
            for name in (f"layers.{layer}.mlp.experts.{part}_proj" for part in ("gate_up", "down")):
                assert torch.equal(loaded[name], stored[f"model.language_model.{name}"]), name


def test_the_official_intern_s1_pro_folder(caplog):
    golden = load_file(GOLDEN / "golden.safetensors")
    model = load_pretrained_model(GOLDEN)
    with torch.no_grad():
        assert relative(model(golden["input_ids"]).logits, golden["logits"]) < 1e-5
    assert "tensors model.visual.* are not part of this model" in caplog.text
    stored = load_file(GOLDEN / "model.safetensors")
    for name in ("sin_coef", "cos_coef"):
        assert torch.equal(getattr(model.rotary_emb, name), stored[f"model.language_model.rotary_emb.{name}"])


def test_the_published_config_of_intern_s1_pro_is_the_preset(tmp_path):
    text = {
        "model_type": "interns1_pro_text", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 64,
        "num_experts": 512, "num_experts_per_tok": 8, "num_hidden_layers": 94, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 5000000, "router_n_groups": 8, "vocab_size": 155008,
        "rope_scaling": {
            "rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None,
        },
    }  # fmt: skip
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config = {"model_type": "interns1_pro", "text_config": text, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_from_pretrained(tmp_path) == preset("intern-s1-pro-1t")


def test_both_spellings_of_a_config_mean_the_same(tmp_path):
    reference("qwen3_moe").save_pretrained(tmp_path / "new")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "num_local_experts" in values
    assert "rope_theta" in values["rope_parameters"]
    values["num_experts"] = values.pop("num_local_experts")
    values |= {"rope_theta": values.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    assert config_from_pretrained(tmp_path / "old") == config_from_pretrained(tmp_path / "new")
    values["num_local_experts"] = 9
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="contradicts itself: num_experts = 8, num_local_experts = 9"):
        config_from_pretrained(tmp_path / "old")
