"""New domain vocabularies from texts, and the measure that tells what they are worth.

    CR(τ, D) = Σ_{x in D} characters(x) / Σ_{x in D} tokens_τ(x)       compression ratio (arXiv 2508.15763, section 2.2)

A vocabulary is trained by byte-pair encoding over whole texts of a domain: a piece may hold any characters, spaces
too, but a digit stands alone. Ids: 0 is the unknown piece, then merges in the order found, then single characters from
frequent to rare, as in the published models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import tokenizers

from lit_interns1.data.dynamic_tokenizer.tokenizer import DynamicTokenizer
from lit_interns1.data.dynamic_tokenizer.vocabulary import UNKNOWN_PIECE, DomainVocabulary
from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError

PLAIN = "plain text"
"""Name of what is in no domain."""
_BATCH_CHARACTERS = 4_000_000


def train_vocabulary(
    texts: Iterable[str], size: int = 1024, split_digits: bool = True, longest_piece: int = 16
) -> DomainVocabulary:
    """Trains a vocabulary by byte-pair encoding.

    Args:
        texts: Texts of the domain, e.g. one molecule each.
        size: Pieces, with the unknown piece and single characters; fewer if no pair of pieces occurs twice any more.
        split_digits: Whether a digit is always a piece of its own.
        longest_piece: Characters of the longest piece.

    Raises:
        TokenizerError: If there is no text, `size` does not hold the characters, or `longest_piece` is not positive.
    """
    if longest_piece < 1:
        raise TokenizerError(f"longest_piece must be at least 1, got {longest_piece}")
    counts: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for text in texts:
            counts.update(text)
            yield text

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    splitters = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = splitters.Digits(individual_digits=True) if split_digits else splitters.Sequence([])
    kept = list(counted())
    if not counts:
        raise TokenizerError("there is no text to train a vocabulary from")
    if size < len(counts) + 1:
        raise TokenizerError(
            f"size must be at least {len(counts) + 1} for the {len(counts)} characters of the texts and the unknown "
            f"piece, got {size}"
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=2, show_progress=False, max_token_length=longest_piece + 1,
        initial_alphabet=sorted(counts), limit_alphabet=len(counts),
    )  # fmt: skip
    tokenizer.train_from_iterator(kept, trainer, length=len(kept))
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # the trainer's limit is meant to be exclusive in some versions
    learned = [piece for piece, _ in by_id if 1 < len(piece) <= longest_piece]
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    return DomainVocabulary([UNKNOWN_PIECE, *learned, *characters])


@dataclass(frozen=True)
class CompressionRatio:
    """Characters and tokens of texts, overall and by domain.

    Attributes:
        characters: Characters by domain; `plain text` for what is in none. Tags belong to plain text.
        tokens: Tokens by domain.
    """

    characters: Mapping[str, int]
    tokens: Mapping[str, int]

    @property
    def overall(self) -> float:
        """Characters per token of all texts."""
        return sum(self.characters.values()) / max(1, sum(self.tokens.values()))

    @property
    def by_domain(self) -> dict[str, float]:
        """Characters per token by domain, where there is one."""
        return {name: self.characters[name] / count for name, count in self.tokens.items() if count}


def compression_ratio(tokenizer: TextTokenizer, texts: Iterable[str]) -> CompressionRatio:
    """Measures characters per token.

    Args:
        tokenizer: Any tokenizer; one without domains has plain text only.
        texts: What to encode, without end-of-text tokens.
    """
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for batch in _batches(texts):
        if isinstance(tokenizer, DynamicTokenizer):
            for segment, count in tokenizer.counted_segments(batch):
                characters[segment.domain or PLAIN] += len(segment.text)
                tokens[segment.domain or PLAIN] += count
        else:
            characters[PLAIN] += sum(map(len, batch))
            tokens[PLAIN] += sum(map(len, tokenizer.encode_batch(batch)))
    return CompressionRatio(dict(characters), dict(tokens))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
