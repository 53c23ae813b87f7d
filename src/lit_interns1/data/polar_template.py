"""What a POLAR reward model reads, as released (arXiv 2507.05197; InternLM/POLAR, `RewardModelClient`).

    P ⏎ REF <|reward|> P ⏎ CAND [UNUSED_TOKEN_130]          the reward is the value at the last token

P prompt, REF reference, CAND candidate: contents of messages, joined by line breaks, without a chat template. The form
"pretrain" has no ⏎ behind P: a trajectory goes on where its prefix ends. What is too long is cut: REF and CAND on the
right to 4,096 tokens, P on the left to (16,380 − |REF| − |CAND|) / 2. Candidates that are compared share one cut of P
(as in XTuner's training data). Unlike the released code, a prompt with no room left is empty: `p[-0:]` is all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_interns1.data.tokenizer import TextTokenizer

Wrapper = Literal["sft", "pretrain"]
Messages = str | Sequence[Mapping[str, Any]]
"""A text, or messages with a `content` each."""

_THINKING = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)


def contents(messages: Messages) -> str:
    """The contents of messages, joined by line breaks; a text as it is.

    Raises:
        ValueError: If a message has no text as its content.
    """
    if isinstance(messages, str):
        return messages
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"POLAR reads messages with a text as `content`, got {message!r:.80}")
    return "\n".join(message["content"] for message in messages)


def without_thinking(text: str) -> str:
    """What stands behind the first `<think>…</think>`, without blanks around it; a text without one as it is."""
    found = _THINKING.search(text)
    return found.group(2).strip() if found else text


@dataclass(frozen=True)
class PolarTemplate:
    """The form of what is read.

    Attributes:
        separator: Between reference and candidate.
        end: The token whose value is the reward; one token of the vocabulary.
        start: A token in front of everything, for tokenizers that have one ("<s>" in the released models).
        wrapper: "sft" puts a line break behind the prompt, "pretrain" does not.
        max_length: Tokens of everything at most; four of them are kept for separator, end and line breaks (more where
            the separator is several tokens).
        max_response_length: Tokens of a reference or candidate at most.

    Raises:
        ValueError: If a name is empty or a limit too low.
    """

    separator: str = "<|reward|>"
    end: str = "[UNUSED_TOKEN_130]"
    start: str | None = None
    wrapper: Wrapper = "sft"
    max_length: int = 16384
    max_response_length: int = 4096

    def __post_init__(self) -> None:
        if not self.separator or not self.end or self.start == "":
            raise ValueError(f"names of tokens must not be empty: separator, end or start of {self}")
        if self.wrapper not in get_args(Wrapper):
            raise ValueError(f"wrapper = {self.wrapper!r} is unknown: choose one of {', '.join(get_args(Wrapper))}")
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length = {self.max_response_length} must be at least 1")
        if self.max_length < 2 * self.max_response_length + 4:
            raise ValueError(
                f"max_length = {self.max_length} must be at least 2 · max_response_length + 4 = "
                f"{2 * self.max_response_length + 4}: a reference and a candidate of the longest kind must fit"
            )


class PolarEncoder:
    """Makes texts, and their ids, for a tokenizer.

    Args:
        tokenizer: Makes ids.
        template: The form.

    Raises:
        ValueError: If `end` or `start` of the template is not one token.
    """

    def __init__(self, tokenizer: TextTokenizer, template: PolarTemplate | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template or PolarTemplate()
        self.end_id = self._single("end", self.template.end)
        self._start = [] if self.template.start is None else [self._single("start", self.template.start)]

        self._reserved = 3 + len(tokenizer.encode(self.template.separator))

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return self.tokenizer.vocab_size

    def _single(self, option: str, name: str) -> int:
        ids = self.tokenizer.encode(name)
        if len(ids) != 1:
            raise ValueError(
                f"{option} = {name!r} of the POLAR template must be one token, but becomes {len(ids)}: name one that "
                "the tokenizer has and texts do not use"
            )
        return ids[0]

    def texts(
        self, prompt: Messages, reference: Messages, candidates: Sequence[Messages], wrapper: Wrapper | None = None
    ) -> list[str]:
        """What is read for each of several candidates, cut to the limits; the prompt is cut alike for all.

        Args:
            prompt: What was asked, or the prefix.
            reference: What is compared with.
            candidates: What is compared.
            wrapper: Instead of the template's.

        Raises:
            ValueError: If messages have no text.
        """
        limit = self.template.max_response_length
        answers = [self._ids(contents(answer))[:limit] for answer in (reference, *candidates)]
        longest = max((len(ids) for ids in answers[1:]), default=0)
        room = max((self.template.max_length - self._reserved - len(answers[0]) - longest) // 2, 0)
        ids = self._ids(contents(prompt))
        behind = "" if (wrapper or self.template.wrapper) == "pretrain" else "\n"
        before = self._text(ids[max(len(ids) - room, 0) :]) + behind
        kept, *others = (before + self._text(ids) for ids in answers)
        return [f"{kept}{self.template.separator}{other}{self.template.end}" for other in others]

    def ids(
        self, prompt: Messages, reference: Messages, candidates: Sequence[Messages], wrapper: Wrapper | None = None
    ) -> list[list[int]]:
        """The ids of `texts`, each with `end` as its last one."""
        texts = self.texts(prompt, reference, candidates, wrapper)
        return [[*self._ids(text.removesuffix(self.template.end)), self.end_id] for text in texts]

    def judged(self, prompt: Messages, reference: Messages, candidate: Messages) -> list[int]:
        """The ids for a candidate that a policy has just written: its thinking part does not count."""
        return self.ids(prompt, reference, [without_thinking(contents(candidate))])[0]

    def _ids(self, text: str) -> list[int]:
        return [*self._start, *self.tokenizer.encode(text)]

    def _text(self, ids: Sequence[int]) -> str:
        """Special tokens are left out, so that a text cannot stand for the end of another."""
        kept = [i for i in ids if i not in (*self._start, self.end_id)]
        return self.tokenizer.decode(kept, skip_special_tokens=True)
