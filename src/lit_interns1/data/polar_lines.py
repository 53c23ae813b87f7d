"""What POLAR learns from, one JSON object per line, and the pairs that it gives (arXiv 2507.05197, §3).

    {"prompt": …, "reference": …, "chosen": …, "rejected": …}      fine-tuning (Eq. 8); the files of InternLM/POLAR
    {"prompt": …, "ranking": [best, …, worst]}                     the same; the best is the reference of all pairs
    {"prompt": …, "policy": "name", "trajectory": …}               pre-training (Eq. 7): what a policy wrote

Texts may be lists of messages with a `content` each; a `wrapper` ("sft" or "pretrain") may stand beside them. A pair is
two candidates for one prompt and reference, the better one first. Of trajectories of one prompt come triples: two of a
policy A, one as the reference and one as the better candidate, and one of another policy B. Each A with two
trajectories has its turn `triples_per_policy` times; B and the trajectories are drawn by a hash of the seed and of
places in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lit_interns1.data.conversations import JsonLines
from lit_interns1.data.order import permutation
from lit_interns1.data.polar_template import Wrapper, contents
from lit_interns1.data.sources import SourceError

_FORMS = {
    "pair": ("reference", "chosen", "rejected"),
    "ranking": ("ranking",),
    "trajectory": ("policy", "trajectory"),
}
_EXPECTED = "`prompt` with `reference`, `chosen` and `rejected`, with a `ranking`, or with `policy` and `trajectory`"


class PolarPair(NamedTuple):
    """Two candidates against a reference.

    Attributes:
        prompt: What was asked, or the prefix.
        reference: What they are compared with.
        chosen: The better candidate.
        rejected: The worse one.
        wrapper: What stands behind the prompt (see `polar_template`); None = as the template says.
        policies: Who wrote the chosen one and the reference, and who the rejected one; None = not said.
        where: File and line, for messages.
    """

    prompt: str
    reference: str
    chosen: str
    rejected: str
    wrapper: Wrapper | None
    policies: tuple[str, str] | None
    where: str


@dataclass(frozen=True)
class PolarSource:
    """One named source.

    Attributes:
        path: A `.jsonl` file; its lines are trajectories, or pairs and rankings.
        weight: Share of the training rows; as for `TextSource`.
        name: Name in metrics; by default that of the file.

    Raises:
        SourceError: For another kind of file, or a weight that is not positive.
    """

    path: str
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.path.lower().endswith(".jsonl"):
            raise SourceError(f"PolarSource: path={self.path!r} must end in .jsonl (not compressed)")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise SourceError(f"PolarSource {self.path!r}: weight must be positive, got {self.weight}")

    @property
    def display_name(self) -> str:
        """`name`, else the name of the file."""
        return self.name or Path(self.path).stem

    def pairs(self, seed: int, triples_per_policy: int) -> list[PolarPair]:
        """All pairs.

        Args:
            seed: Of the triples.
            triples_per_policy: How often each policy is A for each prompt.

        Raises:
            SourceError: If the file cannot be read or a line has not the form; the message names file and line.
        """
        lines = JsonLines(Path(self.path).expanduser())
        listed = [lines.record(index) for index in range(len(lines))]
        forms = [_form(row, where) for row, where in listed]
        if "trajectory" not in forms:
            return [
                pair for (row, where), form in zip(listed, forms, strict=True) for pair in _judged(row, form, where)
            ]
        for (_, where), form in zip(listed, forms, strict=True):
            if form != forms[0]:
                raise SourceError(
                    f"{where}: trajectories of policies and judged candidates do not mix in a file; this line is a "
                    f"{form}, the first a {forms[0]}"
                )
        pairs = list(_triples(listed, seed, triples_per_policy))
        if not pairs:
            raise SourceError(
                f"{self.path}: no prompt has two trajectories of one policy and another one of another policy"
            )
        return pairs


def _form(row: Any, where: str) -> str:
    fields = set(row) if isinstance(row, Mapping) else set()
    forms = [name for name, needed in _FORMS.items() if fields & set(needed)]
    if "prompt" not in fields or len(forms) != 1 or not fields.issuperset(_FORMS[forms[0]]):
        found = ", ".join(sorted(fields)) if isinstance(row, Mapping) else type(row).__name__
        raise SourceError(f"{where}: expected an object with {_EXPECTED}; got {found or 'no field'}")
    return forms[0]


def _text(value: Any, field: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str | list):
        raise SourceError(f"{where}, {field}: expected a text or a list of messages, got {type(value).__name__}")
    try:
        text = contents(value)
    except ValueError as error:
        raise SourceError(f"{where}, {field}: {error}") from None
    if not text and not empty:
        raise SourceError(f"{where}, {field}: the text is empty")
    return text


def _wrapper(row: Mapping[str, Any], where: str) -> Wrapper | None:
    found = row.get("wrapper")
    if found not in (None, *get_args(Wrapper)):
        raise SourceError(f"{where}, wrapper: {found!r:.80} is none of {', '.join(get_args(Wrapper))}")
    return found


def _judged(row: Mapping[str, Any], form: str, where: str) -> Iterator[PolarPair]:
    prompt = _text(row["prompt"], "prompt", where)
    if form == "pair":
        reference, *ranked = (_text(row[name], name, where) for name in _FORMS["pair"])
    else:
        if not isinstance(row["ranking"], list) or len(row["ranking"]) < 3:
            raise SourceError(f"{where}, ranking: expected a list of three or more, the best, the reference, first")
        reference, *ranked = (_text(entry, f"ranking[{i}]", where) for i, entry in enumerate(row["ranking"]))
    for better, chosen in enumerate(ranked):
        for rejected in ranked[better + 1 :]:
            if chosen == rejected:
                raise SourceError(f"{where}: two candidates are equal: none is better")
            yield PolarPair(prompt, reference, chosen, rejected, _wrapper(row, where), None, where)


def _triples(listed: list[tuple[Any, str]], seed: int, per_policy: int) -> Iterator[PolarPair]:
    written: dict[tuple[str, Wrapper | None], dict[str, list[tuple[str, str]]]] = {}
    for row, where in listed:
        policy = row["policy"]
        if not isinstance(policy, str) or not policy:
            raise SourceError(f"{where}, policy: expected a name, got {policy!r:.80}")
        trajectory = _text(row["trajectory"], "trajectory", where)
        of_prompt = written.setdefault((_text(row["prompt"], "prompt", where), _wrapper(row, where)), {})
        of_prompt.setdefault(policy, []).append((trajectory, where))
    for number, ((prompt, wrapper), policies) in enumerate(written.items()):
        names = list(policies)
        for place, name in enumerate(names):
            own, others = policies[name], [other for other in names if other != name]
            if len(own) < 2 or not others:
                continue
            for turn in range(per_policy):
                key = seed, 6, number, place, turn
                (reference, _), (chosen, where) = (own[i] for i in permutation(len(own), *key)[:2])
                other = others[int(permutation(len(others), *key, 0)[0])]
                drawn = [policies[other][i][0] for i in permutation(len(policies[other]), *key, 1)]
                rejected = next((text for text in drawn if text != chosen), None)
                if rejected is not None:  # who wrote a text that both wrote cannot be told
                    yield PolarPair(prompt, reference, chosen, rejected, wrapper, (name, other), where)
