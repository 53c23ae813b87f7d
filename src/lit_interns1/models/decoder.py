"""The body that a language model and a reward model share: embedding, blocks and the last norm, without a head.

    x = E[ids];   x ← x + Attention(RMSNorm(x));   x ← x + FFN(RMSNorm(x));   h = RMSNorm(x_L)
    FFN: SwiGLU, or routed SwiGLU experts

Tokens are flat (T of them, documents one behind the other), so padding is never computed and never routed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_interns1.models.config import LanguageModelConfig
from lit_interns1.nn.attention import GroupedQueryAttention
from lit_interns1.nn.document_attention import Attend, DocumentAttention, restarting_positions
from lit_interns1.nn.feed_forward import SwiGLU
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.moe import ROUTERS, MoEFeedForward, RoutedExperts, Router, RouterStats, RoutingRecord
from lit_interns1.nn.norm import RMSNorm
from lit_interns1.nn.rotary import FourierRotaryEmbedding, RotaryEmbedding


class DecoderOutput(NamedTuple):
    """What the body gives.

    Attributes:
        hidden_TD: (T, hidden), after the last norm.
        router_stats: One per MoE layer.
        routing: The expert ids that were used, if asked for.
    """

    hidden_TD: Tensor
    router_stats: list[RouterStats]
    routing: RoutingRecord | None


def build_router(config: LanguageModelConfig) -> Router:
    """The router that a config describes."""
    assert config.moe is not None
    moe = config.moe
    router = ROUTERS[moe.router](
        config.hidden_size, moe.num_experts, moe.experts_per_token, num_groups=moe.num_groups,
        normalize_weights=moe.normalize_weights, scaling_factor=moe.scaling_factor, dtype=moe.router_dtype,
        gradient=moe.router_gradient, ste_temperature=moe.ste_temperature, initializer_std=config.initializer_range,
    )  # fmt: skip
    return router.requires_grad_(not moe.freeze_router)


class DecoderBlock(nn.Module):
    """One layer.

    Args:
        config: Shape of the model.
        layer: Index of the layer.
    """

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            qk_norm=config.qk_norm, bias=config.attention_bias, rms_norm_eps=config.rms_norm_eps, layer=layer,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoEFeedForward | SwiGLU
        if config.is_moe_layer(layer):
            assert config.moe is not None
            experts = RoutedExperts(
                config.moe.num_experts, config.hidden_size, config.moe.intermediate_size,
                backend=config.moe.expert_backend, initializer_std=config.initializer_range,
                precision=config.moe.expert_precision,
            )  # fmt: skip
            self.mlp = MoEFeedForward(build_router(config), experts)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        replay: RoutingRecord | None = None,
        record: RoutingRecord | None = None,
        moe_layer: int = 0,
        token_mask_T: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """(T, hidden) → (T, hidden) and the router's statistics (None in a dense layer).

        Args:
            x_TD: (T, hidden).
            rotary: Cosine and sine of the positions.
            attend: How tokens see one another.
            replay: Expert ids to use.
            record: Where the ids used are written; ids already there are replayed (that is a recomputation).
            moe_layer: Index among the MoE layers.
            token_mask_T: Tokens that count in the statistics.
        """
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotary, attend)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, SwiGLU):
            return x_TD + self.mlp(normed_TD), None
        recorded = record.get(moe_layer) if record is not None else None
        recomputing = recorded is not None and replay is None
        if recorded is None and replay is not None:
            recorded = replay.get(moe_layer)
        y_TD, routing = self.mlp(normed_TD, recorded, token_mask_T, recomputing)
        if record is not None:
            record.put(moe_layer, routing.ids_TK)
        return x_TD + y_TD, routing.stats


class Decoder(nn.Module):
    """Embedding, blocks and norm; a subclass adds its head.

    Args:
        config: Its shape. Weights are uninitialised until `nn.initialization.materialize` (or a checkpoint) fills them;
            `create` does both.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = self.build_rotary(config)
        self.recomputes_blocks = config.activation_checkpointing == "block"

    @staticmethod
    def build_rotary(config: LanguageModelConfig) -> RotaryEmbedding | FourierRotaryEmbedding:
        """The position tables that a config describes."""
        positions = config.positions
        if positions.kind == "rope":
            return RotaryEmbedding(config.head_dim, positions.theta)
        return FourierRotaryEmbedding(
            config.head_dim, positions.theta, positions.max_position_embeddings, config.num_kv_heads,
            init_factor=positions.fope_init_factor, separate_heads=positions.fope_separate_heads,
            num_frequencies=positions.fope_num_frequencies, sin_pad=positions.fope_sin_pad, seed=positions.fope_seed,
            trainable=positions.fope_trainable,
        )  # fmt: skip

    @classmethod
    def create(cls, config: LanguageModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> Self:
        """A model with initial weights that depend on the seed and the parameters' names only."""
        with torch.device("meta"):
            model = cls(config)
        materialize(model, device=device, seed=seed, std=config.initializer_range)
        return model

    @property
    def moe_layers(self) -> list[MoEFeedForward]:
        """The sparse feed-forward networks in order."""
        return [m for m in self.modules() if isinstance(m, MoEFeedForward)]

    @property
    def float32_routers(self) -> list[nn.Module]:
        """Routers that compute in float32 whatever the model's type."""
        moe = self.config.moe
        return [layer.router for layer in self.moe_layers] if moe and moe.router_dtype == "float32" else []

    @property
    def head_is_embedding(self) -> bool:
        """Whether the embedding's weight is multiplied, too, and not only looked up."""
        return False

    def recompute_blocks(self) -> None:
        """Recomputes every block in backward from now on, whatever the config says."""
        self.recomputes_blocks = True

    def decode(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds_TD: Tensor | None = None,
        position_ids: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        attend: Attend | None = None,
        routed_experts_TLK: Tensor | None = None,
        record_routing: bool = False,
        token_mask_T: Tensor | None = None,
    ) -> DecoderOutput:
        """Runs the body; see `LanguageModel.forward` for the arguments.

        Raises:
            ValueError: If inputs are missing or their shapes do not fit together.
        """
        if (input_ids is None) == (inputs_embeds_TD is None):
            raise ValueError("give either input_ids or inputs_embeds_TD")
        if input_ids is not None:
            if input_ids.ndim == 2:
                if cu_seqlens is None and attend is None:
                    rows, length = input_ids.shape
                    cu_seqlens = torch.arange(rows + 1, device=input_ids.device, dtype=torch.int32) * length
            elif input_ids.ndim != 1:
                raise ValueError(f"input_ids must be (tokens,) or (rows, length), got {tuple(input_ids.shape)}")
            x_TD = self.embed_tokens(input_ids.reshape(-1))
        else:
            assert inputs_embeds_TD is not None
            x_TD = inputs_embeds_TD
        tokens, device = x_TD.shape[0], x_TD.device
        if attend is None:
            if cu_seqlens is None:
                cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
            if int(cu_seqlens[-1]) != tokens:
                raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {tokens} tokens")
            attend = DocumentAttention(cu_seqlens, self.config.attention_backend)
        if rotary is None:
            if position_ids is None:
                if cu_seqlens is None:
                    raise ValueError("position_ids are needed together with `attend`")
                position_ids = restarting_positions(cu_seqlens)
            rotary = self.rotary_emb(position_ids.reshape(-1))
        replay = RoutingRecord(routed_experts_TLK) if routed_experts_TLK is not None else None
        if replay is not None and replay.num_layers != self.config.num_moe_layers:
            raise ValueError(f"routing of {replay.num_layers} layers for {self.config.num_moe_layers} MoE layers")
        recompute = self.recomputes_blocks and torch.is_grad_enabled()
        record = RoutingRecord() if record_routing or recompute else None
        stats: list[RouterStats] = []
        for block in self.layers:
            arguments: tuple[Any, ...] = (x_TD, rotary, attend, replay, record, len(stats), token_mask_T)
            if recompute:
                x_TD, layer_stats = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TD, layer_stats = block(*arguments)
            if layer_stats is not None:
                stats.append(layer_stats)
        return DecoderOutput(self.norm(x_TD), stats, record if record_routing else None)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
        total: All of them; tied weights once.
        active: Those that one token meets: of each MoE layer, K experts.
    """

    total: int
    active: int


def count_parameters(model: Decoder) -> ParameterCounts:
    """Counts parameters; works on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.moe_layers:
        per_expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.router.num_experts
        idle += per_expert * (layer.router.num_experts - layer.router.experts_per_token)
    return ParameterCounts(total, total - idle)


def flops_per_token(model: Decoder, context_length: float) -> float:
    """Floating-point operations of forward and backward per token: 6 per active weight, and attention's own products.

    Args:
        model: The model.
        context_length: Mean number of tokens that a token attends to.
    """
    config = model.config
    active = count_parameters(model).active - (0 if model.head_is_embedding else model.embed_tokens.weight.numel())
    return 6.0 * active + 12.0 * config.num_layers * config.num_heads * config.head_dim * context_length
