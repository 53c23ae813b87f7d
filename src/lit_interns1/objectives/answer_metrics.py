"""What several sampled answers to a question are worth: pass@k, and votes among them.

    pass@k = 1 − C(n − c, k) / C(n, k)              n samples, c of them right (arXiv 2107.03374, eq. 1); pass@1 = c / n
    majority: most samples      shortest: the shortest sample      shortest majority: largest c_a / ln(mean length of a)

The last is the Shortest Majority Vote of arXiv 2502.12215: right solutions tend to be shorter than wrong ones.
Reconstructions: a mean length below 2 counts as 2, so that the logarithm is positive; of equals, the answer that came
first wins. Samples without an answer that could be read do not vote. Letters: G samples of a question, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

VoteRule = Literal["majority", "shortest", "shortest_majority"]
VOTE_RULES: tuple[VoteRule, ...] = get_args(VoteRule)
"""Names of the rules."""
NO_ANSWER = -1
"""The answer number of a sample without one."""
_EQUAL = 1e-12
"""Scores that differ relatively by less are equal: 1 / ln 10 and 3 / ln 1000."""


def answer_ids(answers: Sequence[Hashable | None]) -> Tensor:
    """(G,) int64: equal answers get the same number, in the order in which they come first; None gets −1."""
    numbers: dict[Hashable, int] = {}
    found = [NO_ANSWER if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]
    return torch.tensor(found, dtype=torch.int64)


def pass_at_k(correct_G: Tensor, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from G ≥ k of them.

    Args:
        correct_G: (G,) bool, or 0 and 1.
        k: How many are drawn, without replacement.

    Raises:
        ValueError: If k is not between 1 and G, or something is neither right nor wrong.
    """
    samples, right = len(correct_G), int(_checked_correct(correct_G).sum())
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ samples, got k = {k} of {samples} samples")
    if samples - right < k:
        return 1.0
    # C(n − c, k) / C(n, k) = Π (1 − k / i) over i = n − c + 1 … n: no factorial, and no 1 − x for a small result
    return -math.expm1(sum(math.log1p(-k / i) for i in range(samples - right + 1, samples + 1)))


def vote(answer_ids_G: Tensor, length_G: Tensor | None = None, rule: VoteRule = "majority") -> int:
    """The number of the answer that wins; −1 if no sample has one.

    Args:
        answer_ids_G: (G,) integer answer numbers, −1 = none; see `answer_ids`.
        length_G: (G,) lengths of the samples in tokens, whole solutions and not only answers. `majority` needs none.
        rule: How samples are weighed.

    Raises:
        ValueError: If the rule is unknown, lengths are missing or negative, or shapes differ.
    """
    if rule not in VOTE_RULES:
        raise ValueError(f"rule = {rule!r} must be one of {', '.join(VOTE_RULES)}")
    if rule != "majority" and length_G is None:
        raise ValueError(f"rule = {rule!r} needs the lengths of the samples")
    if length_G is not None and (length_G.shape != answer_ids_G.shape or bool((length_G < 0).any())):
        raise ValueError(f"lengths must be at least 0, one for each of {len(answer_ids_G)} samples, got {length_G}")
    answered_G = answer_ids_G >= 0
    ids_A, slot_G = torch.unique(answer_ids_G[answered_G], return_inverse=True)
    if not len(ids_A):
        return NO_ANSWER
    count_A = torch.bincount(slot_G, minlength=len(ids_A)).double()
    if rule == "majority" or length_G is None:
        score_A = count_A
    elif rule == "shortest":
        score_A = -torch.full_like(count_A, torch.inf).scatter_reduce(0, slot_G, length_G[answered_G].double(), "amin")
    else:
        mean_A = torch.zeros_like(count_A).index_add(0, slot_G, length_G[answered_G].double()) / count_A
        score_A = count_A / mean_A.clamp(min=2.0).log()
    best_A = score_A >= score_A.max() - _EQUAL * score_A.max().abs()
    first = int(best_A[slot_G].long().argmax())  # of the first sample that gave one of the best answers
    return int(ids_A[slot_G[first]])


def vote_correct(
    correct_G: Tensor, answer_ids_G: Tensor, length_G: Tensor | None = None, rule: VoteRule = "majority"
) -> float:
    """How right the answer that wins is: the share of right samples among those that gave it; 0 if nobody gave one.

    That is 1 or 0 where right and wrong depend on the answer alone. Arguments as of `vote`, and correct_G (G,) bool.
    """
    winner = vote(answer_ids_G, length_G, rule)
    correct = _checked_correct(correct_G)
    return 0.0 if winner == NO_ANSWER else float(correct[answer_ids_G == winner].double().mean())


class AnswerMetrics(Metric):
    """Means over questions of pass@k and of the votes, with standard errors; exact over ranks that share questions.

    `compute` gives `pass_at_{k}`, the rules by name, and `length_right` and `length_wrong` (mean tokens of right and
    wrong samples, where lengths were given); NaN where there is nothing.

    Args:
        ks: Numbers of samples for pass@k; 1 is the mean accuracy of single samples ("average of G").
        rules: Votes to hold; none by default.

    Attributes:
        standard_errors: Of the means over questions that `compute` gave last, by the same names; NaN with fewer than
            two questions.

    Raises:
        ValueError: If a k is below 1 or a rule is unknown.
    """

    full_state_update = False
    sums: Tensor
    samples: Tensor

    def __init__(self, ks: Sequence[int] = (1,), rules: Sequence[VoteRule] = ()) -> None:
        super().__init__()
        if any(k < 1 for k in ks) or not set(rules) <= set(VOTE_RULES):
            raise ValueError(f"ks = {ks} must be at least 1, and rules = {rules} of {', '.join(VOTE_RULES)}")
        self.ks, self.rules = tuple(ks), tuple(rules)
        self.names = [f"pass_at_{k}" for k in self.ks] + list(self.rules)
        self.standard_errors: dict[str, float] = dict.fromkeys(self.names, math.nan)
        # rows: questions, Σ x, Σ x² of every name; and tokens and samples of right and of wrong samples
        self.add_state("sums", torch.zeros(3, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correct_G: Tensor, answer_ids_G: Tensor | None = None, length_G: Tensor | None = None) -> None:
        """Adds one question.

        Args:
            correct_G: (G,) bool, whether each sample is right; a sample that could not be judged is left out.
            answer_ids_G: (G,) answer numbers; votes need them.
            length_G: (G,) lengths in tokens.

        Raises:
            ValueError: As `pass_at_k` and `vote`, or if votes are wanted without answers.
        """
        if self.rules and answer_ids_G is None:
            raise ValueError(f"votes ({', '.join(self.rules)}) need answer_ids_G")
        values = [pass_at_k(correct_G, k) for k in self.ks]
        if answer_ids_G is not None:
            values += [vote_correct(correct_G, answer_ids_G, length_G, rule) for rule in self.rules]
        row = torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        # a Trainer with precision bf16-true casts the states, too: sums need their float64 back
        self.sums = self.sums.double() + torch.stack([torch.ones_like(row), row, row**2])
        if length_G is not None:
            right_G, tokens_G = correct_G.to(self.sums.device).bool(), length_G.to(self.sums.device).double()
            parts = [torch.stack([tokens_G[mask].sum(), mask.sum().double()]) for mask in (right_G, ~right_G)]
            self.samples = self.samples.double() + torch.stack(parts)

    def compute(self) -> dict[str, float]:
        """The means by name."""
        count, total, square = self.sums.double()
        mean = total / count
        spread = ((square - count * mean**2).clamp(min=0) / (count - 1) / count).sqrt()
        self.standard_errors = dict(zip(self.names, spread.tolist(), strict=True))
        lengths = (self.samples[:, 0] / self.samples[:, 1]).tolist()
        return dict(zip([*self.names, "length_right", "length_wrong"], [*mean.tolist(), *lengths], strict=True))


def _checked_correct(correct_G: Tensor) -> Tensor:
    if correct_G.ndim != 1 or not bool(((correct_G == 0) | (correct_G == 1)).all()):
        raise ValueError(f"correct_G must be a vector of 0 (wrong) and 1 (right), got {correct_G}")
    return correct_G
