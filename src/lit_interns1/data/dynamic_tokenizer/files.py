"""Dynamic tokenizers on disk: the published folders, and one JSON file of our own.

Intern-S1-Pro    vocab.json, merges.txt, added_tokens.json, tokenizer_config.json (offset_SMILES, …), and a
                 SentencePiece file tokenizer_NAME.model for each of SMILES, PROT, XNA
ours             what `DynamicTokenizer.save` writes: the base tokenizer, the pieces and the settings
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from lit_interns1.data.dynamic_tokenizer.detectors import LetterRunDetector, SmilesDetector, detector_from_settings
from lit_interns1.data.dynamic_tokenizer.tokenizer import _VERSION, FORMAT, DomainSpec, DynamicTokenizer
from lit_interns1.data.dynamic_tokenizer.vocabulary import DomainVocabulary
from lit_interns1.data.gguf_tokenizer import SPLITTERS
from lit_interns1.data.tokenizer import TokenizerError

_MODEL_FILES = "tokenizer_*.model"
NUCLEOTIDES = "ATCGU"


def standard_domain(name: str, vocabulary: DomainVocabulary, offset: int | None = None) -> DomainSpec:
    """The domain of a name, with the tags and the detector of Intern-S1-Pro.

    Args:
        name: `SMILES`, `PROT` or `XNA`; any other name gives a domain that only its own tags lead to.
        vocabulary: Its pieces.
        offset: Id of its first piece; None = behind what is before it.
    """
    if name == "SMILES":
        return DomainSpec(name, vocabulary, ("SMILES",), SmilesDetector(), offset)
    if name == "PROT":
        return DomainSpec(name, vocabulary, ("protein",), LetterRunDetector(not_only=NUCLEOTIDES), offset)
    if name == "XNA":
        return DomainSpec(name, vocabulary, ("dna", "rna"), LetterRunDetector(NUCLEOTIDES), offset)
    return DomainSpec(name, vocabulary, (name,), None, offset)


STANDARD_DOMAINS = ("SMILES", "PROT", "XNA")
"""In the order in which they are detected."""


def is_published_folder(folder: Path) -> bool:
    """Whether a directory holds a tokenizer of Intern-S1-Pro's kind."""
    return (folder / "vocab.json").is_file() and any(folder.glob(_MODEL_FILES))


def load_published_folder(folder: Path, end_of_text: str | None = None) -> DynamicTokenizer:
    """Reads the tokenizer files of Intern-S1-Pro.

    Raises:
        TokenizerError: If a file is missing or damaged, or a domain is not known.
    """
    needed = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise TokenizerError(f"{folder}: {_MODEL_FILES} is there, but {', '.join(missing)} is missing")
    config, added = _read_object(folder / "tokenizer_config.json"), _read_object(folder / "added_tokens.json")
    models = {path.stem.removeprefix("tokenizer_"): path for path in sorted(folder.glob(_MODEL_FILES))}
    if unknown := sorted(set(models) - set(STANDARD_DOMAINS)):
        raise TokenizerError(
            f"{models[unknown[0]]}: tags and detector of the domain {unknown[0]!r} are not known, only those of "
            f"{', '.join(STANDARD_DOMAINS)}"
        )
    domains = []
    for name in (name for name in STANDARD_DOMAINS if name in models):
        offset = config.get(f"offset_{name}")
        if not isinstance(offset, int):
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: offset_{name} must be a number, got {offset!r}")
        domains.append(standard_domain(name, DomainVocabulary.from_sentencepiece(models[name]), offset))
    base = _published_base(folder, added, config, min(int(domain.offset or 0) for domain in domains))
    digest = hashlib.blake2b(digest_size=16)
    for path in (*(folder / name for name in needed), *models.values()):
        digest.update(path.read_bytes())
    return DynamicTokenizer(
        base, domains, normalization="NFC", metaspace_is_space=True, end_of_text=end_of_text,
        fingerprint=digest.hexdigest(), origin=str(folder),
    )  # fmt: skip


def _published_base(
    folder: Path, added: Mapping[str, Any], config: Mapping[str, Any], end: int
) -> tokenizers.Tokenizer:
    """Qwen's byte-level BPE; a vocabulary saved with names for the pieces of the domains is cut at `end`."""
    vocabulary = _read_object(folder / "vocab.json")
    taken = {str(token): index for token, index in vocabulary.items() if isinstance(index, int) and index < end}
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        first = 1 if lines[0].startswith("#version") else 0
        merges = [(pair[0], pair[1]) for pair in (line.split() for line in lines[first:]) if len(pair) == 2]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(taken, merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{folder}: vocab.json and merges.txt are not a byte-level BPE ({error})") from None
    tokenizer.pre_tokenizer = SPLITTERS["qwen2"].pre_tokenizer()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    details = config.get("added_tokens_decoder", {})
    for content, index in sorted(added.items(), key=lambda item: item[1]):
        special = bool(details.get(str(index), {}).get("special", True))
        token = tokenizers.AddedToken(content, special=special, normalized=False)
        tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(content) != index:
            raise TokenizerError(
                f"{folder / 'added_tokens.json'}: {content!r} should have id {index}, but gets "
                f"{tokenizer.token_to_id(content)}: the vocabulary has a gap"
            )
    return tokenizer


def is_saved_form(content: bytes) -> bool:
    """Whether the bytes of a file are a saved `DynamicTokenizer`."""
    return FORMAT.encode() in content[:200]


def load_saved(content: bytes, origin: str, end_of_text: str | None = None) -> DynamicTokenizer:
    """Reads what `DynamicTokenizer.save` wrote.

    Raises:
        TokenizerError: If it is damaged or of another version.
    """
    try:
        saved = json.loads(content)
        if saved["version"] != _VERSION:
            raise TokenizerError(f"version {saved['version']} of the format is not known, only {_VERSION}")
        base = tokenizers.Tokenizer.from_str(json.dumps(saved["base"]))
        domains = [
            DomainSpec(
                entry["name"],
                DomainVocabulary(entry["pieces"], entry["priorities"], frozenset(entry["reserved"])),
                tuple(entry["tags"]),
                detector_from_settings(entry["detector"]),
                entry["offset"],
            )
            for entry in saved["domains"]
        ]
        return DynamicTokenizer(
            base, domains, saved["protected"], saved["normalization"], saved["metaspace_is_space"],
            end_of_text or saved["end_of_text"], content.decode("utf-8"), origin,
        )  # fmt: skip
    except TokenizerError as error:
        raise TokenizerError(f"{origin}: {str(error).removeprefix(f'{origin}: ')}") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{origin}: not a dynamic tokenizer ({type(error).__name__}: {error})") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return content
