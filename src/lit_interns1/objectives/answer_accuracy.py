"""How many answers a model would give word for word, from the scores of the right ones.

    right(a) = Π_{t in a} 1[rank_t = 0]          accuracy = Σ_a right(a) / answers

An answer is a run of consecutive labels in one document. If every token of it is the most likely one behind the right
tokens before it, then greedy decoding writes exactly this answer; so nothing has to be generated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class AnswerAccuracy(Metric):
    """The share of answers of which all tokens are the most likely ones; NaN without answers."""

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("right", "total"):
            self.add_state(state, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rank_T: Tensor, labels_T: Tensor, cu_seqlens: Tensor) -> None:
        """Adds the answers of a batch.

        Args:
            rank_T: (T,) vocabulary entries with a larger logit than the label.
            labels_T: (T,) labels, negative = none.
            cu_seqlens: (D+1,) document boundaries.
        """
        labelled_T = labels_T >= 0
        begins_T = torch.zeros_like(labelled_T)
        begins_T[cu_seqlens[:-1].long().clamp(max=max(len(labels_T) - 1, 0))] = True
        begins_T[1:] |= ~labelled_T[:-1]
        first_T = labelled_T & begins_T
        answer_T = first_T.long().cumsum(0)
        count = int(first_T.sum())
        wrong_A = torch.zeros(count + 1, dtype=torch.int64, device=labels_T.device)
        wrong_A.index_add_(0, answer_T, (labelled_T & (rank_T != 0)).long())
        self.right += (wrong_A[1:] == 0).sum()
        self.total += count

    def compute(self) -> Tensor:
        """The accuracy so far."""
        return self.right.float() / self.total
