"""What a run counts: tokens, rows per optimizer step, and losses as sums with their denominators. No Lightning here."""

from lit_interns1.training.global_batch import GlobalBatch
from lit_interns1.training.gradient_norm import total_norm
from lit_interns1.training.summed_loss import LossWindow, SummedLoss, token_weight
from lit_interns1.training.token_clock import TokenClockState, TokenCounts, count_tokens
from lit_interns1.training.window_means import WindowMeans, all_reduce_sum

__all__ = [
    "GlobalBatch", "LossWindow", "SummedLoss", "TokenClockState", "TokenCounts", "WindowMeans", "all_reduce_sum",
    "count_tokens", "token_weight", "total_norm",
]  # fmt: skip
