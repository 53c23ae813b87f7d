"""Losses of reward models, on the scores of pairs of responses.

    L = −log σ(r_w − r_l − m) + c (r_w + r_l)²       Bradley–Terry; m: margin (arXiv 2307.09288, Eq. 2)

c draws the scores, of which only differences count, to 0 (arXiv 2312.09244, Eq. 2). POLAR (arXiv 2507.05197) scores a
candidate against a reference, r(p, τ_ref, τ):

    pre-training   −log σ(r(p, τ_A1, τ_A2) − r(p, τ_A1, τ_B1))      Eq. 7; policy A made A1 and A2, policy B made B1
    fine-tuning    −log σ(r(p, τ_A, τ_B) − r(p, τ_A, τ_C))          Eq. 8; ranking A ≻ B ≻ C, the best is the reference

Every loss is Σ over pairs with their number. Shapes: P pairs, N candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.objectives.metrics import Metrics, mean_metric, weighted_sum
from lit_interns1.objectives.options import check_number
from lit_interns1.training.summed_loss import SummedLoss


class BradleyTerry:
    """−log σ of the difference of two scores.

    Args:
        margin: m of pairs for which the call gives none.
        center_rewards_coefficient: c ≥ 0; None = 0.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, margin: float = 0.0, center_rewards_coefficient: float | None = None) -> None:
        check_number("margin", margin, float("-inf"))
        check_number("center_rewards_coefficient", center_rewards_coefficient, 0.0)
        self.margin, self.center_rewards_coefficient = margin, center_rewards_coefficient

    def __call__(
        self, chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | None = None, weight_P: Tensor | None = None
    ) -> tuple[SummedLoss, Metrics]:
        """The loss of one micro-batch.

        Args:
            chosen_P: (P,) scores of the better responses.
            rejected_P: (P,) scores of the worse ones.
            margin_P: (P,) m ≥ 0 of each pair.
            weight_P: (P,) weight of each pair; the count stays P.

        Returns:
            The loss, whose count is P, and metrics: `accuracy` (a tie counts one half), `margin` r_w − r_l, `score` (of
            both responses) and `loss`.

        Raises:
            ValueError: If the vectors differ in length.
        """
        for name, value_P in (("rejected_P", rejected_P), ("margin_P", margin_P), ("weight_P", weight_P)):
            if value_P is not None and (value_P.ndim != 1 or value_P.shape != chosen_P.shape):
                raise ValueError(
                    f"{name} {tuple(value_P.shape)} must be a vector like chosen_P {tuple(chosen_P.shape)}"
                )
        wide = torch.promote_types(chosen_P.dtype, torch.float32)
        score_2P = torch.stack([chosen_P.to(wide), rejected_P.to(wide)])
        difference_P = score_2P[0] - score_2P[1]
        wanted = self.margin if margin_P is None else margin_P.to(wide)
        loss_P = -F.logsigmoid(difference_P - wanted)
        if self.center_rewards_coefficient is not None:
            loss_P = loss_P + self.center_rewards_coefficient * score_2P.sum(0).square()
        metrics = {
            "accuracy": mean_metric((1.0 + difference_P.sign()) / 2.0), "margin": mean_metric(difference_P),
            "score": mean_metric(score_2P),
        }  # fmt: skip
        return weighted_sum(loss_P, weight_P, metrics), metrics


class PolarPretrainLoss(BradleyTerry):
    """POLAR's pre-training loss: chosen = the score of the trajectory whose policy also made the reference, rejected =
    that of another policy's."""

    def __init__(self) -> None:
        super().__init__()


class PolarRankingLoss(BradleyTerry):
    """POLAR's fine-tuning loss: chosen = the score of B, rejected = that of C, both against A, the best of the ranking.

    `rankings` does the same for any number of candidates: all pairs of a ranking, each with the best as the reference.
    """

    def __init__(self) -> None:
        super().__init__()

    def rankings(self, score_N: Tensor, ranking_N: Tensor, place_N: Tensor) -> tuple[SummedLoss, Metrics]:
        """The loss over all pairs of candidates of the same ranking; equal places make no pair.

        Args:
            score_N: Scores of the candidates against the best of their ranking, which is not among them.
            ranking_N: The ranking that a candidate belongs to.
            place_N: Its place there, the lowest is the best.

        Returns:
            As of a call; a ranking counts by its pairs.

        Raises:
            ValueError: If the vectors differ in length.
        """
        better_P, worse_P = ranking_pairs(ranking_N, place_N)
        if score_N.shape != ranking_N.shape:
            raise ValueError(
                f"score_N {tuple(score_N.shape)} must be a vector like ranking_N {tuple(ranking_N.shape)}"
            )  # fmt: skip
        return self(score_N[better_P], score_N[worse_P])


def ranking_pairs(ranking_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of candidates of the same ranking with different places.

    Args:
        ranking_N: The ranking that a candidate belongs to.
        place_N: Its place there, the lowest is the best.

    Returns:
        (P,) places in the vectors of the better and of the worse candidates.

    Raises:
        ValueError: If the vectors differ in length.
    """
    if ranking_N.ndim != 1 or ranking_N.shape != place_N.shape:
        raise ValueError(f"ranking_N {tuple(ranking_N.shape)} and place_N {tuple(place_N.shape)} must be like vectors")
    same_NN = ranking_N[:, None] == ranking_N[None, :]
    better_P, worse_P = (same_NN & (place_N[:, None] < place_N[None, :])).nonzero(as_tuple=True)
    return better_P, worse_P
