"""Every tensor of transformers' own multimodal models has a place in the tables, and comes back bit by bit."""

import pytest
import torch
from safetensors.torch import load_file

from huggingface_folders import nested_modules
from lit_interns1.checkpoints import config_from_pretrained, load_pretrained_weights
from lit_interns1.checkpoints.huggingface.export import export_pretrained
from lit_interns1.checkpoints.huggingface.sources import ModelSource
from lit_interns1.models import LanguageModel

TEXT = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "num_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}  # fmt: skip
BLOCK = {
    "norm1": "norm", "norm2": "norm", "attention.qkv": (72, 24), "attention.o_proj": (24, 24), "mlp.fc1": (48, 24),
    "mlp.fc2": (24, 48),
}  # fmt: skip


def with_biases(shapes, without=()):
    result = {}
    for name, shape in shapes.items():
        shape = (24,) if shape == "norm" else shape
        result[f"{name}.weight"] = shape
        if not name.endswith(tuple(without)):
            result[f"{name}.bias"] = shape[:1]
    return result


def intern_vit(big):
    block = {**BLOCK, **(dict.fromkeys(("attention.q_norm", "attention.k_norm"), "norm") if big else {})}
    block = with_biases(block, ("qkv", "norm", "norm1", "norm2") if big else ("q_norm",))
    layer = {**block, "layer_scale1": (24,), "layer_scale2": (24,)}
    vision = {"class_token": (1, 1, 24), "position_embedding": (1, 17, 24), "patch_embedding.weight": (24, 3, 7, 7)}
    vision |= {"patch_embedding.bias": (24,)}
    vision |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    projector = with_biases({"norm": (96,), "fc1": (48, 96), "fc2": (48, 48)})
    return {f"vision.{k}": v for k, v in vision.items()} | {f"projector.{k}": v for k, v in projector.items()}


def native_vit():
    vision = with_biases({"patch_embedding": (24, 3, 2, 4, 4)}) | {"position_embedding.weight": (16, 24)}
    vision |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in with_biases(BLOCK).items()}
    projector = with_biases({"norm": (24,), "fc1": (96, 96), "fc2": (48, 96)})
    return {f"vision.{k}": v for k, v in vision.items()} | {f"projector.{k}": v for k, v in projector.items()}


def reference(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "native":
        vision = {
            "depth": 2, "hidden_size": 24, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        }  # fmt: skip
        config = transformers.Qwen3VLMoeConfig(text_config=TEXT, vision_config=vision, tie_word_embeddings=False)
        return transformers.Qwen3VLMoeForConditionalGeneration(config)
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
        "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": kind == "rms_norm", "norm_type": kind,
        "attention_bias": kind == "layer_norm",
    }  # fmt: skip
    text = {"model_type": "qwen3_moe", **TEXT}
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    return transformers.InternVLForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "native"])
@pytest.mark.parametrize("original", [True, False], ids=["", "names of transformers 5"])
def test_every_tensor_of_transformers_has_a_place(kind, original, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=original)
    config = config_from_pretrained(tmp_path / "theirs")
    ours = nested_modules(native_vit() if kind == "native" else intern_vit(kind == "rms_norm"))
    ours.language_model = LanguageModel.create(config, seed=9)
    loaded = load_pretrained_weights(ours, tmp_path / "theirs")
    assert loaded.elsewhere == {}
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert loaded.bytes_read == sum(tensor.nbytes for tensor in stored.values())
    state = theirs.state_dict()
    assert torch.equal(ours.language_model.lm_head.weight, state["lm_head.weight"])
    if kind == "native":
        fused = state["model.visual.blocks.1.attn.qkv.weight"]
    else:
        prefix = "model.vision_tower.encoder.layer.1."
        fused = torch.cat([state[f"{prefix}attention.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(ours.vision.layers.get_submodule("1").layer_scale2, state[prefix + "lambda_2"])
    assert torch.equal(ours.vision.layers.get_submodule("1").attention.qkv.weight, fused)
    export_pretrained(ModelSource(ours), config, tmp_path / "again", like=tmp_path / "theirs")
    (file,) = (tmp_path / "again").glob("*.safetensors")
    again = load_file(file)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())
