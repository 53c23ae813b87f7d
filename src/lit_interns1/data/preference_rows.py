"""Preferences as tokens, and the reader that makes batches of them.

    text      ids of the prompt, ids of the response, end of text       (apart, as when a response is generated)
    messages  the conversation of prompt and response in the chat format

Loss and scores are on the response alone: its text and the token that ends it (for messages: what the assistant says in
it). A *group* lies whole in one row: the two responses of a pair, each behind its own copy of the prompt; or a response
alone, with, if that is asked for, the response of another line behind the same prompt (KTO estimates a KL from it).

Token fields stand, as labels do, at the position that predicts the token they speak of:

    response_mask  bool                 pair_ids    int64, unique in a batch, −1 = none
    is_chosen      bool                 weights     float32, if a line has one
    ref_logprobs   float32, if given    margins     float32, if a line has one
    mismatched     bool, if asked for   source_id   int64
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.conversations import Conversation
from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.packing import IntArray, PackingPlan, assemble, lay_out, token_index
from lit_interns1.data.preferences import LogProbabilities, Preference, Preferences, Text
from lit_interns1.data.rows import PAD_VALUES
from lit_interns1.data.sources import SourceError

RankingPairs = Literal["all", "adjacent"]
Overlong = Literal["error", "skip", "truncate_prompt"]
_PADS = {**PAD_VALUES, "pair_ids": -1}


class Answer(NamedTuple):
    """A response behind its prompt, as tokens.

    Attributes:
        prompt: Ids of the prompt.
        response: Ids behind it.
        learned: Which of those count.
        chosen: Whether it is the better or a desirable one.
        mismatched: Whether it belongs to another prompt.
        reference: Its log-probabilities, one per token that counts; None if they are not known.
    """

    prompt: list[int]
    response: list[int]
    learned: list[bool]
    chosen: bool
    mismatched: bool = False
    reference: tuple[float, ...] | None = None


class Group(NamedTuple):
    """What must lie in one row.

    Attributes:
        answers: A pair, the chosen one first; or a response alone, with or without a mismatched one.
        is_pair: Which of the two.
        margin: Of a pair.
        weight: Of all its answers.
        where: File and line.
    """

    answers: tuple[Answer, ...]
    is_pair: bool
    margin: float
    weight: float
    where: str


def encode(
    prompt: Text, response: Text, form: ConversationFormat, where: str
) -> tuple[list[int], list[int], list[bool]]:
    """Ids of a prompt, ids of a response behind it, and which of those count.

    Raises:
        SourceError: If a message holds a token that marks turns.
    """
    tokenizer = form.tokenizer
    if isinstance(prompt, str):
        assert isinstance(response, str)
        ids = [*tokenizer.encode(response), tokenizer.end_of_text_id]
        return tokenizer.encode(prompt), ids, [True] * len(ids)
    assert not isinstance(response, str)
    begun = form.render(Conversation(prompt, where)).ids
    whole = form.render(Conversation((*prompt, *response), where))
    return begun, whole.ids[len(begun) :], whole.answers[len(begun) :]


def _answer(
    preference: Preference, index: int, form: ConversationFormat, chosen: bool, of: Preference | None = None
) -> Answer:
    """Response number `index`, of this line or of another (then it is mismatched)."""
    response = (of or preference).responses[index]
    prompt, ids, learned = encode(preference.prompt, response, form, preference.where)
    reference = None
    if of is None and preference.reference is not None:
        reference = _spread(preference.reference[index], sum(learned), f"{preference.where}, response {index + 1}")
    return Answer(prompt, ids, learned, chosen, of is not None, reference)


def _spread(value: LogProbabilities, tokens: int, where: str) -> tuple[float, ...]:
    """One number per token; a sum is spread evenly."""
    if isinstance(value, float):
        return (value / tokens,) * tokens
    if len(value) != tokens:
        raise SourceError(
            f"{where}: {len(value)} log-probabilities of a reference for a response of {tokens} tokens (the token that "
            "ends it included)"
        )
    return value


def groups_of(
    preferences: Preferences, form: ConversationFormat, ranking: RankingPairs = "all", mismatched: bool = False
) -> Iterator[Group]:
    """The groups of a source, in the order of its lines.

    Args:
        preferences: The lines.
        form: How messages become tokens; for texts only its tokenizer matters.
        ranking: Which pairs a ranking gives: all, or those of neighbours.
        mismatched: Put a response of another line beside every response that stands alone: that of the next line with
            another text.

    Raises:
        SourceError: If a line has not the right form, or, with `mismatched`, all responses are equal.
    """
    lines = [preferences.read(index) for index in range(len(preferences))]
    for index, line in enumerate(lines):
        if line.desirable is None:
            count = len(line.responses)
            answers = [(_answer(line, i, form, True), _answer(line, i, form, False)) for i in range(count)]
            for better in range(count - 1):
                for worse in range(better + 1, count if ranking == "all" else better + 2):
                    pair = answers[better][0], answers[worse][1]
                    yield Group(pair, True, line.margin, line.weight, line.where)
            continue
        alone = [_answer(line, 0, form, line.desirable)]
        if mismatched:
            alone.append(_answer(line, 0, form, False, _partner(lines, index)))
        yield Group(tuple(alone), False, line.margin, line.weight, line.where)


def _partner(lines: list[Preference], index: int) -> Preference:
    for step in range(1, len(lines)):
        other = lines[(index + step) % len(lines)]
        if other.has_turns == lines[index].has_turns and other.responses[0] != lines[index].responses[0]:
            return other
    raise SourceError(f"{lines[index].where}: mismatched = True needs a line with another response; there is none")


def fit(group: Group, row_length: int, overlong: Overlong) -> Group | None:
    """The group, with its prompts cut on the left if it is longer than a row and that is wanted; None = leave it out.

    Raises:
        SourceError: If it is too long and must not be, or is too long even without a prompt.
    """
    length = sum(len(answer.prompt) + len(answer.response) for answer in group.answers)
    if length <= row_length:
        return group
    if overlong == "skip":
        return None
    both = "both responses, each behind the prompt, are" if len(group.answers) > 1 else "prompt and response are"
    if overlong == "error":
        raise SourceError(
            f"{group.where}: {both} {length} tokens, more than row_length={row_length}; raise row_length, or set "
            "overlong='skip' or 'truncate_prompt'"
        )
    room = (row_length - sum(len(answer.response) for answer in group.answers)) // len(group.answers)
    if room < 1:
        raise SourceError(
            f"{group.where}: {both} {length} tokens, and leave no room for a prompt in row_length={row_length}; raise "
            "row_length, or set overlong='skip'"
        )
    return group._replace(answers=tuple(answer._replace(prompt=answer.prompt[-room:]) for answer in group.answers))


@dataclass
class PreferenceStore:
    """The tokens of a source. Suffixes: N tokens, S answers, G groups.

    Attributes:
        tokens_N: (N,) int32, all answers behind their prompts.
        learned_N: (N,) bool, tokens that count.
        reference_N: (N,) float32 log-probabilities of a reference; NaN where they are not known.
        end_S: (S,) end of each answer in the flat tokens.
        chosen_S: (S,) bool.
        mismatched_S: (S,) bool.
        first_G: (G+1,) group g has the answers [first_G[g], first_G[g+1]).
        pair_G: (G,) bool, whether it is a pair.
        margin_G: (G,) float32.
        weight_G: (G,) float32.
        skipped: Groups that were too long.
    """

    tokens_N: NDArray[np.int32]
    learned_N: NDArray[np.bool_]
    reference_N: NDArray[np.float32]
    end_S: IntArray
    chosen_S: NDArray[np.bool_]
    mismatched_S: NDArray[np.bool_]
    first_G: IntArray
    pair_G: NDArray[np.bool_]
    margin_G: NDArray[np.float32]
    weight_G: NDArray[np.float32]
    skipped: int

    @staticmethod
    def build(groups: Iterator[Group], row_length: int, overlong: Overlong) -> PreferenceStore:
        """Keeps the groups that fit; see `fit` for errors."""
        kept, skipped = [], 0
        for group in groups:
            fitting = fit(group, row_length, overlong)
            skipped += fitting is None
            kept += [] if fitting is None else [fitting]
        answers = [answer for group in kept for answer in group.answers]
        tokens, learned, reference = [], [], []
        for answer in answers:
            tokens += [*answer.prompt, *answer.response]
            learned += [*[False] * len(answer.prompt), *answer.learned]
            known = iter(answer.reference or ())
            reference += [np.nan] * len(answer.prompt) + [next(known, np.nan) if x else np.nan for x in answer.learned]
        lengths = [len(answer.prompt) + len(answer.response) for answer in answers]
        return PreferenceStore(
            np.array(tokens, dtype=np.int32), np.array(learned, dtype=bool), np.array(reference, dtype=np.float32),
            np.cumsum(lengths, dtype=np.int64), np.array([answer.chosen for answer in answers], dtype=bool),
            np.array([answer.mismatched for answer in answers], dtype=bool),
            np.cumsum([0, *(len(group.answers) for group in kept)], dtype=np.int64),
            np.array([group.is_pair for group in kept], dtype=bool),
            np.array([group.margin for group in kept], dtype=np.float32),
            np.array([group.weight for group in kept], dtype=np.float32), skipped,
        )  # fmt: skip

    @property
    def length_S(self) -> IntArray:
        """(S,) tokens of each answer."""
        return np.diff(self.end_S, prepend=0)

    @property
    def length_G(self) -> IntArray:
        """(G,) tokens of each group."""
        end_G = np.concatenate([[0], self.end_S])[self.first_G]
        return np.diff(end_G)

    @property
    def optional_fields(self) -> set[str]:
        """Token fields that these groups give, beside those that all have."""
        given = {
            "weights": bool((self.weight_G != 1).any()),
            "margins": bool((self.margin_G != 0).any()),
            "mismatched": bool(self.mismatched_S.any()),
            "ref_logprobs": bool(np.isfinite(self.reference_N).any()),
        }
        return {name for name, present in given.items() if present}

    def content_hash(self) -> str:
        """Hash of everything that enters batches."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (
            self.tokens_N, self.learned_N, self.reference_N, self.end_S, self.chosen_S, self.mismatched_S,
            self.first_G, self.pair_G, self.margin_G, self.weight_G,
        ):  # fmt: skip
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass
class PreferenceRows:
    """The rows that the groups of one source fill.

    Attributes:
        store: The tokens.
        group_D: (D,) which groups, in packing order.
        plan: How they lie in rows; its documents are indices into `group_D`.
    """

    store: PreferenceStore
    group_D: IntArray
    plan: PackingPlan

    def groups(self, row: int) -> IntArray:
        """The groups of a row."""
        span = slice(int(self.plan.first_piece_R[row]), int(self.plan.first_piece_R[row + 1]))
        return self.group_D[self.plan.piece_document_P[span]]


class PreferenceReader:
    """Makes batches of rows of several sources.

    Args:
        sources: The rows of each source.
        row_length: L, tokens per row.
        optional_fields: Which of `weights`, `margins`, `mismatched` and `ref_logprobs` batches have.
    """

    def __init__(self, sources: Sequence[PreferenceRows], row_length: int, optional_fields: set[str]) -> None:
        self.sources, self.row_length, self.optional_fields = list(sources), row_length, set(optional_fields)

    def read(
        self, rows: Sequence[tuple[int, int]], num_rows: int | None = None, first: int | None = None
    ) -> PackedBatch:
        """A batch of rows; see `loader.ReadsRows`."""
        num_rows = len(rows) if num_rows is None else num_rows
        wanted = {"input_ids", "labels", "source_id", "response_mask", "pair_ids", "is_chosen", *self.optional_fields}
        columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in sorted(wanted)}
        lengths: list[IntArray] = []
        row_S: list[IntArray] = []
        pairs = 0
        for position, (index, row) in enumerate(rows):
            store, group_G = self.sources[index].store, self.sources[index].groups(row)
            size_G = np.diff(store.first_G)[group_G]
            answer_S = token_index(store.first_G[group_G], size_G)
            length_S = store.length_S[answer_S]
            token_N = token_index((store.end_S - store.length_S)[answer_S], length_S)
            last_N = np.zeros(len(token_N), dtype=bool)
            last_N[np.cumsum(length_S) - 1] = True
            next_N = np.minimum(token_N + 1, len(store.tokens_N) - 1)
            response_N = store.learned_N[next_N] & ~last_N
            pair_G = np.where(store.pair_G[group_G], pairs + np.cumsum(store.pair_G[group_G]) - 1, -1)
            pairs += int(store.pair_G[group_G].sum())

            def of_answers(value_S: NDArray[np.generic], length_S: IntArray = length_S) -> NDArray[np.generic]:
                return np.repeat(value_S, length_S)

            values: dict[str, NDArray[np.generic]] = {
                "input_ids": store.tokens_N[token_N].astype(np.int64),
                "labels": np.where(response_N, store.tokens_N[next_N], IGNORED_LABEL).astype(np.int64),
                "source_id": np.full(len(token_N), index, dtype=np.int64),
                "response_mask": response_N,
                "pair_ids": of_answers(np.repeat(pair_G, size_G)),
                "is_chosen": of_answers(store.chosen_S[answer_S]),
                "mismatched": of_answers(store.mismatched_S[answer_S]),
                "weights": of_answers(np.repeat(store.weight_G[group_G], size_G)),
                "margins": of_answers(np.repeat(store.margin_G[group_G], size_G)),
                "ref_logprobs": np.where(response_N, store.reference_N[next_N], np.float32(0)),
            }
            for name, parts in columns.items():
                parts.append(values[name])
            lengths.append(length_S)
            row_S.append(np.full(len(length_S), position, dtype=np.int64))
        layout = lay_out(_joined(lengths, np.int64), _joined(row_S, np.int64), num_rows, self.row_length)
        tensors = {
            name: torch.from_numpy(_joined(parts, _TYPES.get(name, np.int64))) for name, parts in columns.items()
        }
        return assemble(tensors, layout, _PADS)


_TYPES: dict[str, type[np.generic]] = {
    "response_mask": np.bool_, "is_chosen": np.bool_, "mismatched": np.bool_,
    "weights": np.float32, "margins": np.float32, "ref_logprobs": np.float32,
}  # fmt: skip
"""Types of token fields that are not int64."""


def _joined(parts: Sequence[NDArray[np.generic]], kind: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate([np.zeros(0, dtype=kind), *parts]).astype(kind)
