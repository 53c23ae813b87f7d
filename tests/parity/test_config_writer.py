"""Configs that we write build transformers' own models, tensor for tensor what the tables say."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from lit_interns1.checkpoints.huggingface import LAYOUTS
from lit_interns1.checkpoints.huggingface.audit import saved_tensors
from lit_interns1.checkpoints.huggingface.config_writer import config_to_pretrained
from lit_interns1.checkpoints.huggingface.rules import pieces
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig

DENSE = LanguageModelConfig(
    vocab_size=96, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=40,
    positions=PositionConfig(theta=5e3, max_position_embeddings=64), rms_norm_eps=1e-5,
)  # fmt: skip
SPARSE = replace(DENSE, moe=MoEConfig(8, 3, 20), dense_layers=(1,))
INTERN_VISION = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48,
    "image_size": [28, 28], "patch_size": [7, 7],
}  # fmt: skip
NATIVE_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip
CASES = [
    ("llama", replace(DENSE, qk_norm=False), {}),
    ("llama", replace(DENSE, qk_norm=False, tie_word_embeddings=True), {}),
    ("qwen3", DENSE, {}),
    ("qwen3_moe", SPARSE, {}),
    ("qwen3_moe", replace(SPARSE, moe=MoEConfig(8, 3, 20, normalize_weights=False)), {}),
    ("mixtral", replace(SPARSE, qk_norm=False, dense_layers=(), intermediate_size=0), {}),
    ("internvl", SPARSE, {"vision_config": INTERN_VISION, "image_token_id": 95, "image_seq_length": 4}),
    ("internvl", DENSE, {"vision_config": INTERN_VISION, "image_token_id": 95, "image_seq_length": 4}),
    ("qwen3_vl_moe", SPARSE, {"vision_config": NATIVE_VISION, "image_token_id": 95, "video_token_id": 94}),
]


def expected_tensors(name, config):
    """Keys and shapes of the text part, by the table."""
    with torch.device("meta"):
        model = LanguageModel(config)
    keys = {}
    for tensor, names in saved_tensors(model).values():
        spellings = LAYOUTS[name].spellings(names[0])
        # transformers 5 does not write stacks transposed, as Qwen3-VL-MoE is published
        spelling = spellings[-1] if spellings[0].transposed else spellings[0]
        keys |= {piece.key: piece.file_shape for piece in pieces(spelling, tuple(tensor.shape))}
    return keys


@pytest.mark.parametrize(("name", "config", "like"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_transformers_builds_the_same_model(name, config, like, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config_to_pretrained(config, LAYOUTS[name], "float32", like)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    text = theirs.get_text_config()
    assert text.rope_parameters["rope_theta"] == 5e3
    assert text.tie_word_embeddings == theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.dtype == text.dtype == torch.float32
    assert (text.rms_norm_eps, text.hidden_act) == (1e-5, "silu")
    if config.moe is not None:
        assert getattr(text, "norm_topk_prob", True) == config.moe.normalize_weights
        assert (text.num_local_experts, text.num_experts_per_tok) == (8, 3)
        assert getattr(text, "mlp_only_layers", []) == list(config.dense_layers)
    model = getattr(transformers, LAYOUTS[name].architecture)(theirs)
    model.save_pretrained(tmp_path / "written")
    with safe_open(tmp_path / "written" / "model.safetensors", "pt") as file:
        keys = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    encoders = tuple(prefix for part in LAYOUTS[name].encoders for prefix in part.theirs)
    assert any(key.startswith(encoders) for key in keys) == bool(like)
    assert {k: v for k, v in keys.items() if not k.startswith(encoders)} == expected_tensors(name, config)
