"""What is wrong with a folder of weights, as one typed error that lists everything at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_SHOWN = 20

ProblemKind = Literal["missing", "unexpected", "duplicate", "shape", "type"]


@dataclass(frozen=True)
class Problem:
    """One tensor that does not fit.

    Attributes:
        kind: "missing": the model needs it; "unexpected": the model has no place for it; "duplicate": it is there
            twice; "shape" or "type": it is there in a form that does not fit.
        key: Its name in the files, or that of the model's tensor where no key would fill it.
        detail: What was found and what is needed.
    """

    kind: ProblemKind
    key: str
    detail: str


class WeightsError(ValueError):
    """Weights cannot be read, or do not fit the model. Nothing was written.

    Attributes:
        problems: The tensors that do not fit; empty where a file or the config is at fault.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *_table(self.problems)]))


def _table(problems: Sequence[Problem]) -> list[str]:
    if not problems:
        return []
    shown = problems[:_SHOWN]
    kinds, keys = (max(len(text) for text in column) for column in zip(*((p.kind, p.key) for p in shown), strict=True))
    lines = [f"  {p.kind:<{kinds}}  {p.key:<{keys}}  {p.detail}" for p in shown]
    return lines if len(problems) <= _SHOWN else [*lines, f"  … and {len(problems) - _SHOWN} more"]


def counted(problems: Sequence[Problem]) -> str:
    """How many problems of each kind there are, in words."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
