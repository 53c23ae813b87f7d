"""A language model whose head gives one number per token: a reward model, a token reward model, or a critic.

    v_t = w · h_t    h = Decoder(ids), as in a LanguageModel and with the same names     reward of a text = v at its end

The head has no bias and starts at zero, as OREAL starts its token reward model from the policy's weights (arXiv
2502.06781, §3.2): every value is 0 until something has been learned. POLAR reads the value at a final special token
(arXiv 2507.05197, §4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.models.config import LanguageModelConfig
from lit_interns1.models.decoder import Decoder
from lit_interns1.nn.document_attention import Attend
from lit_interns1.nn.initialization import Constant, Distribution, Normal
from lit_interns1.nn.moe import RouterStats, RoutingRecord
from lit_interns1.nn.parallel_plan import ParallelPlan


@dataclass
class RewardModelOutput:
    """What a forward pass gives.

    Attributes:
        values_T: (T,) float32, one per token, whatever the shape of the input.
        hidden_TD: (T, hidden), after the final norm.
        router_stats: One per MoE layer.
        routing: The expert ids that were used, if asked for.
    """

    values_T: Tensor
    hidden_TD: Tensor
    router_stats: list[RouterStats]
    routing: RoutingRecord | None


class ValueHead(nn.Module):
    """A linear map to one number without bias, in float32.

    Args:
        hidden_size: D.
        initializer_std: Standard deviation of the initial weights; 0 = they are zero.

    Raises:
        ValueError: If the standard deviation is negative.
    """

    def __init__(self, hidden_size: int, initializer_std: float = 0.0) -> None:
        super().__init__()
        if not initializer_std >= 0:
            raise ValueError(f"the value head's initializer_std = {initializer_std} must be at least 0")
        self.initializer_std = initializer_std
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def parameter_distribution(self, name: str) -> Distribution:
        """Zero, or normal."""
        return Normal(self.initializer_std) if self.initializer_std else Constant(0.0)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) → (T,) float32, whatever autocast says."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.linear(hidden_TD.float(), self.weight.float()).squeeze(-1)


class RewardModel(Decoder):
    """The body of a `LanguageModel` with a head that gives a value per token.

    Args:
        config: Shape of the language model; what it says about the head (`tie_word_embeddings`, `head_dtype`) does not
            matter here.
        head_std: Standard deviation of the head's initial weights; 0 = they are zero.
    """

    fresh_weights = ("value_head.weight",)
    """What a language model does not have: it starts anew where files do not hold it."""
    foreign_weights = ("lm_head.weight",)
    """What a language model has and this one has not: it is passed over in files."""

    def __init__(self, config: LanguageModelConfig, head_std: float = 0.0) -> None:
        super().__init__(config)
        self.value_head = ValueHead(config.hidden_size, head_std)

    def parallel_plan(self) -> ParallelPlan:
        """Embedding, blocks and norm are units; the head computes in float32."""
        float32 = [*self.float32_routers, self.value_head]
        units = [self.embed_tokens, *self.layers, self.norm]
        return ParallelPlan(units, self.moe_layers, float32, recompute=self.recompute_blocks)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds_TD: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attend: Attend | None = None,
        token_mask_T: Tensor | None = None,
        routed_experts_TLK: Tensor | None = None,
        record_routing: bool = False,
    ) -> RewardModelOutput:
        """Values of all tokens.

        Args:
            input_ids: (T,) flat packed tokens, or (B, S) with one document per row.
            inputs_embeds_TD: (T, hidden) in place of `input_ids`.
            position_ids: (T,) or (B, S); default: restarting in every document.
            cu_seqlens: (D+1,) document boundaries of flat tokens; default: one document (one per row for 2-d input).
            attend: Attention over something else than the packed documents, such as a cache.
            token_mask_T: (T,) bool, tokens that count in the router statistics (False = padding).
            routed_experts_TLK: (T, MoE layers, K) expert ids to replay, -1 = choose live.
            record_routing: Give the expert ids that were used.

        Raises:
            ValueError: If inputs are missing or their shapes do not fit together.
        """
        hidden_TD, stats, routing = self.decode(
            input_ids, inputs_embeds_TD=inputs_embeds_TD, position_ids=position_ids, cu_seqlens=cu_seqlens,
            attend=attend, routed_experts_TLK=routed_experts_TLK, record_routing=record_routing,
            token_mask_T=token_mask_T,
        )  # fmt: skip
        return RewardModelOutput(self.value_head(hidden_TD), hidden_TD, stats, routing)


def last_positions(sample_id_T: Tensor) -> Tensor:
    """(S,) where each sample has its last token, in ascending order of the ids; negative ids (padding) have no end."""
    real_N = (sample_id_T >= 0).nonzero().squeeze(-1)
    ids, index_N = torch.unique(sample_id_T[real_N], return_inverse=True)
    return real_N.new_zeros(len(ids)).scatter_reduce(0, index_N, real_N, "amax")


def at_ends(values_T: Tensor, cu_seqlens: Tensor | None = None, sample_id_T: Tensor | None = None) -> Tensor:
    """(S,) the value at the last token of every document: the reward of a text.

    Args:
        values_T: (T,) of the tokens.
        cu_seqlens: (S+1,) document boundaries, none of them empty. The padding at the end of a row is a document, too.
        sample_id_T: (T,) document of each token instead, negative = padding, which has no value. Ascending ids.

    Raises:
        ValueError: If not exactly one of the two is given, or it does not fit the values.
    """
    if (cu_seqlens is None) == (sample_id_T is None):
        raise ValueError("give either cu_seqlens or sample_id_T")
    if sample_id_T is not None:
        if sample_id_T.shape != values_T.shape:
            raise ValueError(f"sample_id_T {tuple(sample_id_T.shape)} does not fit values_T {tuple(values_T.shape)}")
        return values_T[last_positions(sample_id_T)]
    assert cu_seqlens is not None
    if int(cu_seqlens[-1]) != len(values_T) or bool((cu_seqlens.diff() < 1).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {len(values_T)} values without empty documents, got "
            f"{cu_seqlens.tolist()[:8]} … {int(cu_seqlens[-1])}"
        )
    return values_T[cu_seqlens[1:].long() - 1]
