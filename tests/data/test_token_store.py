"""Tokens on disk: content, key, and what happens when building is interrupted or raced."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from lit_interns1.data import token_store
from lit_interns1.data.sources import SourceError, TextSource
from lit_interns1.data.token_store import open_or_build
from lit_interns1.data.tokenizer import load_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    (tmp_path / "a.txt").write_text("CCO\nc1ccccc1\nCCO\nCl\n")
    return TextSource(str(tmp_path / "a.txt"), lines=True)


def test_content(source: TextSource, tmp_path: Path):
    tokenizer = load_tokenizer()
    store = open_or_build(source, tokenizer, tmp_path / "cache")
    assert store.num_documents == 4
    for index, text in enumerate(["CCO", "c1ccccc1", "CCO", "Cl"]):
        assert store.document(index).tolist() == [*tokenizer.encode(text), tokenizer.end_of_text_id]
    assert store.tokens_N.dtype == np.uint16
    assert store.document_hash_D[0] == store.document_hash_D[2] != store.document_hash_D[1]
    assert store.metadata["characters"] == 3 + 8 + 3 + 2
    copy = pickle.loads(pickle.dumps(store))
    assert copy._tokens is None
    assert copy.tokens_N.tolist() == store.tokens_N.tolist()


def test_tokenised_once_and_keyed_by_content(source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer, cache = load_tokenizer(), tmp_path / "cache"
    first = open_or_build(source, tokenizer, cache)
    monkeypatch.setattr(token_store, "_build", lambda *_: pytest.fail("tokenised again"))
    assert open_or_build(source, tokenizer, cache).key == first.key
    monkeypatch.undo()
    Path(source.path).write_text("CCO\nc1ccccc1\nCCO\nBr\n")  # the same size
    assert open_or_build(source, tokenizer, cache).key != first.key
    other = load_tokenizer(end_of_text="<|im_end|>")
    assert open_or_build(source, other, cache).document(0)[-1] == other.end_of_text_id


def test_batches_do_not_matter(source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = open_or_build(source, load_tokenizer(), tmp_path / "one")
    monkeypatch.setattr(token_store, "_BATCH_DOCUMENTS", 2)
    parts = open_or_build(source, load_tokenizer(), tmp_path / "two")
    assert whole.tokens_N.tolist() == parts.tokens_N.tolist()
    assert whole.document_end_D.tolist() == parts.document_end_D.tolist()


def test_interrupted_building_leaves_nothing(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{broken\n')
    with pytest.raises(SourceError, match="line 2: not valid JSON"):
        open_or_build(TextSource(str(tmp_path / "bad.jsonl")), load_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_store(source: TextSource, tmp_path: Path):
    store = open_or_build(source, load_tokenizer(), tmp_path / "cache")
    (store.folder / "tokens.bin").write_bytes(b"xx")
    with pytest.raises(SourceError, match=r"tokens\.bin: 2 bytes for \d+ tokens: delete the folder"):
        open_or_build(source, load_tokenizer(), tmp_path / "cache")


def test_cache_directory_that_cannot_be(source: TextSource, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match=r"cache_dir=.*cannot be written"):
        open_or_build(source, load_tokenizer(), tmp_path / "file" / "cache")


def _build_at_the_same_time(path: str, cache: str, barrier, results) -> None:
    build = token_store._build

    def wait_then_build(*arguments) -> None:
        barrier.wait(timeout=20)  # both are inside: neither has found a finished store
        build(*arguments)
        barrier.wait(timeout=20)

    token_store._build = wait_then_build
    store = open_or_build(TextSource(path, lines=True), load_tokenizer(), cache)
    results.put(store.tokens_N.tolist())


def test_two_processes_race(source: TextSource, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (source.path, str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=_build_at_the_same_time, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    both = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert both[0] == both[1]
    assert [entry.name[:7] for entry in (tmp_path / "cache").iterdir()] == ["tokens-"]
