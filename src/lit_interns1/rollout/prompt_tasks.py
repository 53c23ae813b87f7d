"""Tasks whose answers are computed, as sources of prompts: without a data set, and without end.

ArithmeticPrompts       12 + 5 =                        nothing else is needed; train and test have no problem in common
ReasoningGymPrompts     the tasks of reasoning-gym      extra `rl`
JoinedPrompts           several sources as one
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lit_interns1.data.arithmetic import ArithmeticKind, ArithmeticProblems, Split
from lit_interns1.rollout.judges.reasoning_gym import gym_dataset
from lit_interns1.rollout.prompts import PromptSource, RawPrompt


class ArithmeticPrompts(PromptSource):
    """Arithmetic problems; `data["answer"]` is the result. With the defaults the same questions as the conversations
    `bundled:chain-sum/train` and `bundled:chain-sum/test`.

    Args:
        kind: See `ArithmeticProblems`, as for all but the last.
        min_digits: Fewest digits of a term.
        max_digits: Most digits.
        min_terms: Fewest terms.
        max_terms: Most terms.
        operators: Signs of a chain sum: "+", "-" or "+-".
        size: How many prompts.
        seed: Of the draws.
        split: "train" or "test": they share no problem, whatever seed, size and range.
        source: Source of the prompts; default: the kind.

    Raises:
        ValueError: If an option is out of range, or the split has no such problem.
    """

    def __init__(
        self,
        kind: ArithmeticKind = "chain_sum",
        min_digits: int = 1,
        max_digits: int = 2,
        min_terms: int = 2,
        max_terms: int = 2,
        operators: str = "+-",
        size: int = 10_000,
        seed: int = 0,
        split: Split = "train",
        source: str | None = None,
    ) -> None:
        self.problems = ArithmeticProblems(
            kind, min_digits, max_digits, min_terms, max_terms, operators, size, seed, split
        )
        self.source = kind if source is None else source

    def __len__(self) -> int:
        """How many there are."""
        return len(self.problems)

    def __getitem__(self, index: int) -> RawPrompt:
        """One of them."""
        question, answer = self.problems[index]
        return RawPrompt(question, self.source, {"answer": answer})


class ReasoningGymPrompts(PromptSource):
    """Tasks of a data set of reasoning-gym (extra `rl`), for `ReasoningGymJudge`.

    Its items are a function of name, configuration, seed and number. Two seeds may share items: where that matters,
    test on a configuration that is not trained on.

    Args:
        name: Name of the data set, such as "gcd".
        size: How many prompts.
        seed: Of the data set.
        config: Its options, such as `{"min_terms": 2}`.
        source: Source of the prompts; default: "reasoning_gym_" and the name.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such data set, or it refuses its options.
    """

    def __init__(
        self,
        name: str,
        size: int = 1_000,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        source: str | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.name, self.seed, self.config = name, seed, dict(config or {})
        self.source = f"reasoning_gym_{name}" if source is None else source
        self.dataset = gym_dataset(name, {**self.config, "size": size, "seed": seed})

    def __len__(self) -> int:
        """How many there are."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> RawPrompt:
        """One of them."""
        entry = self.dataset[index]
        data = {"entry": entry, "answer": entry["answer"], "task": self.name, "config": self.config}
        return RawPrompt(entry["question"], self.source, data)


class JoinedPrompts(PromptSource):
    """Several sources of prompts as one, one behind the other.

    Args:
        sources: At least one.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, sources: Sequence[PromptSource]) -> None:
        if not sources:
            raise ValueError("sources: at least one source of prompts is needed")
        self.sources = list(sources)
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        """Prompts of all of them."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> RawPrompt:
        """One prompt, by its number among all."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        place = bisect_right(self._ends, index)
        return self.sources[place][index - (self._ends[place - 1] if place else 0)]
