"""How good the samples of validation prompts are, with standard errors over prompts.

reward    mean over prompts of the mean reward of a prompt's samples          standard error: std over prompts / √n
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RolloutMetrics(Metric):
    """Means over prompts of reward, fraction right and length; exact over ranks that share the prompts."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # rows: reward, right, length; columns: prompts, Σ x, Σ x²
        self.add_state("sums", torch.zeros(3, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards_G: Tensor, correct_G: Tensor, lengths_G: Tensor) -> None:
        """Adds the samples of one prompt.

        Args:
            rewards_G: (G,) rewards.
            correct_G: (G,) 1 or 0, NaN where no judge said so.
            lengths_G: (G,) tokens.
        """
        known_G = ~correct_G.isnan()
        means = [rewards_G.double().mean(), correct_G[known_G].double().mean(), lengths_G.double().mean()]
        row = torch.stack(means).to(self.sums.device)
        there = torch.tensor([1.0, float(known_G.any()), 1.0], dtype=torch.float64, device=row.device)
        row = torch.where(there > 0, row, 0.0)
        # a Trainer with precision bf16-true casts the states, too: sums need their float64 back
        self.sums = self.sums.double() + torch.stack([there, row, row**2], dim=1)

    def compute(self) -> dict[str, float]:
        """`reward`, `reward_standard_error`, `correct`, `correct_standard_error`, `response_length`; what is not known
        is left out."""
        found: dict[str, float] = {}
        for name, (count, total, square) in zip(
            ("reward", "correct", "response_length"), self.sums.double().tolist(), strict=True
        ):
            if not count:
                continue
            mean = total / count
            found[name] = mean
            if count > 1 and name != "response_length":
                found[f"{name}_standard_error"] = (max(square - count * mean**2, 0.0) / (count - 1) / count) ** 0.5
        return found
