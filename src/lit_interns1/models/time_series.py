"""The time-series encoder of the Intern-S1 family (arXiv 2508.15763 §2.3; 2603.25040 §2.5).

    signal (T, C) → overlapping patches (L₁, p, C), p from the sampling rate
    patch   C rows of p numbers, each: convolution, ReLU, sinusoidal positions, one transformer layer over p;
            mean over all of them → (L₁, 128)
    join    two neighbours → (⌊L₁/2⌋, 256)
    encoder Whisper's (arXiv 2212.04356 §2.2), causal, with a convolution of stride 2 → (L₃, output)
    projector LayerNorm, linear, GELU, linear → (L₃, hidden of the decoder)

Signals of one stride share a batch: their patches have one length, and no patch is padded with patches of others.
Names of parameters are those of the released files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_interns1.models.config import check_divides, check_positive
from lit_interns1.nn.document_attention import Attend, DocumentAttention
from lit_interns1.nn.initialization import Constant, Distribution, Normal
from lit_interns1.nn.parallel_plan import ParallelPlan
from lit_interns1.nn.signal_patches import patch_count, patch_stride

_POINTS_AT_ONCE = 32768
"""Points that go through the patch encoder together; more are done one part after the other, and recomputed in
backward: its feed-forward network is 16 times as wide as a point's features."""


@dataclass(frozen=True)
class TimeSeriesConfig:
    """The encoder's shape. The defaults are those published with Intern-S1-mini's time-series variant.

    Attributes:
        hidden_size: Width of the encoder.
        num_layers: Its layers.
        num_heads: Its heads.
        intermediate_size: Width inside its feed-forward networks.
        adapted_size: Channels into the convolutions (`num_mel_bins`).
        max_positions: Learned positions; later tokens have none.
        patch_size: Width of a patch's features; two are joined.
        patch_heads: Heads of the patch encoder.
        patch_intermediate_size: Width inside its feed-forward network.
        output_size: Width of the encoder's output, and of the projector's input.
        channels: What the patch encoder sees of a signal with C channels: "interleaved" is what the released code does:
            the p · C numbers of a patch, all channels of a point before the next point, in C pieces of p; "separate"
            is one channel after the other. The same for one channel.
        dropout: In the patch encoder (the released training code has 0.1).
        initializer_range: Standard deviation of initial weights.
    """

    hidden_size: int = 768
    num_layers: int = 17
    num_heads: int = 8
    intermediate_size: int = 3072
    adapted_size: int = 80
    max_positions: int = 1500
    patch_size: int = 128
    patch_heads: int = 8
    patch_intermediate_size: int = 2048
    output_size: int = 1024
    channels: Literal["interleaved", "separate"] = "interleaved"
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_positive(
            self, "hidden_size", "num_layers", "num_heads", "intermediate_size", "adapted_size", "max_positions",
            "patch_size", "patch_heads", "patch_intermediate_size", "output_size",
        )  # fmt: skip
        check_divides(("hidden_size", self.hidden_size), ("num_heads", self.num_heads))
        check_divides(("patch_size", self.patch_size), ("2 × patch_heads", 2 * self.patch_heads))
        if self.channels not in ("interleaved", "separate"):
            raise ValueError(f"channels = {self.channels!r} is unknown: choose interleaved or separate")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must lie in [0, 1)")


class _PointAttention(nn.Module):
    """Self-attention over the points of a patch."""

    def __init__(self, size: int, heads: int, std: float) -> None:
        super().__init__()
        self.heads, self._std = heads, std
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)

    def parameter_distribution(self, name: str) -> Distribution:
        return Normal(self._std) if name == "in_proj_weight" else Constant(0.0)

    def forward(self, x_NPD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in F.linear(x_NPD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _PointLayer(nn.Module):
    """A transformer layer with the norms behind its parts."""

    def __init__(self, config: TimeSeriesConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.self_attn = _PointAttention(size, config.patch_heads, config.initializer_range)
        self.linear1 = nn.Linear(size, config.patch_intermediate_size)
        self.linear2 = nn.Linear(config.patch_intermediate_size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_NPD: Tensor) -> Tensor:
        x_NPD = self.norm1(x_NPD + self.dropout(self.self_attn(x_NPD)))
        return self.norm2(x_NPD + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x_NPD))))))


class PatchEncoder(nn.Module):
    """(N, p) points of one channel → (N, patch size).

    Args:
        config: The shape.
    """

    def __init__(self, config: TimeSeriesConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv1d(1, config.patch_size, kernel_size=5, padding=2)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer_encoder = nn.ModuleDict({"layers": nn.ModuleList([_PointLayer(config)])})

    def _positions(self, points: int, device: torch.device) -> Tensor:
        size = self.config.patch_size
        frequencies = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(1e4) / size))
        angles = torch.arange(points, device=device)[:, None] * frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    def forward(self, patches_NP: Tensor) -> Tensor:
        """(N, p) → (N, patch size)."""
        x_NPD = F.relu(self.conv(patches_NP[:, None])).transpose(1, 2)
        x_NPD = self.dropout(x_NPD + self._positions(patches_NP.shape[1], x_NPD.device).to(x_NPD.dtype))
        layers = self.transformer_encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x_NPD = layer(x_NPD)
        return x_NPD.mean(dim=1)


class _EncoderAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj, self.q_proj, self.out_proj = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x_TD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(0, q, k, v).flatten(1))


class EncoderLayer(nn.Module):
    """A layer of Whisper's encoder, over packed signals.

    Args:
        size: Width.
        heads: Heads.
        intermediate_size: Width inside the feed-forward network.
    """

    def __init__(self, size: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.self_attn = _EncoderAttention(size, heads)
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, size)
        self.final_layer_norm = nn.LayerNorm(size)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        """(T, size) → (T, size)."""
        x_TD = x_TD + self.self_attn(self.self_attn_layer_norm(x_TD), attend)
        return x_TD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_TD))))


class SequenceEncoder(nn.Module):
    """Joined patches of several signals → features, half as many.

    Args:
        config: The shape.
    """

    def __init__(self, config: TimeSeriesConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.adapt_in = nn.Linear(2 * config.patch_size, config.adapted_size)
        self.conv1 = nn.Conv1d(config.adapted_size, size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_positions, size)
        self.layers = nn.ModuleList(
            EncoderLayer(size, config.num_heads, config.intermediate_size) for _ in range(config.num_layers)
        )
        self.layer_norm = nn.LayerNorm(size)
        self.adapt_out = nn.Linear(size, config.output_size)

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """(Σ L₂, 2 · patch size), signals of the given lengths one behind the other, → (Σ (L₂+1)//2, output)."""
        parts = self.adapt_in(x_TD).split(list(lengths))
        padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2)  # zeros, as conv pads
        present = torch.arange(padded.shape[2], device=x_TD.device) < torch.tensor(lengths, device=x_TD.device)[:, None]
        padded = F.gelu(self.conv1(padded)) * present[:, None]
        padded = F.gelu(self.conv2(padded)).transpose(1, 2)
        shorter = [(length + 1) // 2 for length in lengths]
        known = min(padded.shape[1], self.config.max_positions)
        positions = F.pad(self.embed_positions.weight[:known], (0, 0, 0, padded.shape[1] - known))
        padded = padded + positions
        y_TD = torch.cat([padded[i, :length] for i, length in enumerate(shorter)])
        attend = DocumentAttention(torch.tensor([0, *shorter], device=x_TD.device).cumsum(0))
        for layer in self.layers:
            y_TD = layer(y_TD, attend)
        return self.adapt_out(self.layer_norm(y_TD))


class SignalProjector(nn.Module):
    """Features → vectors of the decoder.

    Args:
        size: Width of the features.
        output_size: Width of the decoder.
    """

    def __init__(self, size: int, output_size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(size)
        self.linear_1 = nn.Linear(size, output_size)
        self.linear_2 = nn.Linear(output_size, output_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, size) → (T, output)."""
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(x_TD))))


class TimeSeriesEncoder(nn.Module):
    """Signals → tokens of a language model.

    Args:
        config: The shape.
        output_size: Width of the decoder.
    """

    def __init__(self, config: TimeSeriesConfig, output_size: int) -> None:
        super().__init__()
        self.config = config
        self.encoder_embed = PatchEncoder(config)
        self.encoder = SequenceEncoder(config)
        self.projector = SignalProjector(config.output_size, output_size)

    def forward(self, signals: Sequence[Tensor], sampling_rates: Sequence[float]) -> list[Tensor]:
        """Features of every signal.

        Args:
            signals: (T, C) each, normalised per channel.
            sampling_rates: In Hz, one each.

        Returns:
            (tokens, output) each; the numbers of tokens are `token_count`'s.

        Raises:
            ValueError: If a signal is empty or has another number of dimensions, or there are not as many rates.
        """
        if len(signals) != len(sampling_rates):
            raise ValueError(f"{len(signals)} signals have {len(sampling_rates)} sampling rates")
        for signal in signals:
            if signal.ndim != 2 or not signal.numel():
                raise ValueError(f"a signal must be (points, channels), at least one each, got {tuple(signal.shape)}")
        strides = [patch_stride(rate) for rate in sampling_rates]
        patches = [self._patches(signal, stride) for signal, stride in zip(signals, strides, strict=True)]
        features: list[Tensor] = [signals[0].new_empty(0)] * len(signals)
        for stride in dict.fromkeys(strides):
            members = [i for i, other in enumerate(strides) if other == stride]
            local_ND = self._encode_patches(torch.cat([patches[i].flatten(0, 1) for i in members]))
            sizes = [patches[i].shape[0] * patches[i].shape[1] for i in members]
            for i, part in zip(members, local_ND.split(sizes), strict=True):
                features[i] = part.unflatten(0, patches[i].shape[:2]).mean(dim=1)
        joined = [f[: len(f) // 2 * 2].reshape(-1, 2 * f.shape[1]) for f in features]
        lengths = [len(part) for part in joined]
        output = self.projector(self.encoder(torch.cat(joined), lengths))
        return list(output.split([(length + 1) // 2 for length in lengths]))

    def _patches(self, signal_TC: Tensor, stride: int) -> Tensor:
        """(T, C) → (L₁, C, p), the tail extended with zeros."""
        count = patch_count(signal_TC.shape[0], stride)
        missing = (count + 1) * stride - signal_TC.shape[0]
        patches = F.pad(signal_TC, (0, 0, 0, missing)).unfold(0, 2 * stride, stride)
        return patches if self.config.channels == "separate" else patches.mT.reshape(patches.shape)

    def _encode_patches(self, patches_NP: Tensor) -> Tensor:
        """(N, p) → (N, patch size), in parts if there are many."""
        parts = patches_NP.split(max(1, _POINTS_AT_ONCE // patches_NP.shape[1]))
        if len(parts) == 1:
            return self.encoder_embed(patches_NP)
        if not torch.is_grad_enabled():
            return torch.cat([self.encoder_embed(part) for part in parts])
        return torch.cat([checkpoint(self.encoder_embed, part, use_reentrant=False) for part in parts])

    def smallest_input(self, device: torch.device | None = None) -> tuple[list[Tensor], list[float]]:
        """The smallest signal there is: what ranks without one compute, to join the collectives."""
        return [torch.zeros(1, 1, device=device)], [1.0]

    def parallel_plan(self) -> ParallelPlan:
        """Every layer of the encoder is a unit."""
        return ParallelPlan(list(self.encoder.layers), checkpointed=list(self.encoder.layers))
