"""Every kind of file, and the message of everything that can be wrong with one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lit_interns1.data.sources import SourceError, TextSource, named_sources


def read(path: Path | str, **options) -> list[str]:
    return list(TextSource(str(path), **options).documents())


def test_text_files(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\n\nthree é\n".encode())
    assert read(file) == ["one\ntwo\n\nthree é\n"]
    assert read(file, document_separator="\n\n") == ["one\ntwo", "three é\n"]
    assert read(file, lines=True) == ["one", "two", "three é"]
    with gzip.open(tmp_path / "b.txt.gz", "wt") as stream:
        stream.write("C\nCC\n")
    assert read(tmp_path / "b.txt.gz", lines=True) == ["C", "CC"]
    assert TextSource(str(file)).display_name == "a"


def test_separator_across_blocks(tmp_path: Path):
    parts = [("x" * 999 + "\n") * 700, "short", ("y" * 999 + "\n") * 1500 + "end"]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    assert read(tmp_path / "a.txt", document_separator="\n\n") == [parts[0][:-1], "\nshort", parts[2]]


def test_json_lines(tmp_path: Path):
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"other": 1}, {"text": "b"}]
    content = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == ["a", "b"]
    (tmp_path / "b.jsonl").write_text('{"content": "c", "id": 1}\n')
    assert read(tmp_path / "b.jsonl", text_field="content") == ["c"]


def test_parquet(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b"]
    with pytest.raises(
        SourceError, match=r"a\.parquet: no row has the field text_field='body'; the fields are: id, text"
    ):
        read(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(SourceError, match="the column 'id' must hold strings, got int64"):
        read(tmp_path / "a.parquet", text_field="id")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"bad\.parquet: not a readable Parquet file"):
        read(tmp_path / "bad.parquet")


def test_directories_and_globs(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / "README").write_text("left out: no known suffix")
    assert read(tmp_path) == ["a", "c", "b"]
    assert read(tmp_path / "*.txt") == ["a"]
    assert read(tmp_path / "**" / "*.txt") == ["a", "b"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert read(tmp_path / "odd[1].txt") == ["odd"]  # a file of that name wins over the pattern


def test_missing(tmp_path: Path):
    with pytest.raises(SourceError, match=r"nothing\.txt: no such file or directory"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(SourceError, match=r"\*\.jsonl: the pattern matches no file"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(SourceError, match=r"the directory holds no file that ends in \.txt, "):
        read(tmp_path)


def test_unusable(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SourceError, match=r"empty\.txt: the file is empty \(0 bytes\)"):
        read(tmp_path / "empty.txt")
    (tmp_path / "white.txt").write_text(" \n\n")
    with pytest.raises(SourceError, match=r"white\.txt: no usable document"):
        read(tmp_path / "white.txt")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(SourceError, match=r"a\.csv: cannot tell the kind of file; the name must end in \.txt"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 3}\n')
    with pytest.raises(
        SourceError, match=r"a\.jsonl: no row has the field text_field='text'; the fields are: content, id"
    ):
        read(tmp_path / "a.jsonl")


def test_broken(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(SourceError, match=r"latin\.txt, line 2: not UTF-8: byte 0xe9 at offset 8"):
        read(tmp_path / "latin.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"\n')
    with pytest.raises(SourceError, match=r"a\.jsonl, line 2: not valid JSON"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('["x"]\n')
    with pytest.raises(SourceError, match=r"b\.jsonl, line 1: expected a JSON object, got list"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(SourceError, match=r"c\.jsonl, line 1: the field 'text' must be a string, got int"):
        read(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(SourceError, match=r"d\.jsonl, line 2: .* half of a surrogate pair"):
        read(tmp_path / "d.jsonl")
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz: truncated or damaged gzip file, after line [1-9]"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.txt.gz").write_bytes(b"plain text")
    with pytest.raises(SourceError, match=r"no\.txt\.gz: truncated or damaged gzip file, after line 0"):
        read(tmp_path / "no.txt.gz")


def test_options():
    for options, message in (
        ({"path": ""}, "path must not be empty"),
        ({"path": "bundled:milton"}, "path='bundled:milton' is not bundled; there are bundled:shakespeare"),
        ({"path": "a", "weight": 0.0}, "weight must be a positive number, got 0.0"),
        ({"path": "a", "weight": float("nan")}, "weight must be a positive number"),
        ({"path": "a", "lines": True, "document_separator": "x"}, "either lines=True or document_separator"),
        ({"path": "a", "document_separator": ""}, "document_separator must not be empty"),
    ):
        with pytest.raises(SourceError, match=message):
            TextSource(**options)
    with pytest.raises(SourceError, match="at least one is needed"):
        named_sources([])
    with pytest.raises(SourceError, match="2 are called 'a'; give each its own `name`"):
        named_sources(["x/a.txt", "y/a.txt"])
    with pytest.raises(SourceError, match="b have no weight, the others do"):
        named_sources([TextSource("a.txt", weight=1), "b.txt"])
    with pytest.raises(SourceError, match="does not describe a source"):
        named_sources([{"path": "a.txt", "wieght": 1}])
    assert named_sources({"path": "x/*.txt", "weight": 2})[0].display_name == "x"


def test_bundled():
    assert len(read("bundled:molecules")) == 72_000
    scenes = read("bundled:shakespeare")
    assert len(scenes) > 900
    assert any("To be, or not to be,--that is the question:--" in scene for scene in scenes)
    assert not any("Gutenberg" in scene for scene in scenes)
    files = TextSource("bundled:python-stdlib").files()
    assert len(files) > 500
    assert files == TextSource("bundled:python-stdlib").files()
    assert any(path.name == "dataclasses.py" for path in files)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)


def test_content_hash(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo")
    plain = TextSource(str(file)).content_hash()
    assert TextSource(str(file), weight=3, name="other").content_hash() == plain
    assert TextSource(str(file), lines=True).content_hash() != plain
    file.write_text("one\n\ntwa")  # same size, and the time of change may be the same
    assert TextSource(str(file)).content_hash() != plain


def test_prefix_and_suffix_stand_around_every_document_and_change_the_cache_key(tmp_path):
    path = tmp_path / "molecules.txt"
    path.write_text("CCO\n\nc1ccccc1\n")
    tagged = TextSource(str(path), lines=True, prefix="<SMILES>", suffix="</SMILES>")
    assert list(tagged.documents()) == ["<SMILES>CCO</SMILES>", "<SMILES>c1ccccc1</SMILES>"]
    assert tagged.content_hash() != TextSource(str(path), lines=True).content_hash()
