"""Small GGUF files, written with the gguf library from a model of ours; the rules are spelled out here once more."""

import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch

from lit_interns1.models import LanguageModel, LanguageModelConfig, PositionConfig

CONFIG = LanguageModelConfig(
    vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    qk_norm=False, rms_norm_eps=1e-5, positions=PositionConfig(theta=5e5, max_position_embeddings=128),
)  # fmt: skip
CONFIGS = {
    "llama": CONFIG,
    "qwen2": replace(CONFIG, attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(CONFIG, qk_norm=True, num_heads=2, num_kv_heads=1, head_dim=128, tie_word_embeddings=True),
}
"""One of every architecture. transformers takes every "qwen3" file to have heads of width 128."""

_PARTS = (
    ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("embed_tokens", "token_embd"), ("layers.", "blk."),
    ("lm_head", "output"),
)  # fmt: skip


def random_model(config: LanguageModelConfig, seed: int = 4) -> LanguageModel:
    """Every parameter random, also norms and biases, which start as ones and zeros."""
    model = LanguageModel.create(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def file_name(name: str) -> str:
    """A tensor's name in GGUF files."""
    if name == "norm.weight":
        return "output_norm.weight"
    for ours, theirs in _PARTS:
        name = name.replace(ours, theirs)
    return name


def neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of queries or keys as "llama" files have them: j and j + d/2 of every head become neighbours."""
    order = [
        head * head_dim + half * (head_dim // 2) + j
        for head in range(len(rows) // head_dim) for j in range(head_dim // 2) for half in (0, 1)
    ]  # fmt: skip
    return rows[order]


def written_tensors(model: LanguageModel, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of a file as float32, by name."""
    result = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.detach().numpy().copy()
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            values = neighbours(values, model.config.head_dim)
        result[file_name(name)] = values
    return result


def metadata(config: LanguageModelConfig, architecture: str) -> dict[str, object]:
    """Values under the architecture's name, that name left out."""
    values = {
        "block_count": config.num_layers, "context_length": config.positions.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "rope.freq_base": float(config.positions.theta), "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if architecture == "qwen3":
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "llama":
        values["rope.dimension_count"] = config.head_dim
    return values


def write_gguf(
    path: Path, architecture: str, tensors: dict, values: dict, kind: str = "F32", more=None, tokenizer=None
) -> Path:
    """A file.

    Args:
        path: Where.
        architecture: `general.architecture`.
        tensors: Float32 arrays by name, or pairs of bytes (rows, bytes of a row) and the name of their type.
        values: Metadata under the architecture's name; None leaves out.
        kind: Type of the matrices; vectors stay float32.
        more: Other metadata, by full names.
        tokenizer: (tokens, merges, types, name of the splitter, end-of-text id).
    """
    writer = gguf.GGUFWriter(path, architecture)
    named = {f"{architecture}.{key}": value for key, value in values.items()} | (more or {})
    for key, value in named.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    if tokenizer is not None:
        tokens, merges, types, splitter, end = tokenizer
        writer.add_tokenizer_model("gpt2")
        if splitter is not None:
            writer.add_tokenizer_pre(splitter)
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types(types)
        writer.add_eos_token_id(end)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        elif tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(name, tensor)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: LanguageModel, architecture: str, kind: str = "F32", tokenizer=None) -> Path:
    """A file of a model."""
    values = metadata(model.config, architecture)
    return write_gguf(path, architecture, written_tensors(model, architecture), values, kind, tokenizer=tokenizer)
