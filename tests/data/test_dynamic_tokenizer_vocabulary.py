"""Domain vocabularies: SentencePiece files, byte-pair encoding against plain and sentencepiece's, training, ratios."""

from __future__ import annotations

import contextlib
import io
import random
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from lit_interns1.data.dynamic_tokenizer import (
    DomainVocabulary,
    DynamicTokenizer,
    compression_ratio,
    standard_domain,
    train_vocabulary,
)
from lit_interns1.data.dynamic_tokenizer.sentencepiece_file import read_sentencepiece_model
from lit_interns1.data.sources import TextSource
from lit_interns1.data.tokenizer import TokenizerError, load_tokenizer


def molecules(count: int) -> list[str]:
    return [text for text, _ in zip(TextSource("bundled:molecules").documents(), range(count))]


def plain_bpe(vocabulary: DomainVocabulary, text: str) -> list[int]:
    """The definition: join the pair whose piece has the highest priority, leftmost first, until no pair joins."""
    index = {piece: i for i, piece in enumerate(vocabulary.pieces) if i not in vocabulary.reserved}
    symbols = list(text)
    while True:
        joins = [
            (vocabulary.priorities[index[a + b]], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in index
        ]
        if not joins:
            return [index[symbol] for symbol in symbols]
        at = min(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


PIECES = [("<unk>", 0.0, 2), ("ab", -0.0, 1), ("aba", -1.0, 1), ("▁a", -2.0, 1), ("a", -3.0, 1), ("b", -4.0, 1)]
PIECES += [("▁", -5.0, 1)]
NORMALIZER = field(3, 0) + field(4, 0)


def model(pieces=PIECES, model_type: int = 2, normalizer: bytes = NORMALIZER) -> bytes:
    content = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))
        for piece, score, kind in pieces
    )
    return content + field(2, field(1, b"input") + field(3, model_type) + field(4, 7)) + field(3, normalizer)


def test_reads_a_sentencepiece_file(tmp_path: Path):
    (tmp_path / "x.model").write_bytes(model([*PIECES, ("<s>", 0.0, 3)]))
    read = read_sentencepiece_model(tmp_path / "x.model")
    assert read.pieces == ["<unk>", "ab", "aba", " a", "a", "b", " ", "<s>"]
    assert read.scores == [0, 0, -1, -2, -3, -4, -5, 0]
    assert read.reserved == {0, 7}
    vocabulary = DomainVocabulary.from_sentencepiece(tmp_path / "x.model")
    assert vocabulary.encode_batch(["abab a", "ba", "ab"]) == [[1, 1, 3], [5, 4], [1]]
    assert list(vocabulary.runs("ab▁é b")) == [("ab", True), ("▁é", False), (" b", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a SentencePiece model .it has no pieces"),
        (b"\x0a\xff\xff\xff\xff\x7f", "passes the end"),
        (b"\x80" * 11, "more than ten bytes"),
        (b"\x0a", "ends inside a number"),
        (b"\x0b\x00", "unknown wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\x08\x01", "field pieces is not of the kind bytes"),
        (field(1, field(1, b"\xff")), "not UTF-8"),
        (field(1, field(2, 1.0)), "a piece is empty"),
        (field(1, field(1, b"a") + field(2, 3)), "a score is not a float"),
        (field(1, field(1, b"a") + field(3, 1.0)), "field type is not an integer"),
        (field(1, field(1, b"a") + field(2, float("nan"))), "is not a number"),
        (field(1, field(1, b"a") + field(3, 9)), "the unknown type 9"),
        (model(PIECES, model_type=1), r"model_type is unigram, only BPE"),
        (field(1, field(1, b"a")), r"model_type is unigram"),
        (model([*PIECES, ("c", 0.0, 4)]), r"piece 7 \('c'\) is of type user-defined"),
        (model([*PIECES, ("<0x00>", 0.0, 6)]), "of type byte"),
        (model(normalizer=b""), "add_dummy_prefix is True"),
        (model(normalizer=field(3, 0)), "remove_extra_whitespaces is True"),
        (model(normalizer=NORMALIZER + field(5, 0)), "escape_whitespaces is False"),
        (model(normalizer=NORMALIZER + field(2, b"map")), "precompiled_charsmap"),
        (model([*PIECES, ("a", -9.0, 1)]), r"the piece 'a' is there twice"),
        (model([*PIECES, ("ac", -9.0, 1)]), r"the piece 'ac' holds 'c'"),
        (model(PIECES[:1]), "no piece to use"),
        (b"\x0a" + b"\x05" + bytes(range(250)), "not a SentencePiece model"),
    ],
)
def test_damaged_and_other_files(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"x\.model.*{message}"):
        DomainVocabulary.from_sentencepiece(tmp_path / "x.model")


def test_any_cut_or_changed_byte_is_an_error_or_a_vocabulary(tmp_path: Path):
    rng, content = random.Random(0), model()
    for trial in range(200):
        broken = bytearray(content[: rng.randrange(len(content))] if trial % 2 else content)
        for _ in range(rng.randint(0, 3)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "x.model").write_bytes(broken)
        with contextlib.suppress(TokenizerError):
            DomainVocabulary.from_sentencepiece(tmp_path / "x.model").encode_batch(["aab", "b"])
    with pytest.raises(TokenizerError, match=r"none\.model: cannot be read"):
        DomainVocabulary.from_sentencepiece(tmp_path / "none.model")


@pytest.mark.parametrize("alphabet", ["ab", "abc", "CNO=()1"])
def test_merges_are_those_of_the_definition(alphabet: str):
    """Random vocabularies whose pieces arise in many ways, over texts with long repeats."""
    rng = random.Random(1)
    for _ in range(25):
        pieces = list(alphabet)
        while len(pieces) < 24:
            joined = rng.choice(pieces) + rng.choice(pieces)
            if joined not in pieces and len(joined) < 9:
                pieces.append(joined)
        learned = pieces[len(alphabet) :]
        rng.shuffle(learned)
        priorities = rng.sample(range(99), len(pieces) + 1)  # another order than that of the ids
        vocabulary = DomainVocabulary(["<unk>", *learned, *alphabet], priorities)
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(60)]
        texts += [rng.choice(learned) * rng.randint(2, 6) for _ in range(20)]
        assert vocabulary.encode_batch(texts) == [plain_bpe(vocabulary, text) for text in texts]


@pytest.mark.parametrize("kind", ["molecules", "nucleotides", "words"])
def test_same_ids_as_sentencepiece(tmp_path: Path, kind: str):
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(2)
    texts = {
        "molecules": molecules(1500),
        "nucleotides": ["".join(rng.choices("ATCGU", weights=(9, 2, 3, 4, 1), k=60)) for _ in range(400)],
        "words": TextSource("bundled:shakespeare").documents().__next__().split("\n")[:400],
    }[kind]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, model_type="bpe", vocab_size=220, split_digits=True,
        character_coverage=1.0, bos_id=-1, eos_id=-1, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_by_unicode_script=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "x.model").write_bytes(written.getvalue())
    oracle = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocabulary = DomainVocabulary.from_sentencepiece(tmp_path / "x.model")
    assert len(vocabulary) == oracle.get_piece_size()
    letters = sorted(vocabulary.alphabet)
    texts += ["".join(rng.choices(rng.sample(letters, min(3, len(letters))), k=40)) for _ in range(2000)]
    texts += [rng.choice(vocabulary.pieces[1:]) * rng.randint(2, 9) for _ in range(500)]
    covered = [text for text in texts if text and set(text) <= vocabulary.alphabet]
    assert len(covered) > 2400
    assert vocabulary.encode_batch(covered) == oracle.encode(covered)


def test_training():
    texts = molecules(2000)
    vocabulary = train_vocabulary(texts, size=200)
    assert (len(vocabulary), vocabulary.pieces[0], vocabulary.reserved) == (200, "<unk>", {0})
    assert vocabulary.alphabet == set("".join(texts))
    single = [piece for piece in vocabulary.pieces if len(piece) == 1]
    assert vocabulary.pieces[-len(single) :] == tuple(single)
    counts = ["".join(texts).count(piece) for piece in single]
    assert counts == sorted(counts, reverse=True)
    assert max(map(len, vocabulary.pieces)) <= 16
    assert not any(any(map(str.isdigit, piece)) and len(piece) > 1 for piece in vocabulary.pieces)
    assert any(
        any(map(str.isdigit, piece)) and len(piece) > 1
        for piece in train_vocabulary(texts, size=200, split_digits=False).pieces
    )
    assert max(map(len, train_vocabulary(texts, size=200, longest_piece=3).pieces[1:])) == 3
    assert vocabulary.encode_batch(texts[:50]) == [plain_bpe(vocabulary, text) for text in texts[:50]]
    # the first merge is the most frequent pair outside digits
    pairs: dict[str, int] = {}
    for text in texts:
        for a, b in pairwise(text):
            if not a.isdigit() and not b.isdigit():
                pairs[a + b] = pairs.get(a + b, 0) + 1
    assert vocabulary.pieces[1] == max(pairs, key=lambda pair: pairs[pair])
    with pytest.raises(TokenizerError, match=r"size must be at least 4 for the 3 characters .*, got 3"):
        train_vocabulary(["abc"], size=3)
    with pytest.raises(TokenizerError, match="there is no text"):
        train_vocabulary(["", ""])
    with pytest.raises(TokenizerError, match="longest_piece must be at least 1, got 0"):
        train_vocabulary(["abc"], longest_piece=0)


def test_compression_ratio():
    texts = molecules(400)
    base = load_tokenizer()
    tokenizer = DynamicTokenizer.extend(base, [standard_domain("SMILES", train_vocabulary(texts, size=300))])
    tagged = [f"the molecule <SMILES>{text}</SMILES>" for text in texts]
    ratio = compression_ratio(tokenizer, tagged)
    plain = compression_ratio(base, tagged)
    assert ratio.overall == sum(map(len, tagged)) / sum(map(len, tokenizer.encode_batch(tagged)))
    assert plain.by_domain == {"plain text": plain.overall}
    assert plain.overall == sum(map(len, tagged)) / sum(map(len, base.encode_batch(tagged)))
    smiles = tokenizer.id_range("SMILES")
    inside = sum(token in smiles for ids in tokenizer.encode_batch(tagged) for token in ids)
    assert (ratio.tokens["SMILES"], ratio.characters["SMILES"]) == (inside, sum(map(len, texts)))
    assert ratio.by_domain["SMILES"] > 1.5
    assert compression_ratio(tokenizer, []).by_domain == {}
