"""Which responses suit a student model: informative to it, and yet well ranked (arXiv 2601.14249).

    s_t = −log p(y_t)          r_t = min(1 + |{v : z_v > z_target}|, r_max)
    of a sample: RSR = Σ_t r_t / Σ_t s_t         of a set: RSR = Σ_x mean_t r_t / Σ_x mean_t s_t         lower = better

p and z are the student's, t runs over the tokens of the response: of all answers, if there are several turns. Rank and
surprisal come from `TokenScores`, so no (T, V) matrix exists. The standard error of the ratio of a set (a
reconstruction, by linearisation, as of a ratio of means) takes the samples as independent.
Letters: T tokens of a batch, S samples, G groups such as sources or teachers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_interns1.nn.head import TokenScores

MAX_RANK = 100
"""r_max of the paper (Eq. 7)."""
_TINY = 1e-12


class RankSurprisal(NamedTuple):
    """Sums over the response of each sample, float64.

    Attributes:
        rank_S: (S,) Σ r_t.
        surprisal_S: (S,) Σ s_t, nats.
        tokens_S: (S,) tokens of the response.
    """

    rank_S: Tensor
    surprisal_S: Tensor
    tokens_S: Tensor

    @property
    def mean_rank_S(self) -> Tensor:
        """(S,) mean rank per token; NaN without a token."""
        return self.rank_S / self.tokens_S

    @property
    def mean_surprisal_S(self) -> Tensor:
        """(S,) nats per token; NaN without a token."""
        return self.surprisal_S / self.tokens_S

    @property
    def ratio_S(self) -> Tensor:
        """(S,) RSR; NaN without a token, and very large where nothing surprises at all."""
        ratio_S = self.rank_S / self.surprisal_S.clamp(min=_TINY)
        return ratio_S.masked_fill(self.tokens_S == 0, torch.nan)


def rank_surprisal(
    scores: TokenScores, labels_T: Tensor, sample_ids_T: Tensor, num_samples: int, max_rank: int = MAX_RANK
) -> RankSurprisal:
    """Sums ranks and surprisals by sample.

    Args:
        scores: Of the labels, with ranks, at temperature 1.
        labels_T: (T,) tokens of responses at the positions that predict them; negative elsewhere.
        sample_ids_T: (T,) which sample a position belongs to, from 0; not read where there is no label.
        num_samples: S.
        max_rank: r_max, at least 1: larger ranks count as this.

    Raises:
        ValueError: If the scores have no ranks or `max_rank` is below 1.
    """
    if scores.rank_T is None:
        raise ValueError("the Rank-Surprisal Ratio needs scores with ranks: ask the head for rank=True")
    if max_rank < 1:
        raise ValueError(f"max_rank = {max_rank} must be at least 1")
    labelled_T = labels_T >= 0
    sample_N = sample_ids_T[labelled_T]
    rank_N = (scores.rank_T[labelled_T] + 1).clamp(max=max_rank)
    columns = (rank_N, -scores.logp_T[labelled_T].detach(), torch.ones_like(rank_N))
    empty_S = torch.zeros(num_samples, dtype=torch.float64, device=labels_T.device)
    return RankSurprisal(*(empty_S.index_add(0, sample_N, column.double()) for column in columns))


class RatioOfSet(NamedTuple):
    """RSR of a set of samples. Plain numbers: torchmetrics takes the axis off tensors of one.

    Attributes:
        ratio: Mean rank / mean surprisal; NaN without a sample, as the next two.
        mean_rank: Of the samples' mean ranks.
        mean_surprisal: Of the samples' mean surprisals, nats.
        samples: How many have a response.
        standard_error: Of the ratio; NaN with fewer than two samples.
    """

    ratio: float
    mean_rank: float
    mean_surprisal: float
    samples: int
    standard_error: float


class RankSurprisalRatio(Metric):
    """RSR of sets of samples: ratio of means in each group, and over all; exact over ranks that share the samples.

    Args:
        num_groups: G.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, num_groups: int = 1) -> None:
        super().__init__()
        # of mean rank r and mean surprisal s of the samples in each group: Σ 1, Σ r, Σ s, Σ r², Σ r s, Σ s²
        self.add_state("sums", torch.zeros(6, num_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples: RankSurprisal, group_S: Tensor | None = None) -> None:
        """Adds samples. One without a response token is left out.

        Args:
            samples: Their sums.
            group_S: (S,) group numbers; default: all in group 0.
        """
        group_S = torch.zeros_like(samples.tokens_S, dtype=torch.int64) if group_S is None else group_S
        some_S = samples.tokens_S > 0
        r, s = samples.mean_rank_S[some_S], samples.mean_surprisal_S[some_S]
        columns = torch.stack([torch.ones_like(r), r, s, r * r, r * s, s * s]).double()
        # a Trainer with precision bf16-true casts the state, too: sums need their float64 back
        self.sums = self.sums.double().index_add(1, group_S[some_S], columns)

    def compute(self) -> tuple[RatioOfSet, tuple[RatioOfSet, ...]]:
        """Of all samples together, and of each group."""
        sums = self.sums.double()
        whole, *groups = torch.cat([sums.sum(1, keepdim=True), sums], 1).T.tolist()
        return _ratio_of_set(*whole), tuple(_ratio_of_set(*group) for group in groups)


def _ratio_of_set(
    count: float, rank: float, surprisal: float, rank2: float, product: float, surprisal2: float
) -> RatioOfSet:
    if not count:
        return RatioOfSet(math.nan, math.nan, math.nan, 0, math.nan)
    ratio = rank / max(surprisal, _TINY)
    spread = max(rank2 - 2 * ratio * product + ratio**2 * surprisal2, 0.0)
    error = math.sqrt(count / (count - 1) * spread) / max(surprisal, _TINY) if count > 1 else math.nan
    return RatioOfSet(ratio, rank / count, surprisal / count, int(count), error)
