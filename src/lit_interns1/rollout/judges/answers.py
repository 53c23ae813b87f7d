"""Answers compared with a reference, in plain Python.

    text → what stands behind </think> → the answer in it → equal to the reference?

    exact         all of it                          17
    last_number   the last number                    so it is 17.              1,234 and -5 and 0.5 are numbers
    boxed         the last \\boxed{…}                 \\boxed{\\frac{1}{2}}
    tag           the last <answer>…</answer>        <answer>17</answer>
    pattern       group 1 of the last match of a regular expression

Numbers are equal as numbers (7 = 7.0 = 007), other answers as texts. Fractions, units and formulas: `MathVerifyJudge`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Literal, get_args

from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.samples import Prompt, Sample

Extraction = Literal["exact", "last_number", "boxed", "tag", "pattern"]
# A sign behind a digit, a letter or a bracket is an operator: the last number of 5-3 is 3.
_SIGN = r"(?:(?<![\w.)\]])[-−+])?"
_NUMBER = re.compile(rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,])|\d+)(?:\.\d+)?|{_SIGN}(?<![\w.])\.\d+")
_WHOLE_NUMBER = re.compile(rf"(?:{_NUMBER.pattern})\.?")


def after_thinking(text: str) -> str:
    """What stands behind the last `</think>`; nothing if a `<think>` was never closed; else the text as it is."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def number(text: str) -> Fraction | None:
    """The value of a text that is a decimal number, exactly."""
    text = text.strip()
    if not _WHOLE_NUMBER.fullmatch(text):
        return None
    return Fraction(text.rstrip(".").replace(",", "").replace("−", "-"))


def last_number(text: str) -> str | None:
    """The last number written in a text."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def boxed(text: str) -> str | None:
    """What is in the last complete `\\boxed{…}`, whose braces may be nested."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth, place = 1, start
        while place < len(text):
            if text[place] == "\\":
                place += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
            place += 1
    return None


def tagged(text: str, tag: str) -> str | None:
    """What is in the last `<tag>…</tag>`."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len(tag) + 2 : end].strip()


def extract(text: str, extraction: Extraction, tag: str = "answer") -> str | None:
    """The answer in a text without its thinking part; None if it has none. Not for "pattern"."""
    if extraction == "last_number":
        return last_number(text)
    if extraction == "boxed":
        return boxed(text)
    if extraction == "tag":
        return tagged(text, tag)
    return text.strip() or None


def reference(prompt: Prompt, field: str) -> Any:
    """A field of a prompt.

    Raises:
        ValueError: If it is not there.
    """
    value = prompt.data.get(field)
    if value is None:
        have = ", ".join(sorted(prompt.data)) or "no fields"
        raise ValueError(f"prompt {prompt.index} of source {prompt.source!r} has no {field!r} in its data ({have})")
    return value


class AnswerJudge(Judge):
    """1 if the answer equals the reference, else 0.

    Args:
        extraction: Where the answer is; see above.
        field: Of the prompt's data: the reference, or a list of answers that are all right.
        tag: Name of the tag.
        pattern: Regular expression with one group, for extraction = "pattern"; it runs in a worker process, since a
            pattern may take for ever.
        ignore_case: Whether texts are equal whatever the case of their letters.

    Raises:
        ValueError: If an option is unknown, or the pattern is missing, not wanted, or has not one group.
    """

    score_range = (0.0, 1.0)

    def __init__(
        self,
        extraction: Extraction = "last_number",
        field: str = "answer",
        tag: str = "answer",
        pattern: str | None = None,
        ignore_case: bool = False,
    ) -> None:
        if extraction not in get_args(Extraction):
            raise ValueError(f"extraction = {extraction!r} is unknown: choose one of {', '.join(get_args(Extraction))}")
        if (extraction == "pattern") != (pattern is not None):
            raise ValueError(
                f"extraction = {extraction!r} with pattern = {pattern!r}: a pattern is for 'pattern' alone"
            )
        self.extraction, self.field, self.tag, self.ignore_case = extraction, field, tag, ignore_case
        self.pattern = None if pattern is None else compiled(pattern)
        if self.pattern is not None and self.pattern.groups != 1:
            raise ValueError(f"pattern = {pattern!r} must have one group, it has {self.pattern.groups}")
        self.quick = pattern is None

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        wanted = reference(prompt, self.field)
        accepted = wanted if isinstance(wanted, list | tuple) else [wanted]
        answer = self._answer(after_thinking(text))
        right = answer is not None and any(self._equal(str(one).strip(), answer) for one in accepted)
        return Judgement(float(right), right)

    def _answer(self, text: str) -> str | None:
        if self.pattern is None:
            return extract(text, self.extraction, self.tag)
        found = self.pattern.findall(text)
        return found[-1].strip() if found else None

    def _equal(self, wanted: str, answer: str) -> bool:
        if self.ignore_case:
            wanted, answer = wanted.casefold(), answer.casefold()
        if wanted == answer:
            return True
        value = None if self.extraction == "exact" else number(wanted)
        return value is not None and value == number(answer)


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; `.` also matches line breaks.

    Raises:
        ValueError: If it is none.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r}: {error}") from None
