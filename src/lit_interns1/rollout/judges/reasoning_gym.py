"""Answers to tasks of reasoning-gym (extra `rl`), by the scorers of their data sets.

    answer in the text → scorer of the data set → score in [0, 1] → 1 if the score is 1, else 0

The scores below 1 are no rewards to train on: most scorers give len(reference)/len(answer) to any answer that contains
the reference, several give 0.01 for no answer at all (countdown, puzzle24, fraction_simplification), and 0.05 is common
for what can be read but is wrong. So only a full score counts, and a missing answer is 0 without asking. Some data sets
have no reference (propositional_logic, graph_color): their scorers check the answer itself.

Some scorers evaluate the answer (with SymPy), so a response decides how long that takes and what it does: the judge
runs in a worker process, which is stopped when its time is over, but which is no sandbox.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, get_args

from lit_interns1.rollout.judges.answers import Extraction, after_thinking, extract, reference
from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.judges.optional import need
from lit_interns1.rollout.samples import Prompt, Sample


def gym_dataset(name: str, options: dict[str, Any]) -> Any:
    """A data set of reasoning-gym.

    Args:
        name: Its name.
        options: What it is made with.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such data set, or it refuses its options.
    """
    gym = need("reasoning_gym", "reasoning-gym")
    try:
        return gym.create_dataset(name, **options)
    except Exception as error:  # unknown names, unknown options, and assertions about their values
        raise ValueError(f"reasoning-gym data set {name!r} with {options}: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=256)
def _scorer(name: str, options: str) -> Any:
    return gym_dataset(name, {**json.loads(options), "size": 1}).score_answer


class ReasoningGymJudge(Judge):
    """Scores answers to the prompts of `ReasoningGymPrompts`.

    Args:
        extraction: Where the answer is: "tag" (`<answer>…</answer>`, as the package's own system prompts ask for),
            "exact", "last_number" or "boxed".
        tag: Name of the tag.
        binary: 1 for a full score, else 0. Without it the score is what the package gives, and can be had without an
            answer.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the extraction is unknown.
    """

    score_range = (0.0, 1.0)

    def __init__(self, extraction: Extraction = "tag", tag: str = "answer", binary: bool = True) -> None:
        if extraction not in get_args(Extraction) or extraction == "pattern":
            raise ValueError(f"extraction = {extraction!r} must be tag, exact, last_number or boxed")
        self.extraction, self.tag, self.binary = extraction, tag, binary
        need("reasoning_gym", "reasoning-gym")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        need("reasoning_gym", "reasoning-gym")  # before workers are forked, so that none of them waits for it

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        entry, task = reference(prompt, "entry"), reference(prompt, "task")
        scorer = _scorer(task, json.dumps(prompt.data.get("config") or {}, sort_keys=True))
        answer = extract(after_thinking(text), self.extraction, self.tag)
        score = float(scorer(answer, entry)) if answer else 0.0
        right = score >= 1.0
        return Judgement(float(right) if self.binary else score, right)
