"""Rotary positions: RoPE and the Fourier position embedding (FoPE) of Intern-S1-Pro.

RoPE:  ω_j = θ^(−2j/d);  x' = x ⊙ cos(nω) + (−x₂, x₁) ⊙ sin(nω), with x₁ and x₂ the halves of x.
FoPE (arXiv 2412.17739; arXiv 2603.25040 §2.4): only frequencies that complete a period within the training length are
kept, ω_j > 2π / max_position_embeddings, and each channel is a mixture of all kept tones,

    cos~ = cos(n ω_kept) C_cos,   sin~ = sin(n ω_kept) C_sin     (one C per key/value head, or one for all)

padded to d/2 channels with cos~ = 1 and sin~ = sin_pad. With C = identity and every frequency kept FoPE is RoPE.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_interns1.nn.initialization import Constant
from lit_interns1_kernels.rotary import rotary


def apply_rotary(q_THd: Tensor, k_TGd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q_THd: (T, query heads, d).
        k_TGd: (T, key/value heads, d); query heads are a multiple of them.
        cos: (T, 1, d) for all heads, or (T, key/value heads, d).
        sin: As `cos`.

    Returns:
        Rotated queries and keys, in their own dtype (the tables are cast before use).
    """
    return rotary(q_THd, cos, sin), rotary(k_TGd, cos, sin)


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """ω_j for j = 0 … d/2−1, float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def kept_frequencies(
    head_dim: int, theta: float, max_position_embeddings: int, num_frequencies: int | None = None
) -> int:
    """D, the number of frequencies that FoPE keeps (the first ones: they are sorted, fastest first)."""
    if num_frequencies is not None:
        return num_frequencies
    return int((rotary_frequencies(head_dim, theta) > 2 * math.pi / max_position_embeddings).sum())


class RotaryEmbedding(nn.Module):
    """RoPE tables, shared by all layers of a model.

    Args:
        head_dim: d, even.
        theta: Base of the frequencies.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("frequencies", torch.empty(head_dim // 2), persistent=False)
        self.reset_buffers()

    frequencies: Tensor

    def reset_buffers(self) -> None:
        """Recomputes the frequencies."""
        if not self.frequencies.is_meta:
            self.frequencies.copy_(rotary_frequencies(self.head_dim, self.theta))

    def forward(self, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,) → cos and sin, each (T, 1, d), float32."""
        angles = position_ids_T[:, None].float() * self.frequencies
        return _two_halves(angles.cos()[:, None]), _two_halves(angles.sin()[:, None])


def axes_rotary(
    embedding: RotaryEmbedding, position_ids_T3: Tensor, sections: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """RoPE tables for positions in time, height and width (Qwen3-VL's interleaved M-RoPE, arXiv 2511.21631 §2).

    Frequency j turns with the height if j mod 3 = 1 and j < 3 · sections[1], with the width if j mod 3 = 2 and
    j < 3 · sections[2], else with the time. With equal positions on all axes it is RoPE.

    Args:
        embedding: Holds the frequencies.
        position_ids_T3: (T, 3).
        sections: Frequencies of time, height and width.

    Returns:
        cos and sin, each (T, 1, d), float32.
    """
    j = torch.arange(embedding.frequencies.numel(), device=embedding.frequencies.device)
    axis = torch.zeros_like(j)
    for number in (1, 2):
        axis[(j % 3 == number) & (j < 3 * sections[number])] = number
    angles = position_ids_T3.float().index_select(1, axis) * embedding.frequencies
    return _two_halves(angles.cos()[:, None]), _two_halves(angles.sin()[:, None])


def _two_halves(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)


class FourierRotaryEmbedding(nn.Module):
    """FoPE tables, shared by all layers of a model.

    The mixing matrices start as xavier-normal noise plus the identity, drawn from one generator of their own (sine
    first, then cosine), so that they are identical on every rank. They are saved with the model as `sin_coef` and
    `cos_coef` (the official names), and are not trained unless asked.

    Args:
        head_dim: d, even.
        theta: Base of the frequencies.
        max_position_embeddings: Training length; slower tones are dropped.
        num_kv_heads: Key/value heads; each has its own mixture if `separate_heads`.
        init_factor: Gain of the noise.
        separate_heads: One mixing matrix per key/value head instead of one for all.
        num_frequencies: Keep this many frequencies instead of following the rule.
        sin_pad: Value of the padded sine channels. 1 in the released Intern-S1-Pro weights: there it turns the dropped
            channels by 45° and doubles their dot product. 0 leaves them unrotated.
        seed: Seed of the mixing matrices.
        trainable: Make the mixing matrices parameters.

    Raises:
        ValueError: If no frequency is kept, or more than d/2 are asked for.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_position_embeddings: int,
        num_kv_heads: int,
        init_factor: float = 0.5,
        separate_heads: bool = True,
        num_frequencies: int | None = None,
        sin_pad: float = 0.0,
        seed: int = 123,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.sin_pad = head_dim, theta, sin_pad
        self.init_factor, self.seed = init_factor, seed
        self.kept = kept_frequencies(head_dim, theta, max_position_embeddings, num_frequencies)
        if not 1 <= self.kept <= head_dim // 2:
            raise ValueError(
                f"FoPE keeps {self.kept} frequencies of head_dim/2 = {head_dim // 2}: it must be between 1 and that; "
                f"check theta={theta}, max_position_embeddings={max_position_embeddings}, "
                f"num_frequencies={num_frequencies}"
            )
        shape = (num_kv_heads, self.kept, self.kept) if separate_heads else (self.kept, self.kept)
        self.register_buffer("frequencies", torch.empty(self.kept), persistent=False)
        for name in ("sin_coef", "cos_coef"):
            if trainable:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.empty(shape))
        self.reset_buffers()

    frequencies: Tensor
    sin_coef: Tensor
    cos_coef: Tensor

    def parameter_distribution(self, name: str) -> Constant:
        """Filled by `reset_buffers`, which the initialisation calls afterwards."""
        return Constant(0.0)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Recomputes the frequencies and draws the mixing matrices again."""
        if self.frequencies.is_meta:
            return
        self.frequencies.copy_(rotary_frequencies(self.head_dim, self.theta)[: self.kept])
        generator = torch.Generator().manual_seed(self.seed)
        for coefficients in (self.sin_coef, self.cos_coef):
            noise = torch.empty(coefficients.shape, dtype=torch.float32)
            nn.init.xavier_normal_(noise, gain=self.init_factor, generator=generator)
            coefficients.copy_(noise + torch.eye(self.kept))

    def _table(self, tones_TD: Tensor, coefficients: Tensor, pad: float) -> Tensor:
        if coefficients.ndim == 2:
            mixed_THD = (tones_TD @ coefficients.float())[:, None]
        else:
            mixed_THD = torch.einsum("td,hde->the", tones_TD, coefficients.float())
        missing = self.head_dim // 2 - self.kept
        return _two_halves(nn.functional.pad(mixed_THD, (0, missing), value=pad))

    def forward(self, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,) → cos and sin, each (T, key/value heads or 1, d), float32."""
        with torch.autocast(position_ids_T.device.type, enabled=False):
            angles = position_ids_T[:, None].float() * self.frequencies
            cos = self._table(angles.cos(), self.cos_coef, 1.0)
            return cos, self._table(angles.sin(), self.sin_coef, self.sin_pad)
