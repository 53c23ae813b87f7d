"""What one router did in one forward pass: the one source of counts for losses, metrics and callbacks.

Counts come from the expert ids that were really used (grouped, replayed or biased choices differ from the top-k of the
probabilities). Statistics are outputs of the forward pass, never side effects: recomputation under activation
checkpointing cannot count twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitStats(NamedTuple):
    """What monitors want to know of the logits, and losses do not; padding is left out, no gradient.

    Attributes:
        maximum: Scalar float32, the largest logit; -inf without tokens.
        logit_sum: Scalar float32, Σ over tokens of the mean logit.
        top_probability_sum: Scalar float32, Σ over tokens of the largest probability.
        entropy_sum: Scalar float32, Σ over tokens of -Σ_e p_e ln p_e, in nats.
    """

    maximum: Tensor
    logit_sum: Tensor
    top_probability_sum: Tensor
    entropy_sum: Tensor

    @staticmethod
    @torch.no_grad()
    def measure(logits_TE: Tensor, probabilities_TE: Tensor, token_mask_T: Tensor | None = None) -> LogitStats:
        """Sums up one forward pass; arguments as in `RouterStats.measure`."""
        if len(logits_TE) == 0:
            zero = logits_TE.new_zeros(())
            return LogitStats(logits_TE.new_full((), -torch.inf), zero, zero, zero)
        if token_mask_T is not None:
            padding_T1 = ~token_mask_T.bool()[:, None]
            highest = logits_TE.masked_fill(padding_T1, -torch.inf).amax()
            logits_TE, probabilities_TE = (x.masked_fill(padding_T1, 0.0) for x in (logits_TE, probabilities_TE))
        else:
            highest = logits_TE.amax()
        entropy = torch.special.entr(probabilities_TE).sum()
        return LogitStats(highest, logits_TE.sum() / logits_TE.shape[1], probabilities_TE.amax(-1).sum(), entropy)


class RouterStats(NamedTuple):
    """Sums over the tokens of one MoE layer; padding is left out.

    Attributes:
        counts_E: (E,) float32, tokens sent to each expert. No gradient.
        probability_sum_E: (E,) float32, Σ over tokens of the router's probabilities. With gradient.
        z_square_sum: Scalar float32, Σ over tokens of (logsumexp of the logits)². With gradient.
        num_tokens: Scalar float32.
        logits: More about the logits, if it was asked for.
    """

    counts_E: Tensor
    probability_sum_E: Tensor
    z_square_sum: Tensor
    num_tokens: Tensor
    logits: LogitStats | None = None

    @property
    def load_E(self) -> Tensor:
        """(E,) share of all routed slots that each expert got; sums to 1."""
        return self.counts_E / self.counts_E.sum().clamp(min=1.0)

    @property
    def mean_probability_E(self) -> Tensor:
        """(E,) mean of the router's probabilities."""
        return self.probability_sum_E / self.num_tokens.clamp(min=1.0)

    def detached(self) -> RouterStats:
        """The same without gradient: what monitors may keep, and the graph is not kept with it."""
        return self._replace(probability_sum_E=self.probability_sum_E.detach(), z_square_sum=self.z_square_sum.detach())

    @staticmethod
    def measure(
        logits_TE: Tensor, probabilities_TE: Tensor, ids_TK: Tensor, token_mask_T: Tensor | None = None,
        with_logits: bool = False,
    ) -> RouterStats:  # fmt: skip
        """Sums up one forward pass.

        Args:
            logits_TE: (T, E) float32 router logits.
            probabilities_TE: (T, E) float32, rows sum to 1.
            ids_TK: (T, K) experts used.
            token_mask_T: (T,) bool, True = counts. None: all.
            with_logits: Also measure `LogitStats`.
        """
        num_experts = logits_TE.shape[-1]
        z_T = torch.logsumexp(logits_TE, dim=-1)
        if token_mask_T is not None:
            mask_T = token_mask_T.to(torch.float32)
            probability_sum, z_square_sum = mask_T @ probabilities_TE, (z_T.square() * mask_T).sum()
            num_tokens = mask_T.sum()
        else:
            probability_sum, z_square_sum = probabilities_TE.sum(0), z_T.square().sum()
            mask_T = torch.ones_like(z_T, dtype=torch.float32)
            num_tokens = torch.full((), float(len(z_T)), device=z_T.device, dtype=torch.float32)
        # not bincount: its length would depend on data; sums of ones are exact below 2^24
        counts_E = torch.zeros(num_experts, device=z_T.device, dtype=torch.float32)
        counts_E.index_add_(0, ids_TK.flatten(), mask_T.detach().repeat_interleave(ids_TK.shape[1]))
        logits = LogitStats.measure(logits_TE, probabilities_TE, token_mask_T) if with_logits else None
        return RouterStats(counts_E, probability_sum, z_square_sum, num_tokens, logits)

    @staticmethod
    def of_nothing(logits_TE: Tensor) -> RouterStats:
        """Of no token, with the experts and the device of these logits."""
        zeros_E = logits_TE.new_zeros(logits_TE.shape[-1])
        return RouterStats(zeros_E, zeros_E, zeros_E[0], zeros_E[0])

    @staticmethod
    def from_logits(logits_TE: Tensor, experts_per_token: int, token_mask_T: Tensor | None = None) -> RouterStats:
        """Statistics of a foreign softmax top-k router from its logits (T, E), e.g. of a transformers gate."""
        logits_TE = logits_TE.float()
        probabilities_TE = logits_TE.softmax(-1)
        ids_TK = probabilities_TE.detach().topk(experts_per_token, dim=-1).indices
        return RouterStats.measure(logits_TE, probabilities_TE, ids_TK, token_mask_T)
