"""Mathematical answers compared as mathematics, by math-verify (extra `rl`).

    1/2 = 0.5 = \\frac{1}{2}        \\{1,2\\} = 1,2        10\\text{ cm} = 10        x=3 answers 3

What the package needs from its caller, each met here:

- its timeouts use SIGALRM, which fails outside the main thread and waits for C code: both are off, and the judge runs
  in a worker process, which is stopped from outside;
- the comparison is not symmetric: the reference comes first;
- several boxes are read as one set: only the last counts;
- an answer that is nothing but an answer (1,2 or A) is read better in a box: references are put in one;
- an unreadable reference makes every answer wrong in silence: here it is an error;
- it does not know the sign − (U+2212).
"""

from __future__ import annotations

import logging

from lit_interns1.rollout.judges.answers import after_thinking, boxed, reference
from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.judges.optional import need
from lit_interns1.rollout.samples import Prompt, Sample


class MathVerifyJudge(Judge):
    """1 if the answer equals the reference as mathematics, else 0; an answer that cannot be read is wrong.

    Args:
        field: Of the prompt's data: the reference, as text in LaTeX or plain.
        float_rounding: Decimals to which numbers are compared.
        numeric_precision: Digits of numerical evaluation.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If an option is out of range.
    """

    score_range = (0.0, 1.0)

    def __init__(self, field: str = "answer", float_rounding: int = 6, numeric_precision: int = 15) -> None:
        if float_rounding < 0 or numeric_precision < 1:
            raise ValueError(
                f"float_rounding = {float_rounding} must be at least 0, numeric_precision = {numeric_precision} "
                "at least 1"
            )
        self.field, self.float_rounding, self.numeric_precision = field, float_rounding, numeric_precision
        self._load()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._load()  # before workers are forked, so that none of them waits for it

    def _load(self) -> None:
        package = need("math_verify", "math-verify")
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of timeouts that are off
        self._parse, self._verify = package.parse, package.verify

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        wanted = str(reference(prompt, self.field)).strip()
        bare = not any(mark in wanted for mark in ("\\boxed", "$", "\\(", "\\["))
        gold = self._read(f"\\boxed{{{wanted}}}" if bare else wanted)
        if not gold:
            raise ValueError(f"math-verify cannot read the reference {wanted!r:.200}")
        answer = after_thinking(text)
        last = boxed(answer)
        given = self._read(answer if last is None else f"\\boxed{{{last}}}")
        right = bool(given) and self._verify(
            gold, given, float_rounding=self.float_rounding, numeric_precision=self.numeric_precision,
            timeout_seconds=None,
        )  # fmt: skip
        return Judgement(float(right), bool(right))

    def _read(self, text: str) -> list[object]:
        return self._parse(text.replace("−", "-"), parsing_timeout=None)
