"""A small encoder of texts: each token sees all of its text.

    x = embed(ids);   x ← block(x), with rotated positions;   mean over the text's tokens of norm(x)

Blocks are those of the image encoders, with full attention inside a text (SigLIP's text tower, arXiv 2303.15343 §4, has
full attention, too; CLIP's is causal and takes the last token). Texts are packed, never padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_interns1.models.config import check_divides, check_positive
from lit_interns1.nn.document_attention import DocumentAttention, restarting_positions
from lit_interns1.nn.parallel_plan import ParallelPlan
from lit_interns1.nn.rotary import RotaryEmbedding
from lit_interns1.nn.vision import VisionBlock


@dataclass(frozen=True)
class TextEncoderConfig:
    """A text encoder.

    Attributes:
        vocab_size: Token ids.
        hidden_size: H.
        num_layers: Blocks.
        num_heads: Heads; they divide H.
        intermediate_size: Width inside the feed-forward networks.
        theta: Base of the frequencies of positions.
        norm_eps: ε of the norms.
    """

    vocab_size: int = 4096
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 256
    theta: float = 1e4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        check_divides(("hidden_size", self.hidden_size), ("2 × num_heads (halves of a rotation)", 2 * self.num_heads))


class TextEncoder(nn.Module):
    """The encoder without a projection.

    Args:
        config: Its shape.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config.hidden_size // config.num_heads, config.theta)
        self.layers = nn.ModuleList(
            VisionBlock(
                config.hidden_size, config.num_heads, config.intermediate_size, "gelu_tanh", norm_eps=config.norm_eps
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def parallel_plan(self) -> ParallelPlan:
        """Embedding and blocks are units."""
        return ParallelPlan([self.embed_tokens, *self.layers], checkpointed=list(self.layers))

    def forward(self, input_ids_T: Tensor, length_M: Tensor) -> Tensor:
        """Token ids of texts, one behind the other, and their lengths → (T, H), normalised."""
        cu_seqlens = torch.cat([length_M.new_zeros(1), length_M.cumsum(0)])
        attend = DocumentAttention(cu_seqlens, causal=False)
        x_TD = self.embed_tokens(input_ids_T)
        rotary = self.rotary_emb(restarting_positions(cu_seqlens))
        for block in self.layers:
            x_TD = block(x_TD, attend, rotary)
        return self.norm(x_TD)
