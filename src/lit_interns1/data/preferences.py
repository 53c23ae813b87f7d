"""Preferences between responses, one per line of a JSONL file.

    {"prompt": …, "chosen": …, "rejected": …}          a pair; also "margin", "weight"
    {"prompt": …, "responses": [best, …, worst]}       a ranking; also "weight"
    {"prompt": …, "response": …, "desirable": true}    a response alone (KTO); also "weight"

Prompts and responses are texts, or lists of messages {"role": …, "content": …}; a text beside lists is the message that
its place suggests. Responses that repeat the messages of the prompt are taken without them. Log-probabilities that a
reference gave to responses may stand beside them: `ref_chosen_logps`, `ref_rejected_logps`, `ref_responses_logps` (a
list) and `ref_response_logps`, each the sum over the tokens of a response, or a list with one number per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lit_interns1.data.bundled_preferences import BUNDLED_PREFERENCES, bundled_preference, bundled_preferences_size
from lit_interns1.data.conversations import JsonLines, Message, parse_messages
from lit_interns1.data.sources import BUNDLED_FOLDER, SourceError

Text = str | tuple[Message, ...]
"""A text, or turns."""
LogProbabilities = float | tuple[float, ...]
"""Of a response: their sum, or one per token."""

_FORMS = {
    "pair": ("chosen", "rejected"),
    "ranking": ("responses",),
    "single": ("response", "desirable"),
}
_EXPECTED = "`prompt` with `chosen` and `rejected`, with `responses`, or with `response` and `desirable`"


class Preference(NamedTuple):
    """What a line says.

    Attributes:
        prompt: What is answered.
        responses: The best first; a response alone is the only one.
        desirable: Whether a response alone is desirable; None for pairs and rankings.
        margin: How much better the chosen response is at least; 0 if nothing is said.
        weight: How much the line counts.
        reference: Log-probabilities of the responses under a reference; None if nothing is said.
        where: File and line, for messages.
    """

    prompt: Text
    responses: tuple[Text, ...]
    desirable: bool | None
    margin: float
    weight: float
    reference: tuple[LogProbabilities, ...] | None
    where: str

    @property
    def has_turns(self) -> bool:
        """Whether it is made of messages."""
        return not isinstance(self.prompt, str)


def parse_preference(row: Any, where: str) -> Preference:
    """A preference from its JSON form.

    Args:
        row: The object.
        where: File and line, for messages.

    Raises:
        SourceError: If it has not the form, a response is empty, or two are equal.
    """
    fields = set(row) if isinstance(row, Mapping) else set()
    forms = [name for name, needed in _FORMS.items() if fields & set(needed)]
    if "prompt" not in fields or len(forms) != 1 or not fields.issuperset(_FORMS[forms[0]]):
        found = ", ".join(sorted(fields)) if isinstance(row, Mapping) else type(row).__name__
        raise SourceError(f"{where}: expected an object with {_EXPECTED}; got {found or 'no field'}")
    form = forms[0]
    if form == "ranking":
        listed = row["responses"]
        if not isinstance(listed, list) or len(listed) < 2:
            raise SourceError(f"{where}, responses: expected a list of two responses or more, the best first")
        named = [(f"responses[{index}]", entry) for index, entry in enumerate(listed)]
    else:
        named = [(name, row[name]) for name in _FORMS[form] if name != "desirable"]
    prompt, responses = _texts(row["prompt"], named, where)
    for index, response in enumerate(responses):
        for earlier, before in enumerate(responses[:index]):
            if _said(response) == _said(before):
                raise SourceError(f"{where}: {named[earlier][0]} and {named[index][0]} are equal: none is better")
    desirable = row["desirable"] if form == "single" else None
    if form == "single" and not isinstance(desirable, bool):
        raise SourceError(f"{where}, desirable: expected true or false, got {desirable!r:.80}")
    if form != "pair" and "margin" in fields:
        raise SourceError(f"{where}, margin: belongs to a pair, with `chosen` and `rejected`")
    return Preference(
        prompt, responses, desirable, _number(row, "margin", 0.0, where), _number(row, "weight", 1.0, where),
        _reference(row, form, len(responses), where), where,
    )  # fmt: skip


def _texts(prompt: Any, named: list[tuple[str, Any]], where: str) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and responses: all texts, or all turns."""
    if all(isinstance(entry, str) for entry in (prompt, *(entry for _, entry in named))):
        for name, entry in (("prompt", prompt), *named):
            if not entry:
                raise SourceError(f"{where}, {name}: the text is empty")
        return prompt, tuple(entry for _, entry in named)
    turns = _turns(prompt, "prompt", "user", where)
    responses = []
    for name, entry in named:
        response = _turns(entry, name, "assistant", where)
        if _said(response[: len(turns)]) == _said(turns):
            response = response[len(turns) :]
        if not response or response[-1].role != "assistant":
            raise SourceError(f"{where}, {name}: a response ends with a message of the assistant")
        responses.append(response)
    if turns[-1].role == "assistant":
        raise SourceError(f"{where}, prompt: it ends with a message of the assistant: there is nothing left to say")
    return turns, tuple(responses)


def _turns(value: Any, name: str, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise SourceError(f"{where}, {name}: expected a text or a list of messages, got {type(value).__name__}")
    turns = parse_messages(value, None, where, name)
    if media := [part for message in turns for part in message.parts if part.kind != "text"]:
        raise SourceError(f"{where}, {media[0].field}: preferences are between texts, got the type {media[0].kind}")
    return turns


def _said(text: Text) -> Any:
    """What compares equal if the same is said."""
    if isinstance(text, str):
        return text
    return [(message.role, "".join(part.value for part in message.parts)) for message in text]


def _number(row: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = row.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise SourceError(f"{where}, {name}: expected a number of at least 0, got {value!r:.80}")
    return float(value)


def _reference(row: Mapping[str, Any], form: str, count: int, where: str) -> tuple[LogProbabilities, ...] | None:
    names = {
        "pair": ["ref_chosen_logps", "ref_rejected_logps"],
        "ranking": ["ref_responses_logps"],
        "single": ["ref_response_logps"],
    }[form]
    present = [name for name in names if name in row]
    if not present:
        return None
    if len(present) < len(names):
        raise SourceError(f"{where}: {present[0]} is there, but {', '.join(set(names) - set(present))} is not")
    values = row[names[0]] if form == "ranking" else [row[name] for name in names]
    if not isinstance(values, list) or len(values) != count:
        raise SourceError(f"{where}, {names[0]}: expected a list with an entry for each of the {count} responses")
    found: list[LogProbabilities] = []
    for index, value in enumerate(values):
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and -math.inf < n <= 0 for n in numbers):
            field = f"{names[0]}[{index}]" if form == "ranking" else names[index]
            raise SourceError(f"{where}, {field}: log-probabilities are finite and at most 0, got {value!r:.80}")
        found.append(tuple(map(float, value)) if isinstance(value, list) else float(value))
    return tuple(found)


@dataclass(frozen=True)
class PreferenceSource:
    """One named source of preferences.

    Attributes:
        path: A `.jsonl` file, or a bundled set: `bundled:molecule-preferences/train` or `/test`.
        weight: Share of the training rows; as for `TextSource`.
        name: Name in metrics; by default made of the path.

    Raises:
        SourceError: For an unknown bundled set, another kind of file, or a weight that is not positive.
    """

    path: str
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.path.startswith("bundled:"):
            if self.path not in BUNDLED_PREFERENCES:
                known = ", ".join(BUNDLED_PREFERENCES)
                raise SourceError(f"PreferenceSource: path={self.path!r} is not bundled; there are {known}")
        elif not self.path.lower().endswith(".jsonl"):
            raise SourceError(f"PreferenceSource: path={self.path!r} must end in .jsonl (not compressed)")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise SourceError(f"PreferenceSource {self.path!r}: weight must be positive, got {self.weight}")

    @property
    def display_name(self) -> str:
        """`name`, else the name of the file or set."""
        if self.path.startswith("bundled:"):
            return self.name or self.path.removeprefix("bundled:").replace("/", "-")
        return self.name or Path(self.path).stem

    def open(self) -> Preferences:
        """The preferences, by number.

        Raises:
            SourceError: If there is no such file, or it is empty.
        """
        if self.path.startswith("bundled:"):
            return BundledPreferences(self.path)
        return PreferenceLines(Path(self.path).expanduser())


class Preferences(Protocol):
    """Preferences that can be read in any order."""

    key: str
    """Hash of what is in them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Preference:
        """One of them."""
        ...


class PreferenceLines:
    """The preferences of a JSONL file.

    Args:
        path: The file.

    Raises:
        SourceError: If there is no such file, or no line in it.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self.key = self._lines.key

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Preference:
        """One of them, from the file."""
        return parse_preference(*self._lines.record(index))


class BundledPreferences:
    """A set that comes with the package.

    Args:
        path: Its name.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        file = BUNDLED_FOLDER / BUNDLED_PREFERENCES[path].file
        self.key = f"{path} {hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()}"

    def __len__(self) -> int:
        return bundled_preferences_size(self.path)

    def read(self, index: int) -> Preference:
        """One of them."""
        return parse_preference(bundled_preference(self.path, index), f"{self.path}, number {index}")
