"""The dynamic tokenizer: spans, ids, tags in any order, what comes back, files, and its use in training."""

from __future__ import annotations

import json
import multiprocessing
from itertools import islice, pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_interns1.data import TextDataModule, TextSource
from lit_interns1.data.dynamic_tokenizer import (
    DomainSpec,
    DomainVocabulary,
    DynamicTokenizer,
    Segment,
    SmilesDetector,
    detectors,
    standard_domain,
    train_vocabulary,
)
from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError, load_tokenizer
from lit_interns1.data.validation_tokens import bytes_per_token, tokenizer_hash

MOLECULES = list(islice(TextSource("bundled:molecules").documents(), 500))
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
GENE = "ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG"
TAGS = [f"<{slash}{tag}>" for tag in ("SMILES", "protein", "dna", "rna", "MOLFORMULA") for slash in ("", "/")]


def build(base: TextTokenizer | None = None, **options) -> DynamicTokenizer:
    pairs = [a + b for a in "ATCGU" for b in "ATCGU"]
    return DynamicTokenizer.extend(
        base or load_tokenizer(),
        [
            DomainSpec("SMILES", train_vocabulary(MOLECULES, size=150), ("SMILES",), SmilesDetector("grammar")),
            standard_domain("PROT", DomainVocabulary(["<unk>", "MK", "TA", "LL", *"ACDEFGHIKLMNPQRSTVWY"])),
            standard_domain("XNA", DomainVocabulary(["<unk>", *pairs, *"ATCGU"])),
        ],
        **options,
    )


TOKENIZER = build()
BASE = load_tokenizer()


def domains_of(text: str) -> list[tuple[str, str | None]]:
    return [tuple(segment) for segment in TOKENIZER.segments(text)]


def test_ranges_of_ids():
    # the bundled tokenizer has the tags of SMILES; six are new
    assert TOKENIZER.vocab_size == 4096 + 6 + 150 + 24 + 31
    assert TOKENIZER.padded_vocab_size == 4352  # 34 · 128
    assert TOKENIZER.id_range("SMILES") == range(4102, 4252)
    assert TOKENIZER.id_range("PROT") == range(4252, 4276)
    assert TOKENIZER.id_range("XNA") == range(4276, 4307)
    assert TOKENIZER.tokenizer.token_to_id("</rna>") == 4101
    assert BASE.vocab_size == 4096, "the base is not changed"
    assert (TOKENIZER.end_of_text, TOKENIZER.end_of_text_id) == ("<|endoftext|>", 0)
    with pytest.raises(TokenizerError, match="there is no domain 'x', only SMILES, PROT, XNA"):
        TOKENIZER.id_range("x")


def test_detection():
    text = f"Aspirin is {ASPIRIN}, {PROTEIN} is read from {GENE}."
    assert domains_of(text) == [
        ("Aspirin is ", None), (ASPIRIN, "SMILES"), (", ", None), (PROTEIN, "PROT"), (" is read from ", None),
        (GENE, "XNA"), (".", None),
    ]  # fmt: skip
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert {token for token in ids if token in TOKENIZER.id_range("PROT")}
    smiles = TOKENIZER.domains[0].vocabulary
    expected = [*BASE.encode("Aspirin is "), *(4102 + i for i in smiles.encode_batch([ASPIRIN])[0])]
    assert ids[: len(expected)] == expected
    # too short, valence, letters that touch
    for plain in ("CC(=O)OC", "C(C)(C)(C)(C)CCCCC", f"x{ASPIRIN}", f"{ASPIRIN}x", PROTEIN[:26], GENE[:26]):
        assert domains_of(plain) == [(plain, None)]
        assert TOKENIZER.encode(plain) == BASE.encode(plain)


def test_tags():
    assert domains_of("a <SMILES>CC</SMILES> b") == [("a <SMILES>", None), ("CC", "SMILES"), ("</SMILES> b", None)]
    # both tags of nucleic acids lead to one vocabulary; tags switch detection off
    assert domains_of(f"<dna>ACGT</dna><rna>ACGU</rna><SMILES>{GENE}") == [
        ("<dna>", None), ("ACGT", "XNA"), ("</dna><rna>", None), ("ACGU", "XNA"), ("</rna><SMILES>", None),
        (GENE, "SMILES"),
    ]  # fmt: skip
    # nested: the inner one, then the outer one again; an end tag takes the top off whatever it names
    assert domains_of("<SMILES>C<protein>M</dna>N</SMILES>O") == [
        ("<SMILES>", None), ("C", "SMILES"), ("<protein>", None), ("M", "PROT"), ("</dna>", None), ("N", "SMILES"),
        ("</SMILES>O", None),
    ]  # fmt: skip
    # an end without a beginning changes nothing
    assert domains_of(f"</protein>{ASPIRIN}") == [("</protein>", None), (ASPIRIN, "SMILES")]
    # other added tokens stay what they are
    assert domains_of("<SMILES>CC<|endoftext|>CC") == [
        ("<SMILES>", None), ("CC", "SMILES"), ("<|endoftext|>", None), ("CC", "SMILES"),
    ]  # fmt: skip
    assert 0 in TOKENIZER.encode("<SMILES>CC<|endoftext|>CC")


def test_protecting_tags():
    inside = f"<MOLFORMULA>{ASPIRIN}</MOLFORMULA>"
    assert domains_of(inside + ASPIRIN) == [
        ("<MOLFORMULA>", None), (ASPIRIN, None), ("</MOLFORMULA>", None), (ASPIRIN, "SMILES"),
    ]  # fmt: skip
    ids = TOKENIZER.encode(inside)
    assert ids == [i for part in ("<MOLFORMULA>", ASPIRIN, "</MOLFORMULA>") for i in BASE.encode(part)]
    assert TOKENIZER.decode(ids) == inside
    # detection is on again where a protecting end tag closes a domain's tag, though its vocabulary is still in use
    assert domains_of(f"<SMILES>C</MOLFORMULA>CC {GENE}") == [
        ("<SMILES>", None), ("C", "SMILES"), ("</MOLFORMULA>", None), ("CC ", "SMILES"), (GENE, "XNA"),
    ]  # fmt: skip


def test_characters_outside_a_vocabulary_go_to_the_base():
    text = "<SMILES>CC é漢 x?O</SMILES>"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    inside = [token for token in ids if token in TOKENIZER.id_range("SMILES")]
    assert TOKENIZER.decode(inside) == "CCO"
    assert ids[ids.index(inside[-1]) - len(BASE.encode(" é漢 x?")) : ids.index(inside[-1])] == BASE.encode(" é漢 x?")
    assert TOKENIZER.id_range("SMILES").start not in ids, "the unknown piece is never used"


def test_batches_are_single_texts():
    texts = ["", "plain", ASPIRIN, f"<protein>{PROTEIN}", "", f"{GENE} {ASPIRIN}", "<SMILES>", "é" * 50]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert (TOKENIZER.encode(""), TOKENIZER.encode_batch([]), TOKENIZER.segments("")) == ([], [], [])
    counts = list(TOKENIZER.counted_segments(texts))
    assert sum(count for _, count in counts) == sum(map(len, TOKENIZER.encode_batch(texts)))
    assert [segment for segment, _ in counts] == [part for text in texts for part in TOKENIZER.segments(text)]


def test_decoding():
    start = TOKENIZER.id_range("XNA").start
    assert TOKENIZER.decode([start + 1, start + 30]) == "AAU"
    assert (TOKENIZER.token(start + 26), TOKENIZER.token(start)) == ("A", "<unk>")
    assert TOKENIZER.decode([0, start + 26, 0], skip_special_tokens=True) == "A"
    assert TOKENIZER.decode([4300 + 100, 10**9]) == "", "padding of the embedding stands for nothing"
    # a character cut in two by a domain's token is no character
    halves = BASE.encode("漢")
    if len(halves) > 1:
        assert TOKENIZER.decode([halves[0], start + 26, *halves[1:]]).count("�") >= 1


SOUP = st.lists(
    st.one_of(
        st.sampled_from([*TAGS, ASPIRIN, PROTEIN, GENE, "<|endoftext|>", "C[C@H](N)C(=O)O", " ", "▁", "Ġ", "e\u0301"]),
        st.sampled_from(["<SMILES_AUTO_DETECT>", "</SMILES_AUTO_DETECT>", "<PROT_AUTO_DETECT>", "<XNA_AUTO_DETECT>"]),
        st.sampled_from(["<SMILES", "SMILES>", "</", "<|SMILES_CC|>", "<unk>", "[", "]"]),
        st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=8),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(SOUP)
def test_any_text_comes_back(text: str):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    segments = TOKENIZER.segments(text)
    assert "".join(segment.text for segment in segments) == text
    ranges = {name: TOKENIZER.id_range(name) for name in ("SMILES", "PROT", "XNA")}
    at = 0
    for segment, count in TOKENIZER.counted_segments([text]):
        for token in ids[at : at + count]:
            home = next((name for name, ids_of in ranges.items() if token in ids_of), None)
            assert home in (None, segment.domain)
            assert home is not None or token < 4102
        at += count
    assert at == len(ids)
    assert all(a.domain != b.domain or a.domain or "MOLFORMULA" in a.text + b.text for a, b in pairwise(segments))


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200))
def test_plain_text_is_the_base(text: str):
    if all(segment.domain is None for segment in TOKENIZER.segments(text)) and "MOLFORMULA" not in text:
        assert TOKENIZER.encode(text) == BASE.encode(text)


def test_markers_are_text():
    """The published code wraps hits in markers; here a text that holds them is text."""
    for marker in ("<SMILES_AUTO_DETECT>", "</XNA_AUTO_DETECT>"):
        assert TOKENIZER.encode(marker) == BASE.encode(marker)
        assert domains_of(f"{marker} {ASPIRIN}") == [(f"{marker} ", None), (ASPIRIN, "SMILES")]


def test_normal_form_and_metaspace():
    tokenizer = build(normalization="NFC", metaspace_is_space=True)
    assert tokenizer.decode(tokenizer.encode("cafe\u0301 a▁b <SMILES>C▁C")) == "café a b <SMILES>C C"
    assert TOKENIZER.decode(TOKENIZER.encode("cafe\u0301 a▁b <SMILES>C▁C")) == "cafe\u0301 a▁b <SMILES>C▁C"


@pytest.mark.parametrize(
    "unit", ["C", "<SMILES>", "</SMILES>", "<MOLFORMULA>", "CC(=O)x", "[", "<SMILES>CCO</SMILES> "]
)
def test_long_texts(unit: str):
    text = unit * (60_000 // len(unit))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_files(tmp_path: Path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        copy = load_tokenizer(path)
        assert isinstance(copy, DynamicTokenizer)
        assert (copy.fingerprint, copy.definition()) == (TOKENIZER.fingerprint, TOKENIZER.definition())
        assert copy.encode(f"{ASPIRIN} <protein>{PROTEIN}") == TOKENIZER.encode(f"{ASPIRIN} <protein>{PROTEIN}")
    assert load_tokenizer(tmp_path, end_of_text="<rna>").end_of_text_id == 4100
    assert build(normalization="NFC").fingerprint != TOKENIZER.fingerprint
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for change, message in (
        ({"version": 2}, "version 2 of the format is not known, only 1"),
        ({"base": {}}, "not a dynamic tokenizer"),
        ({"domains": [{}]}, r"not a dynamic tokenizer \(KeyError"),
        ({"protected": ["SMILES"]}, "the tag <SMILES> is given twice"),
        ({"domains": [saved["domains"][0] | {"offset": 9}]}, "'SMILES' begin at 9, but the base tokenizer has ids up"),
        ({"domains": [saved["domains"][0], saved["domains"][1] | {"offset": 4200}]}, "'PROT' begin at 4200"),
        ({"domains": [saved["domains"][0] | {"reserved": []}]}, "'<unk>' holds"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(saved | change))
        with pytest.raises(TokenizerError, match=rf"other\.json.*{message}"):
            load_tokenizer(tmp_path / "other.json")


def test_ids_depend_on_the_check(monkeypatch, tmp_path: Path):
    """A file that leaves the check open is another tokenizer where RDKit is missing."""
    pytest.importorskip("rdkit")
    spec = standard_domain("SMILES", TOKENIZER.domains[0].vocabulary)
    with_rdkit = DynamicTokenizer.extend(BASE, [spec])
    monkeypatch.setattr(detectors.importlib.util, "find_spec", lambda name: None)
    without = DynamicTokenizer.extend(BASE, [standard_domain("SMILES", TOKENIZER.domains[0].vocabulary)])
    assert with_rdkit.fingerprint != without.fingerprint
    assert with_rdkit.definition() == without.definition()


def test_refused():
    smiles = TOKENIZER.domains[0]
    with pytest.raises(TokenizerError, match="<protein> is no added token of the base tokenizer"):
        DynamicTokenizer(BASE, [TOKENIZER.domains[1]])
    with pytest.raises(TokenizerError, match="domain 'SMILES' is given twice"):
        DynamicTokenizer.extend(BASE, [smiles, smiles])
    with pytest.raises(TokenizerError, match="the base is a dynamic tokenizer itself"):
        DynamicTokenizer.extend(TOKENIZER, [smiles])
    with pytest.raises(TokenizerError, match="the base is a dynamic tokenizer itself"):
        DynamicTokenizer(TOKENIZER, [smiles])
    with pytest.raises(TokenizerError, match="a tag must be a name without spaces and brackets, got 'a b'"):
        DynamicTokenizer.extend(BASE, [DomainSpec("x", smiles.vocabulary, ("a b",))])
    with pytest.raises(TokenizerError, match="<SMILES> protects from detection, but is a token"):
        DynamicTokenizer(TOKENIZER.tokenizer, [], protected=("SMILES",))
    with pytest.raises(TokenizerError, match=r"normalization must be NFC, .* got 'nfc'"):
        build(normalization="nfc")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="cannot be encoded in parts; use a byte-level tokenizer"):
        DynamicTokenizer.extend(words, [smiles])

    class Mine(SmilesDetector):
        settings = {"kind": "mine"}

    own = DomainSpec("x", smiles.vocabulary, ("x",), Mine("grammar"))
    with pytest.raises(TokenizerError, match="unknown kind of detector 'mine'"):
        DynamicTokenizer.extend(BASE, [own])
    assert DynamicTokenizer.extend(BASE, [own], fingerprint="mine").encode(ASPIRIN)[0] > 4096


def _encode(texts: list[str], queue) -> None:
    queue.put(TOKENIZER.encode_batch(texts))


def test_encoding_in_a_forked_process():
    texts = [f"{ASPIRIN} {n} <protein>{PROTEIN}</protein>" for n in range(50)]
    expected = TOKENIZER.encode_batch(texts)  # the threads exist before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_encode, args=(texts, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(timeout=60)
    assert process.exitcode == 0


def test_lengths_in_bytes_and_hash():
    bytes_V = bytes_per_token(TOKENIZER)
    assert bytes_V is not None
    assert len(bytes_V) == TOKENIZER.vocab_size
    text = f"é {ASPIRIN} <dna>ACGT</dna> 漢"
    assert sum(bytes_V[TOKENIZER.encode(text)]) == len(text.encode())
    assert bytes_V[TOKENIZER.id_range("XNA").start] == 0
    assert tokenizer_hash(TOKENIZER) != tokenizer_hash(TextTokenizer(TOKENIZER.tokenizer))


def test_trains_and_generates(tmp_path: Path, capsys):
    from lit_interns1.commands.generate import continue_prompt
    from lit_interns1.models import LanguageModelConfig
    from lit_interns1.modules import LanguageModelModule

    (tmp_path / "molecules.txt").write_text("\n".join(f"<SMILES>{text}</SMILES> is one" for text in MOLECULES[:200]))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    data = TextDataModule(
        [TextSource(str(tmp_path / "molecules.txt"), lines=True)], tokenizer=str(tmp_path / "tokenizer.json"),
        row_length=32, global_batch_size=4, micro_batch_size=4, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert data.vocab_size == TOKENIZER.vocab_size
    config = LanguageModelConfig(
        vocab_size=TOKENIZER.padded_vocab_size, hidden_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=16, intermediate_size=32,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(LanguageModelModule(config), data)
    rows = next(iter(data.train_dataloader())).input_ids
    smiles = TOKENIZER.id_range("SMILES")
    assert sum(int(token) in smiles for token in rows) > len(rows) / 3
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    texts = continue_prompt(tmp_path / "last.ckpt", "<SMILES>CC", max_new_tokens=20, seed=1, num_samples=2)
    assert all(text.startswith("<SMILES>CC") and len(text) > 12 for text in texts)


def test_segment_is_a_pair():
    assert TOKENIZER.segments("x") == [Segment("x", None)]
