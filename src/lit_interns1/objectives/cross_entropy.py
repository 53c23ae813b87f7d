"""Next-token cross-entropy with weights per token and the z-loss.

    L = Σ_t w_t · (−logp_t + z · logsumexp_t²) / Σ_t w_t

w_t is 1 on every token with a label ("token"), or 1/√n with n the loss tokens of the token's sample ("square_root"), a
compromise between a mean over tokens, which long answers dominate, and a mean over samples: InternVL 2.5 (arXiv
2412.05271, "loss reweighting", square averaging). The z-loss holds the log of the softmax denominator near 0: PaLM
(arXiv 2204.02311, §5; coefficient 1e-4 there). It reads logsumexp of the logits as they were scored.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_interns1.nn.head import GradientHint, TokenScores
from lit_interns1.training.summed_loss import SummedLoss

SampleWeighting = Literal["token", "square_root"]


class NextTokenCrossEntropy:
    """Cross-entropy of the next token, as a sum and its denominator.

    Args:
        z_loss: Coefficient z ≥ 0 of the squared logsumexp; 0 = off.
        sample_weighting: "token" gives every token with a label the weight 1; "square_root" gives it one over the
            square root of the number of loss tokens of its sample, counted in this micro-batch.

    Raises:
        ValueError: If an option is out of its range.
    """

    requires: frozenset[str] = frozenset()
    """What a module must prepare beside the scores: nothing."""

    def __init__(self, z_loss: float = 0.0, sample_weighting: SampleWeighting = "token") -> None:
        if not (z_loss >= 0.0 and math.isfinite(z_loss)):
            raise ValueError(f"z_loss = {z_loss} must be finite and at least 0")
        if sample_weighting not in get_args(SampleWeighting):
            raise ValueError(f"sample_weighting = {sample_weighting!r} must be one of {get_args(SampleWeighting)}")
        self.z_loss, self.sample_weighting = float(z_loss), sample_weighting

    def token_weights(self, labels_T: Tensor, sample_id_T: Tensor | None = None) -> Tensor:
        """The weight of every token in the loss.

        Args:
            labels_T: (T,) labels, negative (-100) = no loss.
            sample_id_T: (T,) sample of each token, -1 = padding; needed by "square_root".

        Returns:
            (T,) float32, 0 where there is no loss.

        Raises:
            ValueError: If `sample_id_T` is needed and missing, or has another shape than the labels.
        """
        weight_T = (labels_T >= 0).float()
        if self.sample_weighting == "token":
            return weight_T
        if sample_id_T is None:
            raise ValueError("sample_weighting = 'square_root' needs sample_id_T, the sample of each token; got None")
        if sample_id_T.shape != labels_T.shape:
            raise ValueError(f"sample_id_T {tuple(sample_id_T.shape)} must match labels_T {tuple(labels_T.shape)}")
        if not labels_T.numel():
            return weight_T
        index_T = sample_id_T.long() + 1  # padding has the sample -1
        count_S = weight_T.new_zeros(int(index_T.max()) + 1).index_add_(0, index_T, weight_T)
        return weight_T * count_S.clamp(min=1.0).rsqrt()[index_T]

    def gradient_hint(self, labels_T: Tensor, sample_id_T: Tensor | None = None) -> GradientHint:
        """What this loss will ask of the scores, for the head; arguments as in `token_weights`."""
        return GradientHint(self.token_weights(labels_T, sample_id_T), self.z_loss)

    def __call__(
        self, scores: TokenScores, labels_T: Tensor, sample_id_T: Tensor | None = None
    ) -> tuple[SummedLoss, dict[str, Tensor]]:
        """The loss of one micro-batch.

        Args:
            scores: Of the head for `labels_T`.
            labels_T: (T,) labels, negative (-100) = no loss.
            sample_id_T: (T,) sample of each token; needed by "square_root".

        Returns:
            The loss (sum over weighted tokens, sum of the weights), and detached float32 sums that become means when
            divided by the count of the loss: `cross_entropy`, Σ w·(−logp) in nats, without the z-loss; `z`,
            Σ w·logsumexp², without its coefficient (also where the z-loss is off: it shows logits that drift).

        Raises:
            ValueError: If shapes do not fit together.
        """
        if scores.logp_T.shape != labels_T.shape:
            raise ValueError(f"scores of {tuple(scores.logp_T.shape)} tokens for labels {tuple(labels_T.shape)}")
        weight_T = self.token_weights(labels_T, sample_id_T)
        cross_entropy = -(weight_T * scores.logp_T.float()).sum()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.z_loss > 0.0):
            z = (weight_T * scores.logsumexp_T.float().square()).sum()
        total = cross_entropy + self.z_loss * z if self.z_loss > 0.0 else cross_entropy
        metrics = {"cross_entropy": cross_entropy.detach(), "z": z.detach()}
        return SummedLoss(total, weight_T.sum()), metrics
