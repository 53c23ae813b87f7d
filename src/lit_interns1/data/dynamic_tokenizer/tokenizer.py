"""The dynamic tokenizer of Intern-S1: every domain has its own vocabulary and its own range of ids (arXiv 2508.15763,
section 2.2).

    text → (NFC) → cut at tags and added tokens → detectors cut plain spans further → spans, each with a vocabulary

    <SMILES>…</SMILES>      a pair of tags puts its domain on a stack; the text between is encoded by the top of it
    plain text              hits of the detectors, in the order of the domains; the rest is the base tokenizer's
    inside any pair         no detection: neither in a domain nor between protecting tags such as <MOLFORMULA>
    id of a domain          offset + index of the piece;     characters outside a vocabulary go to the base tokenizer

So `CC(=O)O` as a molecule and `CC(=O)O` as text have different ids, and other embeddings. An end tag takes the top off
the stack whatever domain it names; what is still open at the end of the text stays open to its end.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers

from lit_interns1.data.dynamic_tokenizer.detectors import Detector, detector_from_settings
from lit_interns1.data.dynamic_tokenizer.vocabulary import DomainVocabulary
from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError

FORMAT = "lit_interns1 dynamic tokenizer"
_VERSION = 1
_MULTIPLE = 128
PROTECTED = ("MOLFORMULA",)
"""Names of tags between which nothing is detected, in the published tokenizer."""


@dataclass(frozen=True)
class DomainSpec:
    """One domain.

    Attributes:
        name: Name in reports, e.g. `SMILES`.
        vocabulary: Its pieces.
        tags: Names of its tags: `SMILES` stands for `<SMILES>` and `</SMILES>`.
        detector: Finds it in plain text; None = only tags lead to it.
        offset: Id of its first piece; None = behind the base vocabulary and the domains before it.
    """

    name: str
    vocabulary: DomainVocabulary
    tags: tuple[str, ...]
    detector: Detector | None = None
    offset: int | None = None


class Segment(NamedTuple):
    """A part of a text with one vocabulary.

    Attributes:
        text: The part.
        domain: Name of the domain; None = the base tokenizer.
    """

    text: str
    domain: str | None


class _Part(NamedTuple):
    text: str
    domain: int  # −1 = base


class DynamicTokenizer(TextTokenizer):
    """A base tokenizer with domains. It is a `TextTokenizer`, so whatever takes one takes it.

    Args:
        base: The tokenizer of plain text; the tags are among its added tokens (`DynamicTokenizer.extend` adds them).
        domains: In the order in which they are detected.
        protected: Names of tags that only switch detection off; they have no ids, and their text is plain text.
        normalization: Unicode normal form that texts are brought to first, e.g. `NFC`; None = none.
        metaspace_is_space: Whether `▁` (U+2581) in a text is read as a space, as in the published tokenizer.
        end_of_text: The token that ends every document; see `TextTokenizer`.
        fingerprint: Identifies base and domains; by default a hash of all that is saved.
        origin: Where it came from, for messages.

    Raises:
        TokenizerError: If a tag is no added token of the base, names or tags repeat, ranges of ids overlap, or the
            base cannot encode a text in parts.
    """

    def __init__(
        self,
        base: TextTokenizer | tokenizers.Tokenizer,
        domains: Sequence[DomainSpec],
        protected: Sequence[str] = PROTECTED,
        normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None,
        metaspace_is_space: bool = False,
        end_of_text: str | None = None,
        fingerprint: str | None = None,
        origin: str = "dynamic tokenizer",
    ) -> None:
        if isinstance(base, DynamicTokenizer):
            raise TokenizerError(f"{origin}: the base is a dynamic tokenizer itself; give its base and all domains")
        inner = base.tokenizer if isinstance(base, TextTokenizer) else base
        if isinstance(base, TextTokenizer):
            end_of_text = end_of_text or base.end_of_text
        super().__init__(inner, "not yet known", end_of_text, origin)
        if normalization not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise TokenizerError(f"{origin}: normalization must be NFC, NFD, NFKC, NFKD or None, got {normalization!r}")
        self.normalization, self.metaspace_is_space = normalization, metaspace_is_space
        self.protected = tuple(protected)
        self.domains = _laid_out(domains, self.vocab_size, origin)
        self._added = [token.content for token in inner.get_added_tokens_decoder().values()]
        self._begin, self._end = self._tags(origin)
        self._protecting = frozenset(text for tag in self.protected for text in (f"<{tag}>", f"</{tag}>"))
        names = sorted({*self._added, *self._protecting} - {""}, key=lambda name: (-len(name), name))
        self._cut = re.compile("|".join(map(re.escape, names)))
        self._cut_starts = frozenset(name[0] for name in names)
        self._names = [domain.name for domain in self.domains]
        self._starts = [int(domain.offset or 0) for domain in self.domains]
        self._by_start = sorted(range(len(self._starts)), key=lambda index: self._starts[index])
        self._starts_sorted = [self._starts[index] for index in self._by_start]
        ends = [start + len(domain.vocabulary) for start, domain in zip(self._starts, self.domains)]
        self.vocab_size = max([self.vocab_size, *ends])
        _check_parts(self, origin)
        self.fingerprint = self._fingerprint(fingerprint)

    @classmethod
    def extend(
        cls, base: TextTokenizer | tokenizers.Tokenizer, domains: Sequence[DomainSpec], **options: Any
    ) -> DynamicTokenizer:
        """Adds the tags of the domains to a copy of a tokenizer, and the domains behind them.

        Args:
            base: Any tokenizer of texts; it is not changed.
            domains: The domains; offsets that are None are laid out in this order.
            **options: As in `DynamicTokenizer`.

        Raises:
            TokenizerError: As in `DynamicTokenizer`.
        """
        if isinstance(base, DynamicTokenizer):
            raise TokenizerError("the base is a dynamic tokenizer itself; give its base and all domains at once")
        end_of_text = options.pop("end_of_text", base.end_of_text if isinstance(base, TextTokenizer) else None)
        inner = base.tokenizer if isinstance(base, TextTokenizer) else base
        copy = tokenizers.Tokenizer.from_str(inner.to_str())
        copy.add_tokens(
            [
                tokenizers.AddedToken(text, special=False, normalized=False)
                for domain in domains
                for tag in domain.tags
                for text in (f"<{tag}>", f"</{tag}>")
            ]
        )
        return cls(copy, domains, end_of_text=end_of_text, **options)

    # encoding

    def segments(self, text: str) -> list[Segment]:
        """The text, normalised, in parts of one vocabulary each; tags belong to the base."""
        return [Segment(part.text, None if part.domain < 0 else self._names[part.domain]) for part in self._parts(text)]

    def counted_segments(self, texts: Sequence[str]) -> Iterator[tuple[Segment, int]]:
        """The segments of several texts, each with the number of its tokens."""
        parts_of = [self._parts(text) for text in texts]
        for parts, (_, counts) in zip(parts_of, self._encode(parts_of)):
            for part, count in zip(parts, counts):
                yield Segment(part.text, None if part.domain < 0 else self._names[part.domain]), count

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-text id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts. Detection runs in this thread, encoding in parallel."""
        return [ids for ids, _ in self._encode([self._parts(text) for text in texts])]

    def _encode(self, parts_of: Sequence[list[_Part]]) -> Iterator[tuple[list[int], list[int]]]:
        """For every text its ids, and how many of them each part has."""
        waiting: list[list[str]] = [[] for _ in range(len(self.domains) + 1)]  # the last one is the base's
        plans: list[list[list[int]]] = []
        for parts in parts_of:
            plan: list[list[int]] = []
            for text, domain in parts:
                if domain < 0:
                    waiting[-1].append(text)
                    plan.append([-1])
                    continue
                queues = []
                for run, covered in self.domains[domain].vocabulary.runs(text):
                    queue = domain if covered else -1
                    waiting[queue].append(run)
                    queues.append(queue)
                plan.append(queues)
            plans.append(plan)
        encoded = [
            iter(domain.vocabulary.encode_batch(texts) if texts else []) for domain, texts in zip(self.domains, waiting)
        ]
        one = len(waiting[-1]) == 1  # without threads
        encoded.append(iter([super().encode(waiting[-1][0])] if one else super().encode_batch(waiting[-1])))
        for plan in plans:
            if plan == [[-1]]:
                ids = next(encoded[-1])
                yield ids, [len(ids)]
                continue
            ids, counts = [], []
            for queues in plan:
                before = len(ids)
                for queue in queues:
                    found = next(encoded[queue])
                    if queue >= 0:
                        offset = self._starts[queue]
                        found = [offset + piece for piece in found]
                    ids += found
                counts.append(len(ids) - before)
            yield ids, counts

    def _parts(self, text: str) -> list[_Part]:
        """Cuts a text at tags and hits; base text stays in one part with the added tokens in it."""
        if self.normalization and not unicodedata.is_normalized(self.normalization, text):
            text = unicodedata.normalize(self.normalization, text)
        if self.metaspace_is_space:
            text = text.replace("▁", " ")
        spans: list[tuple[int, int, int]] = []
        sealed = False  # whether the last span must stay as it is

        def add(start: int, end: int, domain: int) -> None:
            if start == end:
                return
            if domain < 0 and spans and spans[-1][2] < 0 and not sealed:
                start = spans.pop()[0]
            spans.append((start, end, domain))

        stack: list[int] = []
        depth = position = 0
        for name, start, end in self._cuts(text):
            current = stack[-1] if stack else -1
            if not depth:
                for first, last, domain in self._detect(text, position, start):
                    add(position, first, current)
                    add(first, last, domain)
                    position = last
            add(position, start, current)
            sealed = sealed and position == start
            if name in self._begin:
                depth += 1
                stack += [self._begin[name]] if self._begin[name] >= 0 else []
            elif name in self._end:
                depth = max(0, depth - 1)
                if self._end[name] >= 0 and stack:
                    stack.pop()
            if name in self._protecting:
                sealed = True
            add(start, end, -1)
            sealed = name in self._protecting
            position = end
        return [_Part(text[start:end], domain) for start, end, domain in spans]

    def _cuts(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Added tokens and protecting tags in a text, leftmost and longest first, and its end as an empty one."""
        if any(character in text for character in self._cut_starts):
            for match in self._cut.finditer(text):
                yield match.group(), match.start(), match.end()
        yield "", len(text), len(text)

    def _detect(self, text: str, start: int, end: int) -> list[tuple[int, int, int]]:
        """(start, end, domain) of the hits in a plain span; a later detector sees what the earlier ones left."""
        hits: list[tuple[int, int, int]] = []
        free = [(start, end)] if start < end else []
        for index, domain in enumerate(self.domains):
            if domain.detector is None:
                continue
            left = []
            for first, last in free:
                position = first
                for hit_start, hit_end in domain.detector.find(text[first:last]):
                    left.append((position, first + hit_start))
                    position = first + hit_end
                    hits.append((first + hit_start, position, index))
                left.append((position, last))
            free = [(first, last) for first, last in left if first < last]
        return sorted(hits)

    # decoding

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; ids that stand for nothing give no text."""
        texts: list[str] = []
        waiting: list[int] = []
        for token in map(int, ids):
            place = bisect_right(self._starts_sorted, token) - 1
            index = self._by_start[place] if place >= 0 else -1
            piece = token - self._starts[index]
            if index < 0 or piece >= len(self.domains[index].vocabulary):
                waiting.append(token)
                continue
            if waiting:
                texts.append(super().decode(waiting, skip_special_tokens))
                waiting = []
            texts.append(self.domains[index].vocabulary.pieces[piece])
        if waiting:
            texts.append(super().decode(waiting, skip_special_tokens))
        return "".join(texts)

    # what it is

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128, for a model's embedding."""
        return -(-self.vocab_size // _MULTIPLE) * _MULTIPLE

    def id_range(self, domain: str) -> range:
        """The ids of a domain.

        Raises:
            TokenizerError: If there is no such domain.
        """
        if domain not in self._names:
            raise TokenizerError(f"there is no domain {domain!r}, only {', '.join(self._names) or 'none'}")
        index = self._names.index(domain)
        return range(self._starts[index], self._starts[index] + len(self.domains[index].vocabulary))

    def extra_pieces(self) -> Iterator[tuple[int, str]]:
        """(id, text) of the pieces of all domains that texts are encoded to."""
        for start, domain in zip(self._starts, self.domains):
            for index, piece in enumerate(domain.vocabulary.pieces):
                if index not in domain.vocabulary.reserved:
                    yield start + index, piece

    def definition(self) -> str:
        """The tokenizer as one JSON text.

        Raises:
            TokenizerError: If a detector is none of this package.
        """
        content = {
            "format": FORMAT,
            "version": _VERSION,
            "end_of_text": self.end_of_text,
            "normalization": self.normalization,
            "metaspace_is_space": self.metaspace_is_space,
            "protected": list(self.protected),
            "domains": [_domain_as_json(domain) for domain in self.domains],
            "base": json.loads(self.tokenizer.to_str()),
        }
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Writes one JSON file that `load_tokenizer` reads."""
        Path(path).write_text(self.definition(), encoding="utf-8")

    def _fingerprint(self, given: str | None) -> str:
        """With what detection depends on: the same files give other ids where RDKit is missing."""
        found = [domain.detector.identity for domain in self.domains if domain.detector is not None]
        text = json.dumps([given or self.definition(), found])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _tags(self, origin: str) -> tuple[dict[str, int], dict[str, int]]:
        """Domain by begin tag and by end tag; −1 for protecting tags."""
        begin: dict[str, int] = {}
        end: dict[str, int] = {}
        named = [(tag, index) for index, domain in enumerate(self.domains) for tag in domain.tags]
        for tag, index in [*named, *((tag, -1) for tag in self.protected)]:
            if not re.fullmatch(r"[^\s<>/][^\s<>]*", tag):
                raise TokenizerError(f"{origin}: a tag must be a name without spaces and brackets, got {tag!r}")
            if f"<{tag}>" in begin:
                raise TokenizerError(f"{origin}: the tag <{tag}> is given twice")
            begin[f"<{tag}>"], end[f"</{tag}>"] = index, index
            missing = [text for text in (f"<{tag}>", f"</{tag}>") if (text in self._added) != (index >= 0)]
            if missing and index >= 0:
                raise TokenizerError(
                    f"{origin}: {missing[0]} is no added token of the base tokenizer; DynamicTokenizer.extend adds it"
                )
            if missing:
                raise TokenizerError(f"{origin}: {missing[0]} protects from detection, but is a token with an id")
        return begin, end


def _laid_out(domains: Sequence[DomainSpec], first: int, origin: str) -> tuple[DomainSpec, ...]:
    """The domains with their offsets; ranges of ids must not meet."""
    placed: list[DomainSpec] = []
    end = first
    for domain in domains:
        if any(domain.name == other.name for other in placed):
            raise TokenizerError(f"{origin}: the domain {domain.name!r} is given twice")
        offset = end if domain.offset is None else domain.offset
        placed.append(replace(domain, offset=offset, tags=tuple(domain.tags)))
        end = max(end, offset + len(domain.vocabulary))
    ranges = sorted((int(domain.offset or 0), len(domain.vocabulary), domain.name) for domain in placed)
    for offset, size, name in ranges:
        if offset < first:
            raise TokenizerError(
                f"{origin}: the ids of the domain {name!r} begin at {offset}, but the base tokenizer has ids up to "
                f"{first - 1}"
            )
        first = offset + size
    return tuple(placed)


def _check_parts(tokenizer: TextTokenizer, origin: str) -> None:
    """A base that marks the beginning of a text would add a space at the border of every span."""
    one, other = tokenizer.encode("a"), tokenizer.encode("b")
    if tokenizer.decode([*one, *other]) != tokenizer.decode(one) + tokenizer.decode(other):
        raise TokenizerError(
            f"{origin}: the base tokenizer sets words apart when it decodes (it reads 'a' and 'b' as "
            f"{tokenizer.decode([*one, *other])!r}), so a text cannot be encoded in parts; use a byte-level tokenizer"
        )


def _domain_as_json(domain: DomainSpec) -> dict[str, Any]:
    vocabulary = domain.vocabulary
    settings = None if domain.detector is None else domain.detector.settings
    if settings is not None:
        detector_from_settings(settings)
    plain = vocabulary.priorities == tuple(range(len(vocabulary)))
    return {
        "name": domain.name,
        "tags": list(domain.tags),
        "offset": domain.offset,
        "detector": settings,
        "pieces": list(vocabulary.pieces),
        "priorities": None if plain else list(vocabulary.priorities),
        "reserved": sorted(vocabulary.reserved),
    }
