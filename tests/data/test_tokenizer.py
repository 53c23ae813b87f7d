"""The bundled tokenizer, and tokenizers of users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError, load_tokenizer


def test_bundled():
    tokenizer = load_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.end_of_text_id) == (4096, "<|endoftext|>", 0)
    texts = ["To be, or not to be", "CC(=O)Nc1ccc(Cl)cc1", "def f(x):\n    return x ** 2  # é 漢字\n", ""]
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert tokenizer.decode([0], skip_special_tokens=True) == ""


def test_pieces_of_molecules():
    tokenizer = load_tokenizer()

    def pieces(text: str) -> list[str]:
        return [tokenizer.token(token) for token in tokenizer.encode(text)]

    assert pieces("CCCCl") == ["CCC", "Cl"]
    assert pieces("Clc1ccccc1Br") == ["Cl", "c", "1", "ccccc", "1", "Br"]
    assert pieces("c1c[nH]cc1C(=O)O") == ["c", "1", "c", "[nH]", "cc", "1", "C", "(=O)", "O"]
    assert pieces("12") == ["1", "2"]


def small(special: list[str]) -> tokenizers.Tokenizer:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_files_and_directories(tmp_path: Path):
    small(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    one, other = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")
    assert one.fingerprint == other.fingerprint
    assert (one.end_of_text_id, one.vocab_size) == (3, 4)
    assert load_tokenizer(tmp_path, end_of_text="b").end_of_text_id == 2
    with pytest.raises(TokenizerError, match=r"has no end-of-text token '<x>'; .*special tokens are: </s>"):
        load_tokenizer(tmp_path, end_of_text="<x>")
    with pytest.raises(TokenizerError, match=r"has no end-of-text token '<\|endoftext\|>' or '</s>'"):
        TextTokenizer(small([]))


def test_vocabulary_and_merges(tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"4": {"content": "<|im_end|>", "special": True}}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab a<|im_end|>") == [2, 3, 0, 4]
    assert tokenizer.decode([2, 3, 0]) == "ab a"
    assert tokenizer.end_of_text_id == 4
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"9": {"content": "<|im_end|>", "special": True}}})
    )
    with pytest.raises(TokenizerError, match="should have id 9, but gets 4"):
        load_tokenizer(tmp_path)


def test_missing(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"the directory has neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"none\.json'?: no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"bad\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(TokenizerError, match="there is only 'bundled:tokenizer'"):
        load_tokenizer("bundled:other")
