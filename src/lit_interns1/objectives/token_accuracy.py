"""Next-token accuracy on a class of tokens: small downstream scores that any checkpoint can be given in seconds.

    accuracy = Σ_t 1[t in class] · 1[rank_t = 0] / Σ_t 1[t in class]          (rank 0: no logit above that of the label)

Two classes: the tokens of molecules written between tags, and closing brackets elsewhere, which a model predicts only
if it keeps track of what is open. Shapes: T tokens of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def inside_tags(input_T: Tensor, cu_seqlens: Tensor, opening_id: int, closing_id: int) -> Tensor:
    """(T,) bool: positions from an opening tag on up to the one before its closing tag, by document.

    A piece of a document that begins inside the tags is not inside: its tag lies in another row.

    Args:
        input_T: (T,) token ids.
        cu_seqlens: (D+1,) cumulative document lengths.
        opening_id: Token id of the opening tag.
        closing_id: Token id of the closing tag.
    """
    step_T = (input_T == opening_id).long() - (input_T == closing_id).long()
    depth_T = step_T.cumsum(0)
    length_D = cu_seqlens.diff().long()
    before_D = (depth_T - step_T)[cu_seqlens[:-1].long().clamp(max=len(input_T) - 1)]
    return depth_T - torch.repeat_interleave(before_D, length_D, output_size=len(input_T)) > 0


class TokenAccuracy(Metric):
    """Accuracy of the best-ranked token in each class.

    Args:
        names: Names of the C classes.
    """

    full_state_update = False
    correct_C: Tensor
    count_C: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for state in ("correct_C", "count_C"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rank_T: Tensor, classes_CT: Tensor) -> None:
        """Adds tokens.

        Args:
            rank_T: (T,) vocabulary entries with a larger logit than the label.
            classes_CT: (C, T) bool, which tokens are in which class; a token without a label is in none.
        """
        self.correct_C += (classes_CT & (rank_T == 0)).sum(1)
        self.count_C += classes_CT.sum(1)

    def compute(self) -> dict[str, float]:
        """Accuracy by class; NaN where the class is empty."""
        return dict(zip(self.names, (self.correct_C / self.count_C).tolist(), strict=True))
