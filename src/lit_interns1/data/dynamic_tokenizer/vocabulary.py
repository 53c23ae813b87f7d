"""The vocabulary of one domain: byte-pair encoding over characters, as SentencePiece does it.

    while two neighbours join to a piece:   join the pair whose piece has the highest priority, leftmost first

A pair may join to any piece, however the piece came about in training. So every split of a piece into two pieces is a
merge rule of the BPE of the `tokenizers` library, in the order of priority; it is fast and runs in threads. Runs of
characters that no piece covers are not the domain's: they are left to the base vocabulary.

The rule list must name one split of a piece before another, where the definition above takes the leftmost pair. The two
differ only if neighbours x, y, z arise in a text with x·y and y·z the same piece; leftmost joining has made x·y before.
That is checked against the definition on random vocabularies and against sentencepiece, not proven.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from lit_interns1.data.dynamic_tokenizer.sentencepiece_file import read_sentencepiece_model
from lit_interns1.data.tokenizer import TokenizerError

UNKNOWN_PIECE = "<unk>"
"""Text of the piece that stands for characters outside the vocabulary; its id is never used."""


class DomainVocabulary:
    """Pieces of one domain.

    Args:
        pieces: Text of every piece, by id; a space is a space.
        priorities: Order of merges by id, smaller is earlier; by default the ids themselves.
        reserved: Ids that no text is encoded to.

    Raises:
        TokenizerError: If there is no piece to use, one is empty or there twice, or one holds a character that is no
            piece.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        priorities: Sequence[float] | None = None,
        reserved: frozenset[int] | set[int] = frozenset({0}),
    ) -> None:
        self.pieces = tuple(pieces)
        self.reserved = frozenset(reserved)
        self.priorities = tuple(range(len(self.pieces))) if priorities is None else tuple(priorities)
        if len(self.priorities) != len(self.pieces):
            raise TokenizerError(f"{len(self.priorities)} priorities for {len(self.pieces)} pieces")
        index = {piece: i for i, piece in enumerate(self.pieces) if i not in self.reserved}
        if not index:
            raise TokenizerError("the vocabulary has no piece to use")
        if len(index) != len(self.pieces) - len(self.reserved & set(range(len(self.pieces)))):
            twice = next(p for p in index if sum(p == q for q in self.pieces) > 1)
            raise TokenizerError(f"the piece {twice!r} is there twice")
        self.alphabet = frozenset(piece for piece in index if len(piece) == 1)
        for piece in index:
            if not piece:
                raise TokenizerError("a piece is empty")
            if outside := set(piece) - self.alphabet:
                raise TokenizerError(f"the piece {piece!r} holds {min(outside)!r}, which is no piece itself")
        self._index = index

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> DomainVocabulary:
        """Reads a SentencePiece `.model` file of the BPE type.

        Raises:
            TokenizerError: If it is not one, or asks for what is not supported; see `read_sentencepiece_model`.
        """
        model = read_sentencepiece_model(path)
        try:
            return cls(model.pieces, [-score for score in model.scores], model.reserved)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.pieces)

    def runs(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text cut into runs of characters that the vocabulary covers (True) and that it does not (False)."""
        for match in self._runs.finditer(text):
            yield match.group(), match.lastindex == 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, all of whose characters the vocabulary covers."""
        if len(texts) == 1:  # without threads
            return [self._bpe.encode(texts[0], add_special_tokens=False).ids]
        encode = getattr(self._bpe, "encode_batch_fast", self._bpe.encode_batch)
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]

    @functools.cached_property
    def _runs(self) -> re.Pattern[str]:
        letters = "".join(map(re.escape, sorted(self.alphabet)))
        return re.compile(f"([{letters}]++)|[^{letters}]++")

    @functools.cached_property
    def _bpe(self) -> tokenizers.Tokenizer:
        merges: list[tuple[str, str]] = []
        for piece in sorted(self._index, key=lambda piece: (self.priorities[self._index[piece]], self._index[piece])):
            cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in self._index and piece[cut:] in self._index]
            merges += [(piece[:cut], piece[cut:]) for cut in cuts]
        return tokenizers.Tokenizer(tokenizers.models.BPE(self._index, merges))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_bpe"}
