"""The tokens that stand for images, video and signals in a conversation, and those that mark its turns (ChatML).

    <|im_start|>role ⏎ … <|im_end|> ⏎         a turn
    <|vision_start|> <|image_pad|> × n <|vision_end|>         an image of n vectors

(The Qwen and Intern families; names of Intern-S1-Pro and of Intern-S1 below.) A tokenizer without them gets them behind
its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import tokenizers

from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError


@dataclass(frozen=True)
class MediaTokens:
    """Names of tokens.

    Attributes:
        turn_start: Begins a turn; the role and a new line follow.
        turn_end: Ends a turn.
        image_start: In front of an image.
        image: Placeholder of one vector of an image.
        image_end: Behind an image.
        video: Placeholder of one vector of a video, between `image_start` and `image_end`; None: a video is a series of
            images.
        time_series_start: In front of a signal.
        time_series: Placeholder of one vector of a signal.
        time_series_end: Behind a signal.
    """

    turn_start: str = "<|im_start|>"
    turn_end: str = "<|im_end|>"
    image_start: str = "<|vision_start|>"
    image: str = "<|image_pad|>"
    image_end: str = "<|vision_end|>"
    video: str | None = "<|video_pad|>"
    time_series_start: str = "<|ts|>"
    time_series: str = "<TS_CONTEXT>"
    time_series_end: str = "<|/ts|>"

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"MediaTokens: names must differ, got {', '.join(self.names)}")

    @property
    def names(self) -> list[str]:
        """All of them."""
        values = (getattr(self, entry.name) for entry in fields(self))
        return [name for name in values if name is not None]

    @property
    def placeholders(self) -> dict[str, str]:
        """Placeholder by kind of media."""
        found = {"image": self.image, "video": self.video, "time_series": self.time_series}
        return {kind: name for kind, name in found.items() if name is not None}

    def around(self, kind: str) -> tuple[str, str]:
        """The tokens in front of and behind media of a kind."""
        if kind == "time_series":
            return self.time_series_start, self.time_series_end
        return self.image_start, self.image_end

    def in_text(self, text: str) -> str | None:
        """The first of the tokens that is written out in a text; None if there is none."""
        return next((name for name in self.names if name in text), None)

    def of_model(self, tokenizer: TextTokenizer, token_ids: Mapping[str, int]) -> bool:
        """Whether the placeholders that the tokenizer has are those of a model, which `token_ids` gives by kind."""
        return all(
            tokenizer.tokenizer.token_to_id(self.placeholders.get(kind, "")) == index
            for kind, index in token_ids.items()
            if kind != "video" or self.video is not None
        )


PRO_TOKENS = MediaTokens()
"""Intern-S1-Pro."""
S1_TOKENS = MediaTokens(image_start="<img>", image="<IMG_CONTEXT>", image_end="</img>", video=None)
"""Intern-S1 and Intern-S1-mini."""
STYLES = {"pro": PRO_TOKENS, "s1": S1_TOKENS}


def tokens_of_style(style: str | MediaTokens) -> MediaTokens:
    """The tokens of a style by name.

    Raises:
        ValueError: If the style is unknown.
    """
    if isinstance(style, MediaTokens):
        return style
    if style not in STYLES:
        raise ValueError(f"media_tokens={style!r} is unknown: choose one of {', '.join(STYLES)}")
    return STYLES[style]


def with_media_tokens(tokenizer: TextTokenizer, tokens: MediaTokens, turns_only: bool = False) -> TextTokenizer:
    """The tokenizer with all tokens: itself if it has them, else a copy with the missing ones behind its vocabulary.

    They stand there in the order of `MediaTokens`.

    Args:
        tokenizer: The tokenizer.
        tokens: What it shall have.
        turns_only: Add only those that mark turns.

    Raises:
        TokenizerError: If some are missing in a tokenizer whose ids do not end with those of the wrapped one.
    """
    wanted = [tokens.turn_start, tokens.turn_end] if turns_only else tokens.names
    missing = [name for name in wanted if tokenizer.tokenizer.token_to_id(name) is None]
    if not missing:
        return tokenizer
    if type(tokenizer) is not TextTokenizer:
        raise TokenizerError(
            f"the {type(tokenizer).__name__} lacks the tokens {', '.join(missing)}, and its ids of other vocabularies "
            "leave no room behind them: add the tokens to its base"
        )
    extended = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    extended.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in missing])
    return TextTokenizer(extended, None, tokenizer.end_of_text, "tokenizer with media tokens")


def token_id(tokenizer: TextTokenizer, name: str) -> int:
    """The id of a token that the tokenizer has."""
    found: Any = tokenizer.tokenizer.token_to_id(name)
    if found is None:
        raise TokenizerError(f"the tokenizer has no token {name!r}")
    return int(found)
