"""Names of tensors in GGUF files, and how their rows lie, by architecture.

    blk.{layer}.attn_q.weight  ↔  layers.{layer}.self_attn.q_proj.weight     and so on

llama.cpp rotates neighbouring channels, 2j with 2j+1; the network here rotates halves, j with j + d/2. Files of "llama"
therefore hold the rows of queries and keys in the first order; those of "qwen2" and "qwen3" as they are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_interns1.checkpoints.huggingface.layouts import Layout, Part
from lit_interns1.checkpoints.huggingface.rules import Rule, Spelling

_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{
        "layers.{layer}." + ours: "blk.{layer}." + theirs
        for ours, theirs in {
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            "self_attn.q_proj.weight": "attn_q.weight",
            "self_attn.k_proj.weight": "attn_k.weight",
            "self_attn.v_proj.weight": "attn_v.weight",
            "self_attn.o_proj.weight": "attn_output.weight",
            "self_attn.q_proj.bias": "attn_q.bias",
            "self_attn.k_proj.bias": "attn_k.bias",
            "self_attn.v_proj.bias": "attn_v.bias",
            "self_attn.q_norm.weight": "attn_q_norm.weight",
            "self_attn.k_norm.weight": "attn_k_norm.weight",
            "mlp.gate_proj.weight": "ffn_gate.weight",
            "mlp.up_proj.weight": "ffn_up.weight",
            "mlp.down_proj.weight": "ffn_down.weight",
        }.items()
    },
}
_TEXT = Part(
    "language_model.",
    tuple(Rule(ours, (Spelling((theirs,)),)) for ours, theirs in _NAMES.items()),
    ("token_embd.", "blk.", "output"),
)


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` stands for.

    Attributes:
        layout: The table of names.
        qk_norm: Queries and keys are normalised.
        neighbours: Rows of queries and keys lie so that neighbours rotate together.
    """

    layout: Layout
    qk_norm: bool = False
    neighbours: bool = False


ARCHITECTURES = {
    "llama": Architecture(Layout("gguf llama", "LlamaForCausalLM", _TEXT, computed=()), neighbours=True),
    "qwen2": Architecture(Layout("gguf qwen2", "Qwen2ForCausalLM", _TEXT, computed=())),
    "qwen3": Architecture(Layout("gguf qwen3", "Qwen3ForCausalLM", _TEXT, computed=()), qk_norm=True),
}
"""Architectures that can be read, by their name in the file."""
