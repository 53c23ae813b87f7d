"""How often the better answer of a pair has the larger score: of a reward model, or of a policy's implicit reward.

    right_p = 1[chosen_p > rejected_p] + ½ · 1[chosen_p = rejected_p]          a = Σ_p w_p right_p / Σ_p w_p
    SE(a)² = n / (n − 1) · Σ_p w_p² (right_p − a)² / (Σ_p w_p)²                n pairs with a weight above 0

A tie counts one half, so a model that scores everything alike has the accuracy of a coin. With equal weights the
standard error is that of a mean of n independent pairs. Shapes: P pairs of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class PreferenceAccuracy(Metric):
    """Share of pairs in the right order, with its standard error: exact over batches and ranks, whatever the split.

    Attributes:
        standard_error: Of the accuracy that `compute` gave last, a float64 scalar; NaN before, and with fewer than two
            pairs.
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # n, Σ w, Σ w right, Σ w², Σ w² right, Σ w² right²: one state, so that ranks exchange one tensor
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        self.standard_error = torch.tensor(torch.nan, dtype=torch.float64)

    def update(self, chosen_P: Tensor, rejected_P: Tensor, weight_P: Tensor | None = None) -> None:
        """Adds pairs. A score that is not a number makes the accuracy not a number: nothing is counted as wrong for it.

        Args:
            chosen_P: (P,) scores of the better answers.
            rejected_P: (P,) scores of the worse ones.
            weight_P: (P,) weights, at least 0; default: 1 each. A pair of weight 0 is no pair.

        Raises:
            ValueError: If shapes differ or a weight is negative.
        """
        shapes = [tuple(x.shape) for x in (chosen_P, rejected_P, weight_P) if x is not None]
        if any(shape != shapes[0] for shape in shapes) or chosen_P.ndim != 1:
            raise ValueError(f"scores (and weights) of pairs must be vectors of one length, got shapes {shapes}")
        right_P = (chosen_P > rejected_P).double() + 0.5 * (chosen_P == rejected_P)
        right_P = right_P.masked_fill(chosen_P.isnan() | rejected_P.isnan(), torch.nan)
        weight_P = torch.ones_like(right_P) if weight_P is None else weight_P.double()
        right_P = right_P.masked_fill(weight_P == 0, 0.0)
        if bool((weight_P < 0).any()):
            raise ValueError(f"weights of pairs must be at least 0, got {float(weight_P.min())}")
        parts = [(weight_P > 0).double(), weight_P, weight_P * right_P]
        parts += [weight_P**2 * right_P**power for power in range(3)]
        # a Trainer with precision bf16-true casts the state, too: counts of pairs need their float64 back
        self.sums = self.sums.double() + torch.stack(parts).sum(1)

    def compute(self) -> Tensor:
        """The accuracy over all ranks, a float64 scalar; NaN without a pair."""
        count, weight, right, *squares = self.sums.double().unbind()
        accuracy = right / weight
        spread = (squares[2] - 2 * accuracy * squares[1] + accuracy**2 * squares[0]).clamp(min=0)
        self.standard_error = (count / (count - 1) * spread).sqrt() / weight
        return accuracy
