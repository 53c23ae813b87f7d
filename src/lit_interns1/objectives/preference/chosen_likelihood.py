"""Cross-entropy on the chosen responses of pairs, beside a preference loss (RPO, arXiv 2404.19733, Eq. 1).

    L = Σ_p w_p · (−log π_θ(y_w)/|y_w|) / P          per token of the response, then the mean over pairs

Preference losses read the difference of two responses, and both may become less likely: this keeps the chosen one.
"""

from __future__ import annotations

from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, weighted_sum
from lit_interns1.objectives.preference.inputs import PreferenceInputs
from lit_interns1.training.summed_loss import SummedLoss


def chosen_cross_entropy(logp_T: Tensor, inputs: PreferenceInputs) -> SummedLoss:
    """The loss of one micro-batch, whose count is the number of pairs.

    Args:
        logp_T: log π_θ with gradient, 0 outside responses.
        inputs: Of the same tokens.

    Raises:
        ValueError: If a pair is not whole.
    """
    pairs, metrics = inputs.pairs, Metrics()
    return weighted_sum(-inputs.sample_means(logp_T)[pairs.chosen_P], pairs.weight_P, metrics)
