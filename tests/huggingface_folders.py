"""Small Hugging Face folders, written by hand from a model of ours, for tests without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig

CONFIG = LanguageModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rms_norm_eps=1e-5,
    moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
    positions=PositionConfig(theta=3e3, max_position_embeddings=128),
)  # fmt: skip
VALUES = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 3e3, "rope_scaling": None,
    "max_position_embeddings": 128, "attention_bias": False, "tie_word_embeddings": False, "intermediate_size": 99,
}  # fmt: skip


def written_tensors(model: LanguageModel, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a Qwen3-MoE model under their published names, one for each matrix of an expert."""
    result = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to(dtype)
        if name.endswith("experts.gate_up_proj"):
            prefix = "model." + name.removesuffix("gate_up_proj")
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                result[f"{prefix}{expert}.gate_proj.weight"] = gate.contiguous()
                result[f"{prefix}{expert}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                result["model." + name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix.clone()
        else:
            key = name if name == "lm_head.weight" else "model." + name
            result[key.replace("mlp.router.", "mlp.gate.")] = tensor.clone()
    return result


def config_values(config: LanguageModelConfig) -> dict:
    """config.json of a model that differs from `CONFIG` in sizes."""
    assert config.moe is not None
    return {
        **VALUES, "vocab_size": config.vocab_size, "num_experts": config.moe.num_experts,
        "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], values=None, files: int = 1) -> Path:
    """config.json and one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VALUES if values is None else values))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(sorted(tensors.items())[number::files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def nested_modules(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Modules inside modules with zeros of these shapes under these names."""
    root = nn.Module()
    for name, shape in shapes.items():
        module, *path = root, *name.split(".")
        for step in path[:-1]:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(path[-1], nn.Parameter(torch.zeros(shape)))
    return root
