"""The tokenizer files of Intern-S1-Pro against ids that the official code gave for 300 texts.

The files are not part of this project: name their folder in LIT_INTERNS1_TOKENIZER_DIR.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lit_interns1.data.dynamic_tokenizer import DynamicTokenizer, SmilesDetector, compression_ratio
from lit_interns1.data.tokenizer import TokenizerError, load_tokenizer

FOLDER = os.environ.get("LIT_INTERNS1_TOKENIZER_DIR", "")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "interns1_pro_tokenizer.json").read_text(encoding="utf-8"))
TEXTS, IDS = [entry["text"] for entry in GOLDEN], [entry["ids"] for entry in GOLDEN]

pytestmark = pytest.mark.skipif(not FOLDER, reason="LIT_INTERNS1_TOKENIZER_DIR names no folder of tokenizer files")


@pytest.fixture(scope="module")
def tokenizer() -> DynamicTokenizer:
    loaded = load_tokenizer(FOLDER)
    assert isinstance(loaded, DynamicTokenizer)
    return loaded


def test_layout(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (154766, 151643)
    assert [tokenizer.id_range(name) for name in ("SMILES", "PROT", "XNA")] == [
        range(151694, 152718), range(152718, 153742), range(153742, 154766),
    ]  # fmt: skip
    assert tokenizer.encode("<SMILES></rna>") == [151686, 151693]


def test_ids_with_rdkit(tokenizer):
    pytest.importorskip("rdkit")
    assert tokenizer.domains[0].detector.resolved_check == "rdkit"
    assert tokenizer.encode_batch(TEXTS) == IDS
    assert [tokenizer.encode(text) for text in TEXTS] == IDS


@pytest.mark.parametrize("check", ["grammar", "rules"])
def test_ids_without_rdkit(tokenizer, monkeypatch, check: str):
    detector = tokenizer.domains[0].detector
    assert isinstance(detector, SmilesDetector)
    monkeypatch.setattr(detector, "resolved_check", check)
    equal = sum(ids == expected for ids, expected in zip(tokenizer.encode_batch(TEXTS), IDS, strict=True))
    print(f"check={check!r}: {equal} of {len(IDS)} texts have the ids of the official code with RDKit")
    assert equal >= 0.95 * len(IDS)


def test_decoding(tokenizer):
    assert [tokenizer.decode(ids) for ids in IDS] == TEXTS


def test_saved_form(tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    copy = load_tokenizer(tmp_path)
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    ratio = compression_ratio(tokenizer, TEXTS)
    print({name: round(value, 2) for name, value in ratio.by_domain.items()})
    assert ratio.by_domain["SMILES"] > 1.5


def test_folders_that_lack_something(tmp_path: Path):
    for name in os.listdir(FOLDER):
        shutil.copyfile(Path(FOLDER) / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"offset_PROT": None}))
    with pytest.raises(TokenizerError, match="offset_PROT must be a number, got None"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"offset_PROT": 151700}))
    with pytest.raises(TokenizerError, match="the domain 'PROT' begin at 151700"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").rename(tmp_path / "other.txt")
    with pytest.raises(TokenizerError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "other.txt").rename(tmp_path / "merges.txt")
    shutil.copyfile(tmp_path / "tokenizer_XNA.model", tmp_path / "tokenizer_IUPAC.model")
    with pytest.raises(TokenizerError, match="tags and detector of the domain 'IUPAC' are not known"):
        load_tokenizer(tmp_path)
