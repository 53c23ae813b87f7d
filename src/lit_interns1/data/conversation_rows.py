"""Conversations as tokens, and the reader that makes batches of them with their media.

    ids     <|im_start|> role ⏎ text and placeholders <|im_end|> ⏎  …
    labels  the answers of the assistant and the token that ends them; nothing else

Tokens are made once, with the number of placeholders taken from the headers of the files, and kept in the cache. Pixels
and points are read when a row is read, and must give as many vectors as was announced.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_interns1.data.conversation_media import ImageTransform, Item, Span, Visuals, read_signal, signal_spans
from lit_interns1.data.conversations import Conversation, Conversations, Part
from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.images import open_image
from lit_interns1.data.media.signals import TimeSeriesProcessor
from lit_interns1.data.media_tokens import MediaTokens, token_id
from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.packing import IntArray, PackingPlan, assemble, lay_out
from lit_interns1.data.rows import PAD_VALUES
from lit_interns1.data.sources import SourceError
from lit_interns1.data.tokenizer import TextTokenizer
from lit_interns1.nn.media import MediaItems

FORMAT = 1


class Rendered(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: (n,) token ids.
        answers: (n,) bool, which of them are to be predicted.
    """

    ids: list[int]
    answers: list[bool]


@dataclass
class ConversationFormat:
    """How conversations become tokens and items.

    Attributes:
        tokenizer: Has all of `tokens`.
        tokens: Names of the tokens for turns and media.
        visuals: Images and videos; None = they are refused.
        signals: Signals; None = they are refused.
        transform: A random change of training images; None = none.
        seed: Seed of `transform`.
    """

    tokenizer: TextTokenizer
    tokens: MediaTokens
    visuals: Visuals | None
    signals: TimeSeriesProcessor | None
    transform: ImageTransform | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._encode = lru_cache(maxsize=4096)(self.tokenizer.encode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def key(self) -> str:
        """What determines tokens, as text."""
        return f"{FORMAT} {self.tokenizer.fingerprint} {self.tokens} {self.visuals} {self.signals}"

    # tokens

    def spans(self, part: Part, where: str) -> tuple[str, list[Span]]:
        """The kind of items that a part becomes, and where their placeholders stand; only headers are read.

        Raises:
            MediaError: If it cannot be opened; the message names file, line and field.
        """
        try:
            if part.kind == "time_series":
                return "time_series", signal_spans(part.value, part.rate, self._signals())
            if part.kind == "image":
                return "image", self._visuals().measure_image(part.value)
            return self._visuals().video_kind, self._visuals().video_spans(part.value, part.rate)
        except MediaError as error:
            raise MediaError(f"{where}, {part.field}: {error}") from error

    def render(self, conversation: Conversation, prompt: bool = False) -> Rendered:
        """The tokens of a conversation.

        Args:
            conversation: What is rendered.
            prompt: Ends with the beginning of an answer, for generation.

        Raises:
            SourceError: If a text holds one of the tokens for turns and media.
            MediaError: As `spans`.
        """
        ids: list[int] = []
        answers: list[bool] = []

        def add(more: Sequence[int], answer: bool = False) -> None:
            ids.extend(more)
            answers.extend([answer] * len(more))

        start, end = (token_id(self.tokenizer, name) for name in (self.tokens.turn_start, self.tokens.turn_end))
        for message in conversation.messages:
            is_answer = message.role == "assistant"
            add([start])
            text = f"{message.role}\n"
            if is_answer:  # apart from the answer, as when one is generated
                add(self._encode(text))
                text = ""
            for part in message.parts:
                if part.kind == "text":
                    if name := self.tokens.in_text(part.value):
                        raise SourceError(
                            f"{conversation.where}, {part.field}: the text holds {name!r}, which stands for turns or "
                            "media; take it out"
                        )
                    text += part.value
                    continue
                kind, spans = self.spans(part, conversation.where)
                before, behind = (token_id(self.tokenizer, name) for name in self.tokens.around(kind))
                placeholder = token_id(self.tokenizer, self.tokens.placeholders[kind])
                for span in spans:
                    add(self._encode(text + span.text))
                    add([before, *[placeholder] * span.vectors, behind])
                    text = ""
            add(self._encode(text), is_answer)
            add([end], is_answer)
            add(self._encode("\n"))
        if prompt:
            add([start, *self._encode("assistant\n")])
        return Rendered(ids, answers)

    # media

    def items(self, conversation: Conversation, random: np.random.Generator | None = None) -> list[tuple[str, Item]]:
        """The media of a conversation in order, by kind.

        Args:
            conversation: Whose.
            random: For `transform`; None = images stay as they are.

        Raises:
            MediaError: If something cannot be read; the message names file, line and field.
        """
        found: list[tuple[str, Item]] = []
        for part in conversation.media:
            kind = self._visuals().video_kind if part.kind == "video" else part.kind
            try:
                if kind == "time_series":
                    items = [read_signal(part.value, part.rate, self._signals())]
                elif part.kind == "image":
                    items = [self._visuals().read_image(self._picture(part.value, random))]
                else:
                    items = self._visuals().read_video(part.value, part.rate)
            except MediaError as error:
                raise MediaError(f"{conversation.where}, {part.field}: {error}") from error
            found += [(kind, item) for item in items]
        return found

    def _picture(self, source: Any, random: np.random.Generator | None) -> Any:
        picture = open_image(source, self._visuals().image_options)
        if self.transform is None or random is None:
            return picture
        changed = self.transform(picture, random)
        if changed.size != picture.size:
            raise MediaError(f"{type(self.transform).__name__} changes the size of the image")
        return changed

    def _visuals(self) -> Visuals:
        if self.visuals is None:
            raise MediaError("there are no `visuals` to read images and videos with")
        return self.visuals

    def _signals(self) -> TimeSeriesProcessor:
        if self.signals is None:
            raise MediaError("there is no `signals` to read time series with")
        return self.signals


class ConversationStore(NamedTuple):
    """The tokens of a source.

    Attributes:
        tokens_N: (N,) int32, all conversations.
        answers_N: (N,) bool, tokens to be predicted.
        end_D: (D,) end of each conversation in the flat tokens.
        media_D: (D,) int32, how many placeholders each has.
        kinds: Kinds of items that there are.
    """

    tokens_N: NDArray[np.int32]
    answers_N: NDArray[np.bool_]
    end_D: IntArray
    media_D: NDArray[np.int32]
    kinds: tuple[str, ...]

    def document(self, index: int) -> tuple[IntArray, IntArray]:
        """(n,) ids and labels of a conversation."""
        span = slice(int(self.end_D[index - 1]) if index else 0, int(self.end_D[index]))
        ids = self.tokens_N[span].astype(np.int64)
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        labels[:-1] = np.where(self.answers_N[span][1:], ids[1:], IGNORED_LABEL)
        return ids, labels

    def content_hash(self) -> str:
        """Hash of all tokens and ends."""
        digest = hashlib.blake2b(self.tokens_N.tobytes(), digest_size=16)
        digest.update(self.answers_N.tobytes() + self.end_D.tobytes())
        return digest.hexdigest()


def build_store(
    conversations: Conversations, form: ConversationFormat, cache_dir: Path, read_media: bool = False
) -> ConversationStore:
    """The tokens of all conversations, from the cache if they and the files they name are unchanged.

    Args:
        conversations: What to render.
        form: How.
        cache_dir: Where tokens are kept.
        read_media: Also read all pixels and points, once, so that whatever is damaged is found now.

    Raises:
        SourceError: If a conversation has not the right form.
        MediaError: If media cannot be opened.
    """
    digest = hashlib.blake2b(f"{conversations.key} {form.key()} {read_media}".encode(), digest_size=12)
    parsed = [conversations.read(index) for index in range(len(conversations))]
    for conversation in parsed:
        for part in conversation.media:
            digest.update(f"{part.kind} {part.rate} {_state_of(part.value)}".encode())
    path = cache_dir.expanduser() / f"conversations-{digest.hexdigest()}.npz"
    if not path.is_file():
        _write(path, _render_all(parsed, form, read_media))
    with np.load(path, allow_pickle=False) as arrays:
        return ConversationStore(
            arrays["tokens"], arrays["answers"], arrays["ends"], arrays["media"], tuple(arrays["kinds"].tolist())
        )


def _state_of(value: Any) -> str:
    """What tells whether a file has changed."""
    if isinstance(value, list):
        return " ".join(_state_of(entry) for entry in value)
    if not isinstance(value, str):
        return ""  # part of the package
    path = Path(value)
    if path.is_dir():
        return f"{value} {' '.join(_state_of(str(entry)) for entry in sorted(path.iterdir()) if entry.is_file())}"
    status = path.stat()
    return f"{value} {status.st_size} {status.st_mtime_ns}"


def _render_all(parsed: list[Conversation], form: ConversationFormat, read_media: bool) -> dict[str, NDArray[Any]]:
    tokens: list[NDArray[np.int32]] = []
    answers: list[NDArray[np.bool_]] = []
    media: list[int] = []
    kinds: set[str] = set()
    placeholders = {token_id(form.tokenizer, name): kind for kind, name in form.tokens.placeholders.items()}
    ids = np.array(sorted(placeholders))
    for conversation in parsed:
        rendered = form.render(conversation)
        tokens.append(np.array(rendered.ids, dtype=np.int32))
        answers.append(np.array(rendered.answers, dtype=bool))
        present = np.isin(tokens[-1], ids)
        media.append(int(present.sum()))
        if read_media:
            check_count(conversation, form.items(conversation), media[-1])
        kinds |= {placeholders[int(token)] for token in np.unique(tokens[-1][present])}
    return {
        "tokens": np.concatenate(tokens),
        "answers": np.concatenate(answers),
        "ends": np.cumsum([len(part) for part in tokens]).astype(np.int64),
        "media": np.array(media, dtype=np.int32),
        "kinds": np.array(sorted(kinds), dtype=np.str_),
    }


def check_count(conversation: Conversation, items: list[tuple[str, Item]], placeholders: int) -> None:
    """Raises MediaError if the media of a conversation do not give as many vectors as it has placeholders."""
    count = sum(item.vectors for _, item in items)
    if count != placeholders:
        raise MediaError(
            f"{conversation.where}: its media give {count} vectors, but their headers announced {placeholders}: a file "
            "is not what its header says, or has changed since"
        )


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".building-", suffix=".npz", dir=path.parent)
    except OSError as error:
        raise SourceError(f"cache_dir={str(path.parent)!r} cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)  # of two that build the same, the second replaces equal content
    finally:
        Path(temporary).unlink(missing_ok=True)


@dataclass
class ConversationRows:
    """The rows that the conversations of one source fill.

    Attributes:
        conversations: The source, for the media.
        store: Its tokens.
        document_D: (D,) which conversations, in packing order.
        plan: How they lie in rows; its documents are indices into `document_D`.
    """

    conversations: Conversations
    store: ConversationStore
    document_D: IntArray
    plan: PackingPlan

    def documents(self, row: int) -> list[int]:
        """The conversations of a row."""
        span = slice(int(self.plan.first_piece_R[row]), int(self.plan.first_piece_R[row + 1]))
        return self.document_D[self.plan.piece_document_P[span]].tolist()


class ConversationReader:
    """Makes batches of rows of several sources.

    Args:
        sources: The rows of each source.
        form: How media are read.
        row_length: L, tokens per row.
    """

    def __init__(self, sources: Sequence[ConversationRows], form: ConversationFormat, row_length: int) -> None:
        self.sources, self.form, self.row_length = list(sources), form, row_length

    def read(
        self, rows: Sequence[tuple[int, int]], num_rows: int | None = None, first: int | None = None
    ) -> PackedBatch:
        """A batch of rows; see `loader.ReadsRows`. Random changes depend on the seed, the number of the row in the
        global order, and the place of the conversation in it."""
        num_rows = len(rows) if num_rows is None else num_rows
        columns: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ("input_ids", "labels", "source_id")}
        lengths: list[int] = []
        piece_rows: list[int] = []
        media: dict[str, list[tuple[Item, int]]] = {}
        for position, (index, row) in enumerate(rows):
            source = self.sources[index]
            for place, document in enumerate(source.documents(row)):
                ids, labels = source.store.document(document)
                columns["input_ids"].append(ids)
                columns["labels"].append(labels)
                columns["source_id"].append(np.full(len(ids), index, dtype=np.int64))
                lengths.append(len(ids))
                piece_rows.append(position)
                if source.store.media_D[document]:
                    random = (
                        None
                        if first is None
                        else np.random.default_rng([self.form.seed % 2**64, first + position, place])
                    )
                    self._add_media(media, source, document, position, random)
        empty = np.zeros(0, dtype=np.int64)
        layout = lay_out(
            np.array(lengths, dtype=np.int64), np.array(piece_rows, dtype=np.int64), num_rows, self.row_length
        )
        tensors = {name: torch.from_numpy(np.concatenate([empty, *parts])) for name, parts in columns.items()}
        batch = assemble(tensors, layout, PAD_VALUES)
        batch.media = {
            kind: MediaItems.of(
                [item.values for item, _ in found], [item.facts for item, _ in found], [row for _, row in found]
            )
            for kind, found in media.items()
        }
        return batch

    def _add_media(
        self, media: dict[str, list[tuple[Item, int]]], source: ConversationRows, document: int, row: int,
        random: np.random.Generator | None,
    ) -> None:  # fmt: skip
        conversation = source.conversations.read(document)
        items = self.form.items(conversation, random)
        check_count(conversation, items, int(source.store.media_D[document]))
        for kind, item in items:
            media.setdefault(kind, []).append((item, row))
