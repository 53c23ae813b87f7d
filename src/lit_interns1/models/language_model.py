"""The decoder of Intern-S1 and Intern-S1-Pro (and of Qwen3, Qwen3-MoE and Llama, which share its shape).

    h = Decoder(ids);   logits = W_head h

Tokens are flat (T of them, documents one behind the other), so padding is never computed and never routed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lit_interns1.models.config import LanguageModelConfig
from lit_interns1.models.decoder import Decoder
from lit_interns1.nn.document_attention import Attend
from lit_interns1.nn.head import GradientHint, LanguageModelHead, TokenScores
from lit_interns1.nn.moe import RouterStats, RoutingRecord
from lit_interns1.nn.parallel_plan import ParallelPlan


@dataclass
class LanguageModelOutput:
    """What a forward pass gives.

    Attributes:
        hidden_TD: (T, hidden), after the final norm.
        logits: (T, V), or (B, S, V) for a 2-d input; None if targets were given.
        scores: Log-probabilities and more of the targets; None without targets.
        router_stats: One per MoE layer.
        routing: The expert ids that were used, if asked for.
    """

    hidden_TD: Tensor
    logits: Tensor | None
    scores: TokenScores | None
    router_stats: list[RouterStats]
    routing: RoutingRecord | None


class LanguageModel(Decoder):
    """A decoder-only language model.

    Args:
        config: Its shape. Weights are uninitialised until `nn.initialization.materialize` (or a checkpoint) fills them;
            `LanguageModel.create` does both.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.lm_head = LanguageModelHead(
            config.hidden_size, config.vocab_size,
            initializer_std=config.initializer_range,
            logits_dtype=torch.float32 if config.head_dtype == "float32" else None,
        )  # fmt: skip
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head share the embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.tie(cast(nn.Parameter, self.embed_tokens.weight))

    @property
    def head_is_embedding(self) -> bool:
        """Whether the weights are tied."""
        return self.config.tie_word_embeddings

    def parallel_plan(self) -> ParallelPlan:
        """Embedding, blocks, and norm with head are units; a head that shares the embedding's weight goes with it."""
        tied, head = self.config.tie_word_embeddings, self.lm_head
        float32 = self.float32_routers
        if self.config.head_dtype == "float32" and not tied:
            float32.append(head)
        first = [self.embed_tokens, head] if tied else [self.embed_tokens]
        last = [self.norm] if tied or head in float32 else [self.norm, head]
        return ParallelPlan([first, *self.layers, last], self.moe_layers, float32, recompute=self.recompute_blocks)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds_TD: Tensor | None = None,
        position_ids: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        attend: Attend | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        rank: bool = False,
        gradient_hint: GradientHint | None = None,
        routed_experts_TLK: Tensor | None = None,
        record_routing: bool = False,
        token_mask_T: Tensor | None = None,
        logits_index: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Runs the model.

        Args:
            input_ids: (T,) flat packed tokens, or (B, S) with one document per row.
            inputs_embeds_TD: (T, hidden) in place of `input_ids`.
            position_ids: (T,) or (B, S); default: restarting in every document.
            rotary: Cosine and sine of the positions, if they are not those of `position_ids`.
            cu_seqlens: (D+1,) document boundaries of flat tokens; default: one document (one per row for 2-d input).
            attend: Attention over something else than the packed documents, such as a cache.
            targets: (T,) or (B, S) tokens to score at each position, already shifted, -100 = none. With targets the
                output holds `scores`, and logits are never materialised.
            temperature: Divides the logits in `scores`.
            entropy: Also give the entropy.
            rank: Also give the rank of the target.
            gradient_hint: What the loss will ask of the scores; saves time in backward (see the head).
            routed_experts_TLK: (T, MoE layers, K) expert ids to replay, -1 = choose live.
            record_routing: Give the expert ids that were used.
            token_mask_T: (T,) bool, tokens that count in the router statistics (False = padding).
            logits_index: (N,) positions whose logits are wanted; default: all. Without targets only.

        Raises:
            ValueError: If inputs are missing or their shapes do not fit together.
        """
        hidden_TD, stats, routing = self.decode(
            input_ids, inputs_embeds_TD=inputs_embeds_TD, position_ids=position_ids, rotary=rotary,
            cu_seqlens=cu_seqlens, attend=attend, routed_experts_TLK=routed_experts_TLK,
            record_routing=record_routing, token_mask_T=token_mask_T,
        )  # fmt: skip
        logits, scores = None, None
        if targets is not None:
            scores = self.lm_head(
                hidden_TD, targets.reshape(-1), temperature=temperature, entropy=entropy, rank=rank,
                gradient_hint=gradient_hint,
            )  # fmt: skip
        else:
            logits = self.lm_head(hidden_TD if logits_index is None else hidden_TD.index_select(0, logits_index))
            if input_ids is not None and input_ids.ndim == 2 and logits_index is None:
                logits = logits.view(*input_ids.shape, -1)
        return LanguageModelOutput(hidden_TD, logits, scores, stats, routing)
