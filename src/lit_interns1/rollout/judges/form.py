"""How a response is written: its form and its length, whatever it says.

FormatJudge    1 if the response has the wanted form, else 0
LengthJudge    0 … −1 for the last tokens before the limit (DAPO, arXiv 2503.14476, Eq. 13)
"""

from __future__ import annotations

import re
from typing import Literal, get_args

import torch

from lit_interns1.objectives.policy import soft_overlong_penalty
from lit_interns1.rollout.judges.answers import compiled
from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.samples import Prompt, Sample

Form = Literal["think", "think_answer", "pattern"]
_TAG = re.compile(r"</?(?:think|answer)>")


class FormatJudge(Judge):
    """1 if a response has the wanted form, else 0. It says nothing of right and wrong.

    Args:
        form: "think": `<think>…</think>` and then an answer; "think_answer": `<think>…</think><answer>…</answer>` and
            nothing else but blanks; "pattern": a regular expression matches all of the response. With the first two no
            part is empty, and no tag comes twice.
        pattern: The expression; it runs in a worker process, since a pattern may take for ever.
        opened: The prompt ends with `<think>`, so that responses begin behind it.

    Raises:
        ValueError: If the form is unknown, or a pattern is missing or not wanted.
    """

    score_range = (0.0, 1.0)

    def __init__(self, form: Form = "think", pattern: str | None = None, opened: bool = False) -> None:
        if form not in get_args(Form):
            raise ValueError(f"form = {form!r} is unknown: choose one of {', '.join(get_args(Form))}")
        if (form == "pattern") != (pattern is not None):
            raise ValueError(f"form = {form!r} with pattern = {pattern!r}: a pattern is for 'pattern' alone")
        self.form, self.opened = form, opened
        self.pattern = None if pattern is None else compiled(pattern)
        self.quick = pattern is None

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        text = f"<think>{text}" if self.opened else text
        fits = bool(self.pattern.fullmatch(text)) if self.pattern is not None else self._fits(text)
        return Judgement(float(fits))

    def _fits(self, text: str) -> bool:
        tags, parts = _TAG.findall(text), [part.strip() for part in _TAG.split(text)]
        if self.form == "think":
            return tags == ["<think>", "</think>"] and [bool(part) for part in parts] == [False, True, True]
        in_order = tags == ["<think>", "</think>", "<answer>", "</answer>"]
        return in_order and [bool(part) for part in parts] == [False, True, False, True, False]


class LengthJudge(Judge):
    """A penalty for responses that come near to the limit of tokens: `soft_overlong_penalty`.

    Args:
        max_completion_length: L, tokens; as for the data module.
        soft_punish_cache: C, the last so many tokens before L, over which the score falls from 0 to −1.

    Raises:
        ValueError: If C is not within L.
    """

    quick = True
    score_range = (-1.0, 0.0)

    def __init__(self, max_completion_length: int, soft_punish_cache: int) -> None:
        soft_overlong_penalty(torch.zeros(1), max_completion_length, soft_punish_cache)
        self.max_completion_length, self.soft_punish_cache = max_completion_length, soft_punish_cache

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        length = torch.tensor([len(sample.response_ids)])
        return Judgement(float(soft_overlong_penalty(length, self.max_completion_length, self.soft_punish_cache)))
