"""Conversations about images, videos and signals, one per line of a JSONL file, in the common `messages` form.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a/b.png"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

Media are files below one folder, by default that of the JSONL file. Nothing is fetched, and no file elsewhere is read:
a data set from a stranger cannot look at the disk. Whatever is wrong is an error that names file, line and field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lit_interns1.data.bundled_conversations import BUNDLED_CONVERSATIONS, bundled_key, bundled_record, bundled_size
from lit_interns1.data.sources import SourceError

ROLES = ("system", "user", "assistant")
_FIELDS = {
    "text": {"text"},
    "image": {"image"},
    "video": {"video", "fps"},
    "time_series": {"time_series", "sampling_rate"},
}
"""Kinds of content, and the fields that each may have beside `type`."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?://|.*[,;])")


class Part(NamedTuple):
    """A piece of a message.

    Attributes:
        kind: text, image, video or time_series.
        value: The text; or a path, an array, or a list of them.
        rate: Frames per second of a video, Hz of a signal; None = not said.
        field: Where it stands, for messages.
    """

    kind: str
    value: Any
    rate: float | None
    field: str


class Message(NamedTuple):
    """A turn.

    Attributes:
        role: Whose.
        parts: Its content in order.
    """

    role: str
    parts: tuple[Part, ...]


class Conversation(NamedTuple):
    """Turns in order.

    Attributes:
        messages: The turns.
        where: File and line, for messages.
    """

    messages: tuple[Message, ...]
    where: str

    @property
    def media(self) -> Iterator[Part]:
        """Parts that are no text, in order."""
        return (part for message in self.messages for part in message.parts if part.kind != "text")


def parse_conversation(row: Any, folder: Path | None, where: str, answered: bool = True) -> Conversation:
    """A conversation from its JSON form.

    Args:
        row: The object.
        folder: The only folder in which media may lie, and to which their paths are relative; None: no files, the
            values are taken as they are.
        where: File and line, for messages.
        answered: Whether there must be something to learn: an answer of the assistant.

    Raises:
        SourceError: If it has not the form, or a path leads elsewhere.
    """
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise SourceError(f"{where}: expected an object with a list `messages` of at least one message")
    parsed = parse_messages(messages, folder, where, "messages")
    if answered and not any(message.role == "assistant" for message in parsed):
        raise SourceError(f"{where}: no message has the role assistant: there is nothing to learn")
    return Conversation(parsed, where)


def parse_messages(messages: list[Any], folder: Path | None, where: str, field: str) -> tuple[Message, ...]:
    """Turns from their JSON form; arguments and errors as `parse_conversation`.

    Args:
        messages: The list.
        folder: The only folder in which media may lie.
        where: File and line.
        field: Name of the list, for messages.
    """
    return tuple(_message(entry, folder, where, f"{field}[{index}]") for index, entry in enumerate(messages))


def _message(entry: Any, folder: Path | None, where: str, field: str) -> Message:
    if not isinstance(entry, Mapping) or set(entry) != {"role", "content"}:
        found = ", ".join(sorted(entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise SourceError(f"{where}, {field}: a message has `role` and `content`, got {found}")
    role, content = entry["role"], entry["content"]
    if role not in ROLES:
        raise SourceError(f"{where}, {field}.role: {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise SourceError(f"{where}, {field}.content: expected a text or a list of parts")
    parts = [_part(part, folder, where, f"{field}.content[{index}]") for index, part in enumerate(content)]
    if role == "assistant" and any(part.kind != "text" for part in parts):
        raise SourceError(f"{where}, {field}.content: answers are text; the assistant cannot give media")
    if role == "assistant" and not any(part.value for part in parts):
        raise SourceError(f"{where}, {field}.content: the answer is empty")
    return Message(role, tuple(parts))


def _part(part: Any, folder: Path | None, where: str, field: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _FIELDS:
        raise SourceError(f"{where}, {field}.type: {kind!r} is none of {', '.join(_FIELDS)}")
    if unknown := set(part) - _FIELDS[kind] - {"type"}:
        raise SourceError(
            f"{where}, {field}: a part of the type {kind} has no {', '.join(sorted(map(repr, unknown)))}; it may have "
            f"{', '.join(sorted(_FIELDS[kind]))}"
        )
    value = part.get(kind)
    if value is None:
        raise SourceError(f"{where}, {field}: the field `{kind}` is missing")
    rate = part.get("fps" if kind == "video" else "sampling_rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < np.inf):
        raise SourceError(f"{where}, {field}: fps and sampling_rate are positive numbers, got {rate!r}")
    if kind == "text":
        if not isinstance(value, str):
            raise SourceError(f"{where}, {field}.text: expected a string, got {type(value).__name__}")
        return Part(kind, value, None, field)
    if folder is not None:
        value = _inside(value, folder, where, f"{field}.{kind}", several=kind == "video")
    return Part(kind, value, None if rate is None else float(rate), field)


def _inside(value: Any, folder: Path, where: str, field: str, several: bool) -> Any:
    """The file that a path names, if it lies in the folder."""
    if several and isinstance(value, list):
        if not value:
            raise SourceError(f"{where}, {field}: the list of frames is empty")
        return [_inside(entry, folder, where, f"{field}[{i}]", several=False) for i, entry in enumerate(value)]
    if not isinstance(value, str) or not value:
        raise SourceError(f"{where}, {field}: expected the path of a file, got {str(value)[:80]!r}")
    if _ADDRESS.match(value):
        raise SourceError(f"{where}, {field}: {value[:80]!r} is an address; nothing is fetched, give a local file")
    root = folder.resolve()
    path = (root / value).resolve()
    if not path.is_relative_to(root):
        raise SourceError(
            f"{where}, {field}: {value[:200]!r} leads out of {root}; set media_root to the folder that holds all media"
        )
    if not path.exists():
        raise SourceError(f"{where}, {field}: {value[:200]!r} is not in {root}")
    return str(path)


@dataclass(frozen=True)
class ConversationSource:
    """One named source of conversations.

    Attributes:
        path: A `.jsonl` file, or a bundled set: `bundled:digits/train`, `bundled:digits/test`, the same of `vowels`,
            `digit-pairs`, `science-pictures`, `molecule-questions` and `chain-sum`.
        weight: Share of the training rows; as for `TextSource`.
        name: Name in metrics; by default made of the path.
        media_root: The folder in which all media lie and to which their paths are relative; by default that of the
            file.

    Raises:
        SourceError: For an empty path, an unknown bundled set, another kind of file, or a weight that is not positive.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    media_root: str | None = None

    def __post_init__(self) -> None:
        if self.path.startswith("bundled:"):
            if self.path not in BUNDLED_CONVERSATIONS:
                known = ", ".join(BUNDLED_CONVERSATIONS)
                raise SourceError(f"ConversationSource: path={self.path!r} is not bundled; there are {known}")
        elif not self.path.lower().endswith(".jsonl"):
            raise SourceError(f"ConversationSource: path={self.path!r} must end in .jsonl (not compressed)")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise SourceError(f"ConversationSource {self.path!r}: weight must be positive, got {self.weight}")

    @property
    def display_name(self) -> str:
        """`name`, else the name of the file or set."""
        if self.path.startswith("bundled:"):
            return self.name or self.path.removeprefix("bundled:").replace("/", "-")
        return self.name or Path(self.path).stem

    def open(self) -> Conversations:
        """The conversations, by number.

        Raises:
            SourceError: If there is no such file, or it is empty.
        """
        if self.path.startswith("bundled:"):
            return BundledConversations(self.path)
        return JsonLines(Path(self.path).expanduser(), None if self.media_root is None else Path(self.media_root))


class Conversations(Protocol):
    """Conversations that can be read in any order."""

    key: str
    """Hash of what is in them, media left out."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Conversation:
        """One of them."""
        ...


class BundledConversations:
    """A set that comes with the package.

    Args:
        path: Its name.
    """

    def __init__(self, path: str) -> None:
        self.path, self.key = path, bundled_key(path)

    def __len__(self) -> int:
        return bundled_size(self.path)

    def read(self, index: int) -> Conversation:
        """One of them."""
        return parse_conversation(bundled_record(self.path, index), None, f"{self.path}, number {index}")


class JsonLines:
    """A JSONL file; only the place of each line is kept.

    Args:
        path: The file.
        media_root: The folder that holds all media; None = that of the file.

    Raises:
        SourceError: If there is no such file or folder, or there is no line in it.
    """

    def __init__(self, path: Path, media_root: Path | None = None) -> None:
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        self.path, self.folder = path, media_root or path.parent
        if not self.folder.is_dir():
            raise SourceError(f"media_root={str(self.folder)!r}: no such folder")
        digest = hashlib.blake2b(digest_size=16)
        offsets, numbers, offset = [], [], 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                digest.update(line)
                if not line.isspace():
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        if not offsets:
            raise SourceError(f"{path}: the file has no line")
        self._offsets, self._numbers = np.array(offsets), np.array(numbers)
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Conversation:
        """One of them, from the file."""
        row, where = self.record(index)
        return parse_conversation(row, self.folder, where)

    def record(self, index: int) -> tuple[Any, str]:
        """What a line holds, and where it is.

        Raises:
            SourceError: If it is not JSON.
        """
        where = f"{self.path}, line {int(self._numbers[index])}"
        with self.path.open("rb") as stream:
            stream.seek(int(self._offsets[index]))
            line = stream.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise SourceError(f"{where}: not valid JSON in UTF-8 ({error})") from None
        return row, where
