"""Reads SentencePiece `.model` files without the sentencepiece package.

The file is a Protocol Buffers message (proto2 wire format): a sequence of fields, each a varint key
(number << 3 | wire type) and a value.

    ModelProto       1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece    1 piece   2 score (float32)   3 type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
                     6 byte
    TrainerSpec      3 model_type: 1 unigram, 2 BPE, 3 word, 4 character
    NormalizerSpec   2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces

Only what domain vocabularies use is accepted: BPE over characters, text taken as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lit_interns1.data.tokenizer import TokenizerError

WHITESPACE_PIECE = "▁"
"""How SentencePiece writes a space."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_TYPES = {4: "user-defined", 5: "unused", 6: "byte"}
_MODEL_TYPES = {1: "unigram", 3: "word", 4: "character"}
_BPE = 2
_LARGEST_FILE = 1 << 28


class SentencePieceModel(NamedTuple):
    """What a file says.

    Attributes:
        pieces: Text of every piece by id, with spaces as spaces.
        scores: Score by id; of two possible merges the one with the larger score goes first.
        reserved: Ids that no text is encoded to: the unknown piece and control pieces.
    """

    pieces: list[str]
    scores: list[float]
    reserved: frozenset[int]


def read_sentencepiece_model(path: str | Path) -> SentencePieceModel:
    """Reads the pieces of a BPE model.

    Args:
        path: A `.model` file.

    Raises:
        TokenizerError: If it cannot be read, is no such message, is no BPE model, or changes text before encoding
            (normalisation tables, a dummy prefix, removed spaces).
    """
    file = Path(path)
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise TokenizerError(f"{file}: {file.stat().st_size} bytes, at most {_LARGEST_FILE} are read")
        content = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        return _model(content)
    except _WireError as error:
        raise TokenizerError(f"{file}: not a SentencePiece model ({error})") from None
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from None


class _WireError(ValueError):
    """The bytes are no message of this kind."""


def _model(content: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    reserved: set[int] = set()
    model_type = 1  # the default of the format
    for number, value in _fields(content):
        if number == 1:
            piece, score, kind = _piece(_message(value, "pieces"))
            if kind in _TYPES:
                raise TokenizerError(f"piece {len(pieces)} ({piece!r}) is of type {_TYPES[kind]}: not supported")
            if kind != _NORMAL:
                reserved.add(len(pieces))
            pieces.append(piece if kind != _NORMAL else piece.replace(WHITESPACE_PIECE, " "))
            scores.append(score)
        elif number == 2:
            model_type = next((int(v) for n, v in _fields(_message(value, "trainer_spec")) if n == 3), model_type)
        elif number == 3:
            _check_normalizer(_message(value, "normalizer_spec"))
    if not pieces:
        raise _WireError("it has no pieces")
    if model_type != _BPE:
        raise TokenizerError(f"model_type is {_MODEL_TYPES.get(model_type, model_type)}, only BPE is supported")
    return SentencePieceModel(pieces, scores, frozenset(reserved))


def _piece(content: bytes) -> tuple[str, float, int]:
    piece, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(content):
        if number == 1:
            try:
                piece = _message(value, "piece").decode("utf-8")
            except UnicodeDecodeError:
                raise _WireError("a piece is not UTF-8") from None
        elif number == 2:
            if not isinstance(value, float):
                raise _WireError("a score is not a float")
            score = value
        elif number == 3:
            kind = int(_number(value, "type"))
    if not piece:
        raise _WireError("a piece is empty")
    if score != score:
        raise _WireError(f"the score of piece {piece!r} is not a number")
    if kind not in (_NORMAL, _UNKNOWN, _CONTROL, *_TYPES):
        raise _WireError(f"piece {piece!r} has the unknown type {kind}")
    return piece, score, kind


def _check_normalizer(content: bytes) -> None:
    """The defaults of the format change text, so the settings must be there to be off."""
    settings: dict[int, int | float | bytes] = {3: 1, 4: 1, 5: 1, **dict(_fields(content))}
    if settings.get(2):
        raise TokenizerError("it normalises text (precompiled_charsmap): not supported")
    for number, name, needed in (
        (3, "add_dummy_prefix", False), (4, "remove_extra_whitespaces", False), (5, "escape_whitespaces", True),
    ):  # fmt: skip
        if bool(settings[number]) != needed:
            raise TokenizerError(f"{name} is {not needed}: only {needed} is supported")


def _message(value: int | float | bytes, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise _WireError(f"field {name} is not of the kind bytes")
    return value


def _number(value: int | float | bytes, name: str) -> int:
    if not isinstance(value, int):
        raise _WireError(f"field {name} is not an integer")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of a message: varints as int, fixed32 as float, length-delimited as bytes."""
    position, end = 0, len(content)
    while position < end:
        key, position = _varint(content, position)
        number, wire = key >> 3, key & 7
        value: int | float | bytes
        if wire == _VARINT:
            value, position = _varint(content, position)
        elif wire == _BYTES:
            length, position = _varint(content, position)
            if length > end - position:
                raise _WireError(f"a field of {length} bytes at byte {position} passes the end")
            value, position = content[position : position + length], position + length
        elif wire in (_FIXED32, _FIXED64):
            width = 4 if wire == _FIXED32 else 8
            if width > end - position:
                raise _WireError(f"a field of {width} bytes at byte {position} passes the end")
            value = struct.unpack_from("<f" if width == 4 else "<d", content, position)[0]
            position += width
        else:
            raise _WireError(f"unknown wire type {wire} at byte {position}")
        if number == 0:
            raise _WireError(f"field number 0 at byte {position}")
        yield number, value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            raise _WireError("it ends inside a number")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise _WireError(f"a number of more than ten bytes at byte {position}")
