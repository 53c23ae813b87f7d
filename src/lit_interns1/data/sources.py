"""Where text comes from: files of several kinds, read as a stream of documents.

| path                          | a document is                                                            |
|-------------------------------|--------------------------------------------------------------------------|
| `*.txt`, `*.txt.gz`           | the file; with `document_separator` a part of it; with `lines` each line |
| `*.jsonl`, `*.jsonl.gz`       | the text field of each line                                              |
| `*.parquet`                   | the text column of each row                                              |
| a directory, a glob           | all of the above in it, sorted by path                                   |
| `bundled:shakespeare`         | a scene of a play, a sonnet, or a poem                                   |
| `bundled:molecules`           | a drug-like molecule as SMILES                                           |
| `bundled:python-stdlib`       | a module of the running interpreter's standard library, without tests    |

Whatever cannot be read is an error that names the file, the place in it and what was expected.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
BUNDLED_FILES = {"bundled:shakespeare": "shakespeare.jsonl.gz", "bundled:molecules": "molecules.txt.gz"}
STANDARD_LIBRARY = "bundled:python-stdlib"
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "ensurepip"}


class SourceError(ValueError):
    """A source cannot be read; the message names the file and the constraint."""


@dataclass(frozen=True)
class TextSource:
    """One named source of documents.

    Attributes:
        path: A file, a directory, a glob pattern, or one of `bundled:shakespeare`, `bundled:molecules`,
            `bundled:python-stdlib`.
        weight: Share of the training *rows* that come from this source; only the ratio to the other sources' weights
            counts. Give one to every source or to none; without, every row is read once per epoch.
        name: Name in metrics and plots; by default made of the path.
        text_field: Field (JSONL) or column (Parquet) that holds the text.
        document_separator: String that separates the documents of a `.txt` file, e.g. two newlines for a blank line.
        lines: Every line of a `.txt` file is a document (SMILES, sentences).
        prefix: Text put in front of every document, such as the tag `<SMILES>` by which a model knows the domain.
        suffix: Text put behind every document.

    Raises:
        SourceError: For an empty path, an unknown `bundled:` name, a weight that is not positive, or `lines` together
            with `document_separator`.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    text_field: str = "text"
    document_separator: str | None = None
    lines: bool = False
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise SourceError("TextSource: path must not be empty")
        if self.path.startswith("bundled:") and self.path not in (*BUNDLED_FILES, STANDARD_LIBRARY):
            known = ", ".join((*BUNDLED_FILES, STANDARD_LIBRARY))
            raise SourceError(f"TextSource: path={self.path!r} is not bundled; there are {known}")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise SourceError(f"TextSource {self.path!r}: weight must be a positive number, got {self.weight}")
        if self.document_separator == "":
            raise SourceError(f"TextSource {self.path!r}: document_separator must not be empty")
        if self.lines and self.document_separator is not None:
            raise SourceError(f"TextSource {self.path!r}: give either lines=True or document_separator, not both")
        if not self.text_field:
            raise SourceError(f"TextSource {self.path!r}: text_field must not be empty")

    @property
    def display_name(self) -> str:
        """`name`, else the part of the path that tells most."""
        if self.name:
            return self.name
        if self.path.startswith("bundled:"):
            return self.path.removeprefix("bundled:")
        fixed = [part for part in Path(self.path).parts if not glob.has_magic(part)]
        last = fixed[-1] if fixed else "source"
        for suffix in sorted(SUFFIXES, key=len, reverse=True):
            if last.lower().endswith(suffix):
                return last[: -len(suffix)] or last
        return last

    @property
    def splits_lines(self) -> bool:
        """Whether every line is a document."""
        return self.lines or self.path == "bundled:molecules"

    def files(self) -> list[Path]:
        """The files of this source, sorted by path.

        Raises:
            SourceError: If nothing is found, a suffix is unknown, or a file is empty.
        """
        if self.path == STANDARD_LIBRARY:
            return _standard_library_files()
        if self.path in BUNDLED_FILES:
            return [BUNDLED_FOLDER / BUNDLED_FILES[self.path]]
        path = Path(self.path).expanduser()
        if path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if entry.is_file() and _suffix(entry))
            if not found:
                raise SourceError(f"{self.path}: the directory holds no file that ends in {', '.join(SUFFIXES)}")
        elif path.exists():
            found = [path]
        elif glob.has_magic(self.path):
            found = sorted(Path(entry) for entry in glob.glob(str(path), recursive=True) if Path(entry).is_file())
            if not found:
                raise SourceError(f"{self.path}: the pattern matches no file")
        else:
            raise SourceError(f"{self.path}: no such file or directory")
        for entry in found:
            if not _suffix(entry):
                raise SourceError(f"{entry}: cannot tell the kind of file; the name must end in {', '.join(SUFFIXES)}")
            if entry.stat().st_size == 0:
                raise SourceError(f"{entry}: the file is empty (0 bytes)")
        return found

    def content_hash(self) -> str:
        """A hash of the contents and kinds of all files and of every option that changes the documents."""
        digest = hashlib.blake2b(digest_size=16)
        options = [self.text_field, self.document_separator, self.splits_lines, self.prefix, self.suffix]
        digest.update(json.dumps(options).encode())
        for path in self.files():
            digest.update(f"\0{_suffix(path) or path.suffix}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Streams the texts of all documents; those without any text but white space are left out.

        Raises:
            SourceError: At the first thing that cannot be read, or at the end if there was no document at all.
        """
        files, found = self.files(), 0
        fields_seen: set[str] = set()
        for path in files:
            for text in self._read(path, fields_seen):
                if text and not text.isspace():
                    found += 1
                    yield f"{self.prefix}{text}{self.suffix}"
        if found:
            return
        what = self.path if len(files) > 1 else str(files[0])
        if fields_seen and self.text_field not in fields_seen:
            seen = ", ".join(sorted(fields_seen))
            raise SourceError(f"{what}: no row has the field text_field={self.text_field!r}; the fields are: {seen}")
        raise SourceError(f"{what}: no usable document: there is no text but white space")

    def _read(self, path: Path, fields_seen: set[str]) -> Iterator[str]:
        suffix = _suffix(path)
        if suffix == ".parquet":
            return self._read_parquet(path, fields_seen)
        if suffix in (".jsonl", ".jsonl.gz"):
            return self._read_json_lines(path, fields_seen)
        if suffix is None:  # a module of the standard library, in the encoding that it declares
            with tokenize.open(path) as stream:
                return iter([stream.read()])
        if self.splits_lines:
            return (line.rstrip("\r\n") for _, line in _decoded_lines(path))
        if self.document_separator is not None:
            return _split(_decoded_lines(path), self.document_separator)
        return iter(["".join(line for _, line in _decoded_lines(path))])

    def _read_json_lines(self, path: Path, fields_seen: set[str]) -> Iterator[str]:
        for number, line, row in json_objects(path):
            fields_seen.update(row)
            text = row.get(self.text_field)
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise SourceError(f"{path}, line {number}: the field {self.text_field!r} must be a string, got {kind}")
            if text and "\\u" in line:
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise SourceError(
                        f"{path}, line {number}: the field {self.text_field!r} holds half of a surrogate pair"
                    ) from None
            yield text or ""

    def _read_parquet(self, path: Path, fields_seen: set[str]) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
        with file:
            schema = file.schema_arrow
            fields_seen.update(schema.names)
            if self.text_field not in schema.names:
                return
            kind = schema.field(self.text_field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise SourceError(f"{path}: the column {self.text_field!r} must hold strings, got {kind}")
            try:
                for batch in file.iter_batches(batch_size=1024, columns=[self.text_field]):
                    yield from (text or "" for text in batch.column(0).to_pylist())
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{path}: damaged Parquet file ({_first_line(error)})") from None


def named_sources(sources: Any, kind: Any = TextSource) -> list[Any]:
    """Turns paths, mappings and sources into a list of sources with distinct names.

    Args:
        sources: One or several.
        kind: Class of the sources; it has `path`, `weight` and `display_name`.

    Raises:
        SourceError: If there is none, two have the same name, or some but not all have a weight.
    """
    if isinstance(sources, (kind, str, dict)):
        sources = [sources]
    listed = []
    for entry in sources:
        if isinstance(entry, str):
            entry = kind(entry)
        elif isinstance(entry, dict):
            try:
                entry = kind(**entry)
            except TypeError as error:
                raise SourceError(f"sources: {entry!r} does not describe a source ({error})") from None
        elif not isinstance(entry, kind):
            raise SourceError(f"sources: expected a path, a mapping or a {kind.__name__}, got {type(entry).__name__}")
        listed.append(entry)
    if not listed:
        raise SourceError("sources: at least one is needed")
    names = [source.display_name for source in listed]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"sources: {names.count(name)} are called {name!r}; give each its own `name`")
    without = [source.display_name for source in listed if source.weight is None]
    if without and len(without) < len(listed):
        raise SourceError(f"sources: {', '.join(without)} have no weight, the others do; give one to all or to none")
    return listed


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(".py"):  # only the standard library gets here: `files` refuses it elsewhere
        return None
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end), newlines as `\\n`, without a byte-order mark."""
    number = offset = 0
    try:
        with _open(path) as stream:
            for raw in stream:
                number += 1
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise SourceError(
                        f"{path}, line {number}: not UTF-8: byte 0x{raw[error.start]:02x} at offset "
                        f"{offset + error.start} ({error.reason}); convert the file to UTF-8"
                    ) from None
                offset += len(raw)
                if number == 1:
                    line = line.removeprefix("\ufeff")
                yield number, line.replace("\r\n", "\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: truncated or damaged gzip file, after line {number} ({error})") from None


def json_objects(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a JSONL file (also `.gz`), each with the number of its line, from 1, and the line; empty lines are
    left out.

    Raises:
        SourceError: At the first line that is no JSON object in UTF-8.
    """
    for number, line in _decoded_lines(path):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, line, row


def _split(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[str]:
    pending = ""
    block: list[str] = []
    size = 0
    for _, line in lines:
        block.append(line)
        size += len(line)
        if size >= 1 << 20:
            *documents, pending = (pending + "".join(block)).split(separator)
            yield from documents
            block, size = [], 0
    yield from (pending + "".join(block)).split(separator)


def _standard_library_files() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise SourceError(f"{STANDARD_LIBRARY}: this interpreter has no standard library sources as files")
    found = []
    for path in sorted(folder.rglob("*.py"), key=lambda entry: entry.relative_to(folder).as_posix()):
        inside = path.relative_to(folder)
        left_out = _LEFT_OUT_FOLDERS.intersection(inside.parts) or inside.name.startswith("_sysconfigdata")
        if not left_out and path.stat().st_size:
            found.append(path)
    if not found:
        raise SourceError(f"{STANDARD_LIBRARY}: this interpreter has no standard library sources as files")
    return found
