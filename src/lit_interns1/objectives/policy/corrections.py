"""Corrections for tokens sampled by another engine: importance weights and rejection by ρ = π_old/μ.

    token       ρ_t = π_old(y_t)/μ(y_t)         sequence  Π_t ρ_t         geometric  (Π_t ρ_t)^{1/|y|}
    truncate    min(ρ, high), not below low     TIS, truncated importance sampling (Yao et al., 2025)
    mask        ρ if low ≤ ρ ≤ high else 0      IcePop, MIS: the token stays in the denominators
    reject      outside [low, high] the token (or sequence) leaves the response mask, so also the denominators
    veto        one token outside [veto_low, veto_high] drops its whole sequence from the mask

Bounds are ratios, always called low and high (XTuner's tuples are (upper, lower); verl's strings "lower_upper"). The
log of ρ is clamped to ±20. A token without a rollout log-probability (NaN) has ρ = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import LOG_RATIO_LIMIT, kl_estimate

RatioLevel = Literal["token", "sequence", "geometric"]
WeightMode = Literal["truncate", "mask", "none"]


def known_rollout_logprobs(inputs: PolicyInputs) -> Tensor:
    """(T,) log μ, and log π_old where the engine gave none, so that the ratio is 1."""
    inputs.require(["old_logprobs", "rollout_logprobs"], "a rollout correction")
    rollout_T = inputs.value("rollout_logprobs")
    return torch.where(rollout_T.isnan(), inputs.value("old_logprobs"), rollout_T)


def log_ratio_at_level(log_ratio_T: Tensor, inputs: PolicyInputs, level: RatioLevel) -> Tensor:
    """(T,) the log of the ratio of each token, of its sequence, or the mean over its sequence; clamped to ±20."""
    if level == "sequence":
        log_ratio_T = inputs.to_tokens(inputs.sample_sums(log_ratio_T))
    elif level == "geometric":
        log_ratio_T = inputs.to_tokens(inputs.sample_means(log_ratio_T))
    return log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def mismatch_metrics(inputs: PolicyInputs, tau: float = 2.0) -> Metrics:
    """How far training and rollout engine are apart, over the response tokens.

    Args:
        inputs: With `old_logprobs` and `rollout_logprobs`.
        tau: τ > 1.

    Returns:
        `mismatch/k1` and `mismatch/k3`, estimates of KL(μ‖π_old) in nats; `mismatch/ratio`, the mean of ρ;
        `mismatch/extreme`, F(τ) = fraction of tokens with max(ρ, 1/ρ) > τ (arXiv 2510.11370).

    Raises:
        ValueError: If a vector is missing or τ ≤ 1.
    """
    check_number("tau", tau, 1.0, strict=True)
    old_T, rollout_T = inputs.value("old_logprobs"), known_rollout_logprobs(inputs)
    log_ratio_T = (old_T - rollout_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    values = {
        "k1": kl_estimate(rollout_T, old_T, "k1"),
        "k3": kl_estimate(rollout_T, old_T, "k3"),
        "ratio": log_ratio_T.exp(),
        "extreme": log_ratio_T.abs().exp() > tau,
    }
    return {f"mismatch/{name}": masked_metric(value_T, inputs.response_mask) for name, value_T in values.items()}


@dataclass(frozen=True)
class RolloutCorrection:
    """Weights and rejection by ρ = π_old/μ. Apply it before `prepare`, to inputs with whole samples.

    Args:
        level: What ρ is for the weights.
        mode: What happens outside the bounds; "none" makes no weights.
        low: Lower bound of ρ; None = 0.
        high: Upper bound of ρ. TIS: 2. IcePop: level token, mode mask, 0.5 and 5. TRL's default is level sequence,
            mode mask, high 3.
        reject_level: What ρ is for the rejection; None = no rejection.
        reject_low: Lower bound; None = 0.
        reject_high: Upper bound; None = none.
        veto_low: Lower bound of every token's ρ; None = 0.
        veto_high: Upper bound of every token's ρ; None = none.

    Raises:
        ValueError: If an option is out of range, or low > high.
    """

    level: RatioLevel = "token"
    mode: WeightMode = "truncate"
    low: float | None = None
    high: float | None = 2.0
    reject_level: RatioLevel | None = None
    reject_low: float | None = None
    reject_high: float | None = None
    veto_low: float | None = None
    veto_high: float | None = None

    requires = frozenset({"old_logprobs", "rollout_logprobs"})

    def __post_init__(self) -> None:
        check_choice("level", self.level, RatioLevel)
        check_choice("mode", self.mode, WeightMode)
        if self.reject_level is not None:
            check_choice("reject_level", self.reject_level, RatioLevel)
        elif self.reject_low is not None or self.reject_high is not None:
            raise ValueError(
                f"reject_low = {self.reject_low} and reject_high = {self.reject_high} need a reject_level, got None"
            )
        for prefix in ("", "reject_", "veto_"):
            low, high = getattr(self, prefix + "low"), getattr(self, prefix + "high")
            check_number(prefix + "low", low, 0.0)
            check_number(prefix + "high", high, 0.0, strict=True)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{prefix}low = {low} must not be above {prefix}high = {high}")

    def __call__(self, inputs: PolicyInputs) -> tuple[PolicyInputs, Metrics]:
        """A copy with `rollout_is_weights` and a smaller `response_mask`, and metrics.

        Returns:
            The inputs; `mismatch_metrics`, and `rollout_is/masked` and `rollout_is/rejected`, the fractions of response
            tokens with the weight 0 and out of the mask.
        """
        inputs.require(self.requires, "RolloutCorrection")
        mask_T, log_ratio_T = inputs.response_mask, inputs.value("old_logprobs") - known_rollout_logprobs(inputs)
        keep_T = torch.ones_like(mask_T)
        if self.reject_level is not None:
            ratio_T = log_ratio_at_level(log_ratio_T, inputs, self.reject_level).exp()
            keep_T = _inside(ratio_T, self.reject_low, self.reject_high)
        if self.veto_low is not None or self.veto_high is not None:
            ratio_T = log_ratio_at_level(log_ratio_T, inputs, "token").exp()
            outside_T = (~_inside(ratio_T, self.veto_low, self.veto_high)).float()
            keep_T = keep_T & (inputs.to_tokens(inputs.sample_sums(outside_T)) == 0)
        weight_T = log_ratio_at_level(log_ratio_T, inputs, self.level).exp()
        if self.mode == "truncate":
            weight_T = weight_T.clamp(self.low or 0.0, self.high)
        elif self.mode == "mask":
            weight_T = torch.where(_inside(weight_T, self.low, self.high), weight_T, 0.0)
        metrics = mismatch_metrics(inputs)
        metrics["rollout_is/masked"] = masked_metric((weight_T == 0.0) & (self.mode == "mask"), mask_T)
        metrics["rollout_is/rejected"] = masked_metric(~keep_T, mask_T)
        changed = inputs.changed(response_mask=mask_T & keep_T)
        return (changed if self.mode == "none" else changed.changed(rollout_is_weights=weight_T)), metrics


def _inside(ratio_T: Tensor, low: float | None, high: float | None) -> Tensor:
    inside_T = torch.ones_like(ratio_T, dtype=torch.bool)
    if low is not None:
        inside_T &= ratio_T >= low
    if high is not None:
        inside_T &= ratio_T <= high
    return inside_T


def off_policy_sequence_mask(logp_T: Tensor, inputs: PolicyInputs, threshold: float) -> Tensor:
    """OPSM (DeepSeek-V3.2, arXiv 2512.02556): drop responses with A < 0 that π_θ has moved away from.

        keep = A ≥ 0 or mean_t(log μ − log π_θ) ≤ δ

    Args:
        logp_T: log π_θ now.
        inputs: With `advantages` and `rollout_logprobs`, else `old_logprobs`.
        threshold: δ in nats per token (`off_policy_mask_threshold` of TRL).

    Returns:
        (T,) bool.
    """
    sampled_T = inputs.rollout_logprobs if inputs.rollout_logprobs is not None else inputs.value("old_logprobs")
    difference_T = torch.nan_to_num(sampled_T - logp_T.detach(), nan=0.0)
    mean_T = inputs.to_tokens(inputs.sample_means(difference_T))
    return (inputs.value("advantages") >= 0) | (mean_T <= threshold)
