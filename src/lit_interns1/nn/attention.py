"""Grouped-query attention (arXiv 2305.13245) with optional RMSNorm on queries and keys, as in Qwen3.

    q, k ← rotate(norm_q(W_q x), norm_k(W_k x));   y = W_o · concat_h softmax(q_h k_{⌊h/g⌋}ᵀ / √d) v_{⌊h/g⌋}

The norms act on the head dimension with one weight shared by all heads, before the rotation.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_interns1.nn.document_attention import Attend
from lit_interns1.nn.norm import RMSNorm
from lit_interns1.nn.rotary import apply_rotary


class GroupedQueryAttention(nn.Module):
    """Attention of one layer. Which tokens see which is decided by the `attend` object it is given.

    Args:
        hidden_size: Width of the residual stream.
        num_heads: Query heads, a multiple of `num_kv_heads`.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head; heads × width need not be the hidden size.
        qk_norm: RMSNorm on queries and keys.
        bias: Biases on the query, key and value projections.
        rms_norm_eps: ε of the norms.
        layer: Index of the layer, for caches.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int,
        qk_norm: bool = True, bias: bool = False, rms_norm_eps: float = 1e-6, layer: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer = num_heads, num_kv_heads, head_dim, layer
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """(T, hidden) → (T, hidden); `rotary` holds cos and sin of the tokens' positions."""
        tokens = x_TD.shape[0]
        q_THd = self.q_norm(self.q_proj(x_TD).view(tokens, self.num_heads, self.head_dim))
        k_TGd = self.k_norm(self.k_proj(x_TD).view(tokens, self.num_kv_heads, self.head_dim))
        v_TGd = self.v_proj(x_TD).view(tokens, self.num_kv_heads, self.head_dim)
        q_THd, k_TGd = apply_rotary(q_THd, k_TGd, *rotary)
        return self.o_proj(attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1))
