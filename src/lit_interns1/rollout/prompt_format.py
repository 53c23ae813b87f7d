"""From prompts to token ids, and from response ids to text.

plain   template.format(prompt=text)
chat    <|im_start|>user ⏎ text <|im_end|> ⏎ <|im_start|>assistant ⏎      as `ConversationDataModule` trains answers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.conversations import Conversation, parse_messages
from lit_interns1.data.media_tokens import MediaTokens, token_id, tokens_of_style, with_media_tokens
from lit_interns1.data.sources import SourceError
from lit_interns1.data.tokenizer import TextTokenizer, load_tokenizer
from lit_interns1.rollout.prompts import PromptError, RawPrompt
from lit_interns1.rollout.samples import Prompt


class PromptFormat:
    """How prompts become tokens.

    Args:
        tokenizer: Path, folder, `bundled:tokenizer`, or a tokenizer.
        style: "chat": turns of a conversation, ended by the token that ends a turn; "plain": the text in `template`,
            ended by the end of text.
        template: Of plain prompts, with `{prompt}`.
        system: A system message in front of chat prompts that have none.
        media_tokens: Names of the tokens for turns, as for `ConversationDataModule`.
        max_prompt_length: Longest prompt, tokens; a longer one is an error. None = no limit.

    Raises:
        ValueError: If the template has no `{prompt}`, or the style is unknown.
    """

    def __init__(
        self,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        style: Literal["chat", "plain"] = "chat",
        template: str = "{prompt}",
        system: str | None = None,
        media_tokens: str | MediaTokens = "pro",
        max_prompt_length: int | None = None,
    ) -> None:
        if style not in ("chat", "plain"):
            raise ValueError(f"style = {style!r} must be chat or plain")
        if "{prompt}" not in template:
            raise ValueError(f"template = {template!r} must hold {{prompt}}")
        base = tokenizer if isinstance(tokenizer, TextTokenizer) else load_tokenizer(tokenizer)
        self.style, self.template, self.system, self.max_prompt_length = style, template, system, max_prompt_length
        self.tokens = tokens_of_style(media_tokens)
        self.tokenizer = with_media_tokens(base, self.tokens, turns_only=True) if style == "chat" else base
        self._form = ConversationFormat(self.tokenizer, self.tokens, None, None) if style == "chat" else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        ends = [token_id(self.tokenizer, self.tokens.turn_end)] if self.style == "chat" else []
        return (*ends, self.tokenizer.end_of_text_id)

    def prompt(self, raw: RawPrompt, index: int) -> Prompt:
        """The prompt as tokens.

        Raises:
            PromptError: If it has the wrong form or is too long; the message names its number.
        """
        where = f"prompt {index}"
        if self._form is None:
            if not isinstance(raw.content, str):
                raise PromptError(f"{where}: style = 'plain' takes texts, this is a list of messages")
            text = raw.content
            ids = self.tokenizer.encode(self.template.replace("{prompt}", text))
        else:
            messages = self._messages(raw.content)
            try:
                parsed = Conversation(parse_messages(messages, None, where, "messages"), where)
                ids = self._form.render(parsed, prompt=True).ids
            except SourceError as error:
                raise PromptError(str(error)) from None
            text = raw.content if isinstance(raw.content, str) else "\n".join(_texts(raw.content))
        if not ids:
            raise PromptError(f"{where}: it has no token")
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise PromptError(f"{where} has {len(ids)} tokens; max_prompt_length = {self.max_prompt_length}")
        return Prompt(tuple(ids), text, raw.source, dict(raw.data or {}), index)

    def _messages(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(content, str):
            content = [{"role": "user", "content": self.template.replace("{prompt}", content)}]
        has_system = bool(content) and content[0].get("role") == "system"
        return content if self.system is None or has_system else [{"role": "system", "content": self.system}, *content]

    def text(self, ids: Sequence[int]) -> str:
        """A response as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages if isinstance(m.get("content"), str)]
