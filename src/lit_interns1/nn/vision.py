"""The transformer block of image encoders: full attention inside an image, no gate, biases, optional layer scale.

    x ← x + λ₁ ⊙ W_o attention(norm₁ x);   x ← x + λ₂ ⊙ W₂ act(W₁ norm₂ x)

InternViT (arXiv 2312.14238 §3.2; 2508.15763 §2.1) has λ and normalises queries and keys over the whole width; the
native-resolution encoder (arXiv 2603.25040 §2.3) has neither, and rotates queries and keys by row and column.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.nn.document_attention import Attend
from lit_interns1.nn.initialization import Constant, Distribution
from lit_interns1.nn.norm import RMSNorm
from lit_interns1.nn.rotary import apply_rotary

NormKind = Literal["rms_norm", "layer_norm"]


def build_norm(kind: NormKind, size: int, eps: float) -> nn.Module:
    """RMSNorm, or LayerNorm with weight and bias."""
    return RMSNorm(size, eps) if kind == "rms_norm" else nn.LayerNorm(size, eps)


class VisionAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values.

    Args:
        hidden_size: Width; the heads share it.
        num_heads: Heads.
        bias: Biases on queries, keys and values; the output projection always has one.
        qk_norm: RMSNorm on queries and on keys, over the whole width before it is divided into heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = RMSNorm(hidden_size, 1e-6) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size, 1e-6) if qk_norm else nn.Identity()

    def forward(self, x_PD: Tensor, attend: Attend, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(P, hidden) → (P, hidden); `attend` knows which patches belong together."""
        q, k, v = self.qkv(x_PD).chunk(3, dim=-1)
        heads = (x_PD.shape[0], self.num_heads, self.head_dim)
        q_PHd, k_PHd, v_PHd = self.q_norm(q).reshape(heads), self.k_norm(k).reshape(heads), v.reshape(heads)
        if rotary is not None:  # in float32, whatever the type of the rest
            q_PHd, k_PHd = (x.to(v.dtype) for x in apply_rotary(q_PHd.float(), k_PHd.float(), *rotary))
        return self.o_proj(attend(0, q_PHd, k_PHd, v_PHd).flatten(1))


class VisionFeedForward(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        hidden_size: Width of input and output.
        intermediate_size: Width between them.
        activation: "gelu", or its tanh approximation "gelu_tanh".
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Literal["gelu", "gelu_tanh"]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.approximate = "tanh" if activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) → (..., hidden)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class VisionBlock(nn.Module):
    """One layer of an image encoder.

    Args:
        hidden_size: Width of the residual stream.
        num_heads: Heads.
        intermediate_size: Width inside the feed-forward network.
        activation: See `VisionFeedForward`.
        norm: Kind of the two norms.
        norm_eps: Their ε.
        attention_bias: Biases on queries, keys and values.
        qk_norm: See `VisionAttention`.
        layer_scale: Start of λ₁ and λ₂; None = no layer scale.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, activation: Literal["gelu", "gelu_tanh"],
        norm: NormKind = "layer_norm", norm_eps: float = 1e-6, attention_bias: bool = True, qk_norm: bool = False,
        layer_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = build_norm(norm, hidden_size, norm_eps)
        self.attention = VisionAttention(hidden_size, num_heads, attention_bias, qk_norm)
        self.norm2 = build_norm(norm, hidden_size, norm_eps)
        self.mlp = VisionFeedForward(hidden_size, intermediate_size, activation)
        self._start = layer_scale
        for name in ("layer_scale1", "layer_scale2"):
            self.register_parameter(name, None if layer_scale is None else nn.Parameter(torch.empty(hidden_size)))

    layer_scale1: Tensor | None
    layer_scale2: Tensor | None

    def parameter_distribution(self, name: str) -> Distribution:
        """The layer scales start at the value that was given."""
        assert self._start is not None
        return Constant(self._start)

    def forward(self, x_PD: Tensor, attend: Attend, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(P, hidden) → (P, hidden)."""
        attended = self.attention(self.norm1(x_PD), attend, rotary)
        x_PD = x_PD + (attended if self.layer_scale1 is None else self.layer_scale1 * attended)
        fed = self.mlp(self.norm2(x_PD))
        return x_PD + (fed if self.layer_scale2 is None else self.layer_scale2 * fed)
