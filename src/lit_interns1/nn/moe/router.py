"""Routers: which K of E experts a token visits, and with what weights.

    z = W_r x;  p = softmax(z) over all E experts, float32
    topk:     S = top-K(p)                                  w_i = p_i / Σ_{j∈S} p_j
    grouped:  S = ∪ over G groups of top-(K/G) inside it    w_i = p_i / (Σ_{j∈S} p_j + 1e-20)     arXiv 2603.25040 §2.1
    sigmoid:  s = sigmoid(z); S = top-K(s + b); w_i = s_i / Σ_{j∈S} s_j; b moves against the load  arXiv 2408.15664

Straight-through gradient (arXiv 2603.25040 §2.2), with p^τ = softmax(z/τ):
    ŵ_i = sg(w_i) + (p^τ_i − sg(p^τ_i))
    forward: w_i, bit by bit;   ∂L/∂z = (1/τ) p^τ ⊙ (u − ⟨u, p^τ⟩),  u = ∂L/∂ŵ on S, 0 elsewhere
so every router row learns, also those of experts that were not chosen. The temperature is not published: τ = 1 is ours.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.nn.initialization import Constant, Distribution, Normal
from lit_interns1.nn.moe.routing_record import CHOOSE_LIVE
from lit_interns1.nn.moe.statistics import RouterStats
from lit_interns1_kernels.routing import route


class Routing(NamedTuple):
    """A router's decision.

    Attributes:
        ids_TK: (T, K) int64 experts of each token.
        weights_TK: (T, K) their weights.
        stats: Sums for losses and monitors.
        logits_TE: (T, E) float32 logits.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    stats: RouterStats
    logits_TE: Tensor


class Router(nn.Module):
    """What all routers share: logits, replay, statistics; and the plain way from scores to weights.

    Args:
        hidden_size: Width of a token.
        num_experts: E.
        experts_per_token: K.
        num_groups: G; K/G experts are chosen in each group of E/G consecutive experts. 1 = no groups.
        normalize_weights: Divide the K weights by their sum.
        scaling_factor: Multiplies the weights.
        dtype: "float32": logits in float32 whatever the model's type; "native": logits in the model's type.
        gradient: "topk": through the chosen weights only; "ste": straight-through, dense over all experts.
        ste_temperature: τ of the straight-through gradient.
        initializer_std: Standard deviation of the initial weight.

    Raises:
        ValueError: If K > E, or G does not divide E and K, or an option is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        experts_per_token: int,
        num_groups: int = 1,
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        dtype: Literal["float32", "native"] = "float32",
        gradient: Literal["topk", "ste"] = "topk",
        ste_temperature: float = 1.0,
        initializer_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token {experts_per_token} must lie between 1 and num_experts {num_experts}")
        for name, value in (("num_experts", num_experts), ("experts_per_token", experts_per_token)):
            if value % num_groups:
                raise ValueError(f"{name} {value} must be divisible by num_groups {num_groups}")
        if dtype not in ("float32", "native") or gradient not in ("topk", "ste"):
            raise ValueError(f"router dtype {dtype!r} must be float32 or native, gradient {gradient!r} topk or ste")
        if ste_temperature <= 0:
            raise ValueError(f"ste_temperature must be positive, got {ste_temperature}")
        self.num_experts, self.experts_per_token, self.num_groups = num_experts, experts_per_token, num_groups
        self.normalize_weights, self.scaling_factor = normalize_weights, scaling_factor
        self.dtype, self.ste_temperature = dtype, ste_temperature
        self.gradient: Literal["topk", "ste"] = gradient
        self.initializer_std = initializer_std
        self.measures_logits = False  # monitors switch it on when they want `RouterStats.logits`
        self.measures = True  # who generates switches it off: its tokens are in no statistic
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def parameter_distribution(self, name: str) -> Distribution:
        """Normal; a bias would start at zero."""
        return Normal(self.initializer_std) if name == "weight" else Constant(0.0)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """(T, E) scores that are chosen from and turned into weights."""
        raise NotImplementedError(f"{type(self).__name__} must define scores(), or decide() as a whole")

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """(T, E) scores as probabilities, for balance losses and monitors."""
        return scores_TE

    def selection_scores(self, scores_TE: Tensor) -> Tensor:
        """(T, E) what the experts are ranked by."""
        return scores_TE

    def choose(self, selection_TE: Tensor) -> Tensor:
        """(T, E) → (T, K) ids; group after group if there are groups, best first inside a group."""
        if self.num_groups == 1:
            return selection_TE.topk(self.experts_per_token, dim=-1).indices
        tokens, group_size = selection_TE.shape[0], self.num_experts // self.num_groups
        grouped = selection_TE.view(tokens, self.num_groups, group_size)
        inside = grouped.topk(self.experts_per_token // self.num_groups, dim=-1).indices
        first = torch.arange(self.num_groups, device=inside.device)[:, None] * group_size
        return (inside + first).view(tokens, self.experts_per_token)

    def decide(self, logits_TE: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The decision itself.

        Args:
            logits_TE: (T, E) float32.
            replay_TK: (T, K) int64 ids to use instead of choosing, checked; a token with a negative one chooses live.

        Returns:
            Weights (T, K), ids (T, K), probabilities (T, E).
        """
        scores_TE = self.scores(logits_TE)
        with torch.no_grad():
            ids_TK = self.choose(self.selection_scores(scores_TE.detach()))
            if replay_TK is not None:
                ids_TK = torch.where((replay_TK <= CHOOSE_LIVE).any(-1, keepdim=True), ids_TK, replay_TK)
        weights_TK = scores_TE.gather(-1, ids_TK)
        if self.normalize_weights:
            total_T1 = weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK / (total_T1 + 1e-20 if self.num_groups > 1 else total_T1)
        return weights_TK * self.scaling_factor, ids_TK, self.probabilities(scores_TE)

    def _check_replay(self, replay_TK: Tensor, tokens: int) -> Tensor:
        if replay_TK.shape != (tokens, self.experts_per_token):
            raise ValueError(
                f"replayed experts have shape {tuple(replay_TK.shape)}, the router needs "
                f"{(tokens, self.experts_per_token)} (tokens, experts per token)"
            )
        replay_TK = replay_TK.to(torch.int64)
        if replay_TK.numel() and int(replay_TK.max()) >= self.num_experts:
            raise ValueError(f"replayed expert {int(replay_TK.max())} does not exist: there are {self.num_experts}")
        return replay_TK

    def forward(
        self,
        x_TD: Tensor,
        replay_TK: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        recomputing: bool = False,
    ) -> Routing:
        """Routes tokens.

        Args:
            x_TD: (T, hidden).
            replay_TK: (T, K) expert ids to use instead of choosing; a token with a -1 chooses live.
            token_mask_T: (T,) bool, tokens that count in the statistics. None: all.
            recomputing: The ids are what this router chose in the forward pass that is computed again: they are not
                checked, so nothing waits for the device.

        Raises:
            ValueError: If replayed ids have another shape or name experts that do not exist.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.dtype == "float32":
                logits_TE = F.linear(x_TD.float(), self.weight.float())
            else:
                logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype)).float()
            if replay_TK is not None:
                replay_TK = replay_TK.long() if recomputing else self._check_replay(replay_TK, len(logits_TE))
            weights_TK, ids_TK, probabilities_TE = self.decide(logits_TE, replay_TK)
            if self.dtype == "native":
                weights_TK = weights_TK.to(x_TD.dtype)
            if self.measures:
                stats = RouterStats.measure(logits_TE, probabilities_TE, ids_TK, token_mask_T, self.measures_logits)
            else:
                stats = RouterStats.of_nothing(logits_TE)
        return Routing(ids_TK, weights_TK, stats, logits_TE)

    def extra_repr(self) -> str:
        """Shown by print()."""
        return (
            f"experts={self.num_experts}, per_token={self.experts_per_token}, groups={self.num_groups}, "
            f"gradient={self.gradient}, dtype={self.dtype}"
        )


class TopKRouter(Router):
    """Softmax over all experts, then the K best; in groups if `num_groups` > 1. One operation, see `route`."""

    def decide(self, logits_TE: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `Router.decide`."""
        return route(
            logits_TE, self.experts_per_token, self.num_groups, self.normalize_weights, self.scaling_factor,
            self.gradient, self.ste_temperature, replay_TK,
        )  # fmt: skip


class SigmoidRouter(Router):
    """Sigmoid scores; a bias that no gradient touches steers the choice against the load (arXiv 2408.15664).

    The bias is a saved float32 buffer, moved once per optimizer step by `update_expert_bias`.
    """

    expert_bias: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.gradient == "ste":
            raise ValueError("router gradient 'ste' is defined for softmax routers; the sigmoid router takes 'topk'")
        self.register_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """The bias starts at zero."""
        if not self.expert_bias.is_meta:
            self.expert_bias.zero_()

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Sigmoid of the logits."""
        return logits_TE.sigmoid()

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Scores divided by their sum over all experts."""
        return scores_TE / scores_TE.sum(-1, keepdim=True)

    def selection_scores(self, scores_TE: Tensor) -> Tensor:
        """Scores plus the bias."""
        return scores_TE + self.expert_bias


ROUTERS: dict[str, type[Router]] = {"topk": TopKRouter, "grouped": TopKRouter, "sigmoid": SigmoidRouter}
"""Routers by the name that configs use. "grouped" is the top-k router with groups."""


@torch.no_grad()
def update_expert_bias(expert_bias_E: Tensor, counts_E: Tensor, rate: float = 1e-3) -> None:
    """Moves the bias in place: b += rate · sign(mean count − count), with the counts of a whole optimizer step."""
    counts_E = counts_E.to(torch.float32)
    expert_bias_E.add_(torch.sign(counts_E.mean() - counts_E), alpha=rate)
