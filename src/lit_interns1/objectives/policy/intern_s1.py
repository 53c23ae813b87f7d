"""The online RL losses of Intern-S1 (arXiv 2508.15763, §5) and Intern-S1-Pro (arXiv 2603.25040, §4).

    Intern-S1      λ_sft E_{D+}[−log π_θ] + λ_pg E_{D−}[−A log π_θ] + β/N Σ_{t∈I} KL(π_old‖π_θ)
    Intern-S1-Pro  −mean_i 1/|y_i| Σ_t sg(M(ρ) r) Â log π_θ      ρ = π_old/μ, r = π_θ/π_old, M(ρ) = ρ if α<ρ<β else 0

Neither clips a ratio as PPO does: when the two engines pick different experts, a clip says little. I is the selection
of KL-Cov. The equations were read in notes on the papers; what the papers leave open is marked as a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_number
from lit_interns1.objectives.policy.advantages import AdvantageEstimator, LeaveOneOut
from lit_interns1.objectives.policy.corrections import known_rollout_logprobs
from lit_interns1.objectives.policy.covariance import kl_cov_mask
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import KLType, check_kl_type, kl_estimate, ratio
from lit_interns1.objectives.policy.objective import PolicyObjective, aggregation_weights
from lit_interns1.objectives.policy.oreal import OREAL


class InternS1(OREAL):
    """OREAL without token reward model and reference, plus KL-Cov.

    Published: the form, k = 0.2 and β = 0.01 for KL-Cov, 8 responses per prompt, 8 updates per rollout batch.
    Reconstruction: λ_sft = 1 and λ_pg = 0.5 (those of OREAL), leave-one-out advantages of rewards ±1, no advantage on
    the right responses, the sign of the KL-Cov term (a penalty), its estimator and its batch. The unit of k is not
    clear: 0.2 as a fraction is 20 % of the tokens, while the origin of KL-Cov uses 0.0002 to 0.002. The default is
    cautious; `InternS1.published` takes 0.2 as a fraction.

    Args:
        sft_loss_weight: λ_sft.
        pg_loss_weight: λ_pg.
        kl_cov_ratio: k as a fraction of the response tokens of an optimizer step, in (0, 1].
        kl_cov_coef: β.
        kl_cov_type: Estimator of KL(π_old‖π_θ) on the selected tokens.
        pos_mult_adv: Whether right responses are multiplied by A, as in the code of OREAL.
        advantages: The estimator a module should use.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        sft_loss_weight: float = 1.0,
        pg_loss_weight: float = 0.5,
        kl_cov_ratio: float = 0.002,
        kl_cov_coef: float = 0.01,
        kl_cov_type: KLType = "abs",
        pos_mult_adv: bool = False,
        advantages: AdvantageEstimator | None = None,
    ) -> None:
        check_number("sft_loss_weight", sft_loss_weight, 0.0)
        check_number("pg_loss_weight", pg_loss_weight, 0.0)
        check_number("kl_cov_ratio", kl_cov_ratio, 0.0, 1.0, strict=True)
        check_number("kl_cov_coef", kl_cov_coef, 0.0)
        check_kl_type("kl_cov_type", kl_cov_type)
        super().__init__(
            credit="none", positive_loss_factor=sft_loss_weight, negative_loss_factor=pg_loss_weight, kl_coef=0.0,
            pos_mult_adv=pos_mult_adv, advantages=advantages,
        )  # fmt: skip
        self.kl_cov_ratio, self.kl_cov_coef, self.kl_cov_type = kl_cov_ratio, kl_cov_coef, kl_cov_type
        self.requires |= {"old_logprobs"}

    @classmethod
    def published(cls) -> InternS1:
        """With k = 0.2 read as a fraction."""
        return cls(kl_cov_ratio=0.2)

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """Those of OREAL, and β on the selected tokens."""
        selected_T = kl_cov_mask(inputs, self.kl_cov_ratio, process_group)
        return super().term_weights(inputs, totals, process_group) | {"kl_cov": selected_T * self.kl_cov_coef}

    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Those of OREAL, and the penalty."""
        values, metrics = super().term_values(logp_T, scores, inputs)
        values["kl_cov"] = kl_estimate(inputs.value("old_logprobs"), logp_T, self.kl_cov_type)
        metrics["kl_cov_selected"] = masked_metric(inputs.weights["kl_cov"] != 0, inputs.response_mask)
        return values, metrics


class InternS1Pro(PolicyObjective):
    """Dual importance sampling: mismatch of the engines, masked, times staleness, both held.

    The paper gives no values for α and β; the defaults are a reconstruction (0.5 and 5, IcePop's). It does not clip r.
    Masked tokens stay in |y_i|.

    Args:
        mismatch_low: α ≥ 0; ρ must be above it, strictly.
        mismatch_high: β; ρ must be below it, strictly.
        staleness_low: Lower bound of r; None = none.
        staleness_high: Upper bound of r; None = none.
        advantages: The estimator a module should use.

    Raises:
        ValueError: If an option is out of range, or α ≥ β.
    """

    requires = frozenset({"advantages", "old_logprobs", "rollout_logprobs"})

    def __init__(
        self,
        mismatch_low: float = 0.5,
        mismatch_high: float = 5.0,
        staleness_low: float | None = None,
        staleness_high: float | None = None,
        advantages: AdvantageEstimator | None = None,
    ) -> None:
        check_number("mismatch_low", mismatch_low, 0.0)
        check_number("mismatch_high", mismatch_high, 0.0, strict=True)
        check_number("staleness_low", staleness_low, 0.0)
        check_number("staleness_high", staleness_high, 0.0, strict=True)
        if not mismatch_low < mismatch_high:
            raise ValueError(f"mismatch_low = {mismatch_low} must be below mismatch_high = {mismatch_high}")
        if staleness_low is not None and staleness_high is not None and staleness_low > staleness_high:
            raise ValueError(f"staleness_low = {staleness_low} must not be above staleness_high = {staleness_high}")
        self.mismatch_low, self.mismatch_high = mismatch_low, mismatch_high
        self.staleness_low, self.staleness_high = staleness_low, staleness_high
        self.advantages = advantages or LeaveOneOut()

    def mismatch_weights(self, inputs: PolicyInputs) -> Tensor:
        """(T,) M(ρ), 0 outside responses."""
        mismatch_T = ratio(inputs.value("old_logprobs"), known_rollout_logprobs(inputs)).float()
        inside_T = inputs.response_mask & (mismatch_T > self.mismatch_low) & (mismatch_T < self.mismatch_high)
        return torch.where(inside_T, mismatch_T, 0.0)

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """M(ρ) in the mean per sequence."""
        mean_T = aggregation_weights(inputs, "seq-mean-token-mean", totals, None)
        return {"policy": mean_T * self.mismatch_weights(inputs)}

    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """−sg(r) Â log π_θ."""
        mask_T = inputs.response_mask
        staleness_T = ratio(logp_T.detach(), inputs.value("old_logprobs"))
        metrics = {"staleness": masked_metric(staleness_T, mask_T)}
        if self.staleness_low is not None or self.staleness_high is not None:
            staleness_T = staleness_T.clamp(self.staleness_low, self.staleness_high)
        metrics["mismatch_masked"] = masked_metric(self.mismatch_weights(inputs) == 0, mask_T)
        return {"policy": -staleness_T * inputs.value("advantages") * logp_T}, metrics
