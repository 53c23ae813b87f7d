"""Responses to be scored by a model, as tokens, with the part that counts: what the model would learn to say.

    {"prompt": …, "response": …}     plain text    the response, and the end of text behind it
                                     a list of messages as prompt, or `chat`    the answer, and the token that ends it
    {"messages": [ … ]}              a conversation    every answer of the assistant, and the tokens that end them
    {"text": …}, or plain text       a document    everything but its first token, which has nothing before it

A JSONL file, a file of plain text whose lines are documents, or a bundled source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_interns1.data.bundled_conversations import BUNDLED_CONVERSATIONS, bundled_record, bundled_size
from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.conversations import parse_conversation
from lit_interns1.data.media_tokens import PRO_TOKENS, token_id
from lit_interns1.data.packed_batch import IGNORED_LABEL
from lit_interns1.data.sources import SourceError, TextSource, json_objects
from lit_interns1.data.tokenizer import TextTokenizer

Overlong = Literal["error", "skip", "cut"]


class ResponseRow(NamedTuple):
    """A row of a file.

    Attributes:
        path: The file or source.
        number: Number of the line or document, from 1.
        line: The row as it stands there, without the end of the line.
        fields: What it says.
    """

    path: str
    number: int
    line: str
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, line {self.number}"


class Response(NamedTuple):
    """A response behind what comes before it, as tokens.

    Attributes:
        row: Where it comes from.
        ids_N: (N,) int32 token ids.
        counts_N: (N,) bool, the tokens of the response.
    """

    row: ResponseRow
    ids_N: NDArray[np.int32]
    counts_N: NDArray[np.bool_]

    def document(self) -> dict[str, Tensor]:
        """The response as a document of a packed batch: `input_ids`, and `labels` that are −100 outside of it."""
        ids = torch.from_numpy(self.ids_N).long()
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[:-1] = torch.where(torch.from_numpy(self.counts_N[1:]), ids[1:], IGNORED_LABEL)
        return {"input_ids": ids, "labels": labels}


def read_rows(path: str, limit: int | None = None) -> Iterator[ResponseRow]:
    """The rows of a source in order.

    Args:
        path: A `.jsonl` file, `bundled:` source or set, or whatever `TextSource` reads.
        limit: At most so many.

    Raises:
        SourceError: If it cannot be read, or has no row.
    """
    empty = True
    for row in islice(_rows(path), limit):
        empty = False
        yield row
    if empty:
        raise SourceError(f"{path}: there is no row")


def _rows(path: str) -> Iterator[ResponseRow]:
    if path in BUNDLED_CONVERSATIONS:
        for index in range(bundled_size(path)):
            record = bundled_record(path, index)
            if not isinstance(record["messages"][0]["content"], str):
                raise SourceError(f"{path}: its questions are about images or signals; only texts are scored")
            yield ResponseRow(path, index + 1, json.dumps(record, ensure_ascii=False), record)
    elif path.lower().endswith((".jsonl", ".jsonl.gz")):
        for number, line, fields in json_objects(Path(path).expanduser()):
            yield ResponseRow(path, number, line.rstrip("\n"), fields)
    else:
        source = TextSource(path, lines=not path.startswith("bundled:"))
        for number, text in enumerate(source.documents(), start=1):
            yield ResponseRow(path, number, json.dumps({"text": text}, ensure_ascii=False), {"text": text})


class ResponseEncoder:
    """Makes tokens of rows.

    Args:
        tokenizer: The model's. Conversations need its tokens for turns (ChatML).
        chat: A prompt that is a text is the turn of a user, and the response the answer to it.
        max_length: Most tokens of a row.
        overlong: What becomes of longer ones: an error, left out, or cut at the end.
        count_end: Whether the token that ends a response counts; not for responses that stopped at a limit.

    Raises:
        ValueError: If `max_length` is below 2.
    """

    def __init__(
        self, tokenizer: TextTokenizer, chat: bool = False, max_length: int = 4096, overlong: Overlong = "error",
        count_end: bool = True,
    ) -> None:  # fmt: skip
        if max_length < 2:
            raise ValueError(f"max_length = {max_length} must be at least 2")
        self.tokenizer, self.chat, self.max_length, self.overlong = tokenizer, chat, max_length, overlong
        self.count_end = count_end
        self._form = ConversationFormat(tokenizer, PRO_TOKENS, None, None)

    def encode(self, row: ResponseRow) -> Response | None:
        """The tokens of a row; None if it is too long and left out.

        Raises:
            SourceError: If the row has not one of the forms, has no response, or is too long.
        """
        ids, counts = self._tokens(row)
        counts[0] = False  # nothing comes before it
        if len(ids) > self.max_length:
            if self.overlong == "skip":
                return None
            if self.overlong == "error":
                raise SourceError(
                    f"{row.where}: {len(ids):,} tokens; max_length = {self.max_length:,}: raise it, or set overlong to "
                    "skip or cut"
                )
            ids, counts = ids[: self.max_length], counts[: self.max_length]
        if not any(counts):
            raise SourceError(f"{row.where}: no token of the response is within max_length = {self.max_length:,}")
        return Response(row, np.array(ids, dtype=np.int32), np.array(counts, dtype=bool))

    def _tokens(self, row: ResponseRow) -> tuple[list[int], list[bool]]:
        fields, where = row.fields, row.where
        forms = [name for name in ("messages", "response", "text") if name in fields]
        if len(forms) != 1 or ("prompt" in fields) != (forms == ["response"]):
            raise SourceError(
                f"{where}: expected `prompt` and `response`, or `messages`, or `text`; got "
                f"{', '.join(sorted(fields)) or 'no field'}"
            )
        if forms == ["messages"]:
            return self._conversation(fields["messages"], where)
        prompt, response = fields.get("prompt", ""), fields[forms[0]]
        if not isinstance(response, str) or not response:
            raise SourceError(f"{where}, {forms[0]}: expected a text that is not empty, got {response!r:.80}")
        if isinstance(prompt, list) or (self.chat and forms == ["response"]):
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            return self._conversation([*turns, {"role": "assistant", "content": response}], where, last_only=True)
        if not isinstance(prompt, str):
            raise SourceError(f"{where}, prompt: expected a text or a list of messages, got {type(prompt).__name__}")
        before, behind = self.tokenizer.encode(prompt), self.tokenizer.encode(response)
        behind.append(self.tokenizer.end_of_text_id)
        return before + behind, [False] * len(before) + [True] * (len(behind) - 1) + [self.count_end]

    def _conversation(self, messages: Any, where: str, last_only: bool = False) -> tuple[list[int], list[bool]]:
        conversation = parse_conversation({"messages": messages}, None, where)
        if media := next(conversation.media, None):
            raise SourceError(f"{where}, {media.field}: only texts are scored, this is of the type {media.kind}")
        rendered = self._form.render(conversation)
        answers = list(rendered.answers)
        if last_only:  # answers within the prompt are no part of the response
            before = len(self._form.render(conversation._replace(messages=conversation.messages[:-1])).ids)
            answers[:before] = [False] * before
        if not self.count_end:
            end = token_id(self.tokenizer, PRO_TOKENS.turn_end)
            answers = [answer and token != end for answer, token in zip(answers, rendered.ids, strict=True)]
        return list(rendered.ids), answers
