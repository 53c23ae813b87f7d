"""Where prompts come from, and in which order they are drawn.

A source gives prompts by number. A sampler says which numbers the next rollout batch takes: the same on all ranks, and
resumable. It hears how each prompt went, so that it may prefer some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lit_interns1.data.order import permutation


class PromptError(ValueError):
    """Prompts cannot be read; the message names file, line and field."""


@dataclass(frozen=True)
class RawPrompt:
    """A task before it is tokens.

    Attributes:
        content: Text, or messages with `role` and `content`.
        source: Which judges and weights it belongs to.
        data: What judges need: the reference answer and more.
    """

    content: str | list[dict[str, Any]]
    source: str = ""
    data: Mapping[str, Any] | None = None


class PromptSource(Protocol):
    """Prompts by number."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> RawPrompt:
        """One of them."""


class JsonLinesPrompts(PromptSource):
    """Prompts from a JSONL file: one object per line with `prompt` (text or messages), `source` (optional) and whatever
    judges need, such as `answer`.

    Args:
        path: The file.
        prompt_field: Name of the prompt.
        source: Source of prompts that name none; default: the file's name.

    Raises:
        PromptError: If the file cannot be read, with the line.
    """

    def __init__(self, path: str | Path, prompt_field: str = "prompt", source: str | None = None) -> None:
        self.path, self.prompt_field = Path(path).expanduser(), prompt_field
        self.source = self.path.stem if source is None else source
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompts path={str(path)!r}: {error}") from None
        self._prompts = [self._read(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not self._prompts:
            raise PromptError(f"prompts path={str(path)!r}: the file has no line")

    def _read(self, line: str, number: int) -> RawPrompt:
        where = f"{self.path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{where}: not JSON ({error})") from None
        if not isinstance(entry, dict) or self.prompt_field not in entry:
            raise PromptError(f"{where}: an object with {self.prompt_field!r} is wanted")
        content = entry.pop(self.prompt_field)
        is_messages = (
            isinstance(content, list)
            and bool(content)
            and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in content)
        )
        if not is_messages and not (isinstance(content, str) and content):
            raise PromptError(
                f"{where}, {self.prompt_field}: text, or a list of messages with role and content, is wanted"
            )
        source = entry.pop("source", self.source)
        if not isinstance(source, str):
            raise PromptError(f"{where}, source: text is wanted, got {type(source).__name__}")
        return RawPrompt(content, source, entry)

    def __len__(self) -> int:
        """Lines that hold a prompt."""
        return len(self._prompts)

    def __getitem__(self, index: int) -> RawPrompt:
        """The prompt of a line."""
        return self._prompts[index]


@dataclass(frozen=True)
class PromptOutcome:
    """How the samples of a prompt went.

    Attributes:
        index: Number of the prompt.
        source: Its source.
        rewards: One per sample; NaN = failed.
        correct: Fraction of samples that a judge with two outcomes found right; NaN where none did.
    """

    index: int
    source: str
    rewards: tuple[float, ...]
    correct: float


class PromptSampler(Protocol):
    """Chooses prompts. Everything it does is a function of its arguments and its state, the same on all ranks."""

    def start(self, sources: Sequence[str], seed: int) -> None:
        """Called once, with the source of every prompt."""

    def draw(self, count: int) -> list[int]:
        """Numbers of the next prompts."""

    def report(self, outcomes: Sequence[PromptOutcome]) -> None:
        """Hears of all samples of a rollout batch, those of other ranks included, in the order of the prompts."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues."""


class ShuffledPrompts(PromptSampler):
    """Every prompt once per epoch, in an order that depends on seed and epoch."""

    def __init__(self) -> None:
        self._count = self._seed = self._drawn = 0

    def start(self, sources: Sequence[str], seed: int) -> None:
        """See `PromptSampler`."""
        self._count, self._seed = len(sources), seed

    def draw(self, count: int) -> list[int]:
        """See `PromptSampler`."""
        found: list[int] = []
        while len(found) < count:
            epoch, inside = divmod(self._drawn, self._count)
            order = permutation(self._count, self._seed, epoch)
            part = order[inside : inside + count - len(found)].tolist()
            found += part
            self._drawn += len(part)
        return found

    def report(self, outcomes: Sequence[PromptOutcome]) -> None:
        """Nothing follows from it."""

    def state_dict(self) -> dict[str, Any]:
        """Prompts drawn so far."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues behind them."""
        self._drawn = int(state["drawn"])
