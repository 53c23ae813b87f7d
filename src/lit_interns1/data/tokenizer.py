"""Text to token ids and back, with the `tokenizers` library alone.

Every document ends with the end-of-text id; the wrapper knows that id and a fingerprint of the vocabulary, by which
cached tokens are recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lit_interns1.data.gguf_file import GGUFError, is_gguf_file
from lit_interns1.data.gguf_tokenizer import read_gguf_tokenizer

BUNDLED_TOKENIZER = Path(__file__).parent / "bundled" / "tokenizer.json"
END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)


# The thread pool of `tokenizers` does not survive a fork: a forked child (a loader worker, a rank of ddp_fork) that
# encodes in parallel would wait for ever. The library turns parallelism off in the child, with a warning each time,
# unless the variable below is set; it is set here for the time of the fork, so that the child keeps it.
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_set_for_fork = False


def _before_fork() -> None:
    global _set_for_fork
    _set_for_fork = _PARALLELISM not in os.environ
    os.environ.setdefault(_PARALLELISM, "false")


def _after_fork_in_parent() -> None:
    if _set_for_fork:
        os.environ.pop(_PARALLELISM, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded or lacks what is needed; the message names the file."""


class TextTokenizer:
    """A thin wrapper of a `tokenizers.Tokenizer`.

    Args:
        tokenizer: The tokenizer.
        fingerprint: Identifies the vocabulary and rules; by default a hash of the serialised tokenizer.
        end_of_text: The token that ends every document; by default the first known of the common names
            (`<|endoftext|>`, `</s>`, `<eos>`, …).
        origin: Where it came from, for messages.

    Raises:
        TokenizerError: If `end_of_text` is not in the vocabulary, or none of the common names is.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        fingerprint: str | None = None,
        end_of_text: str | None = None,
        origin: str = "tokenizer",
    ) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
        self.end_of_text = next((name for name in names if tokenizer.token_to_id(name) is not None), "")
        if not self.end_of_text:
            added = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
            raise TokenizerError(
                f"{origin}: the vocabulary has no end-of-text token {' or '.join(map(repr, names))}; set end_of_text "
                f"to one of its tokens (its special tokens are: {', '.join(added[:20]) or 'none'})"
            )
        self.end_of_text_id = int(tokenizer.token_to_id(self.end_of_text) or 0)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint or hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()

    def definition(self) -> str:
        """All that determines ids, as JSON."""
        return self.tokenizer.to_str()

    def extra_pieces(self) -> Iterator[tuple[int, str]]:
        """(id, text) of pieces outside the wrapped tokenizer; there are none here."""
        return iter(())

    def save(self, path: str | Path) -> None:
        """Writes one `tokenizer.json` that `load_tokenizer` reads."""
        self.tokenizer.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-text id; special tokens written in the text become their ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        encode = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """One token as text; bytes that are no complete character show as �."""
        return self.decode([token_id])


def load_tokenizer(path: str | Path = "bundled:tokenizer", end_of_text: str | None = None) -> TextTokenizer:
    """Loads a tokenizer.

    Args:
        path: `bundled:tokenizer` (byte-level BPE, 4,096 tokens, English + SMILES + Python), a `tokenizer.json`, a
            directory with a `tokenizer.json` or with `vocab.json` and `merges.txt`, or a GGUF file.
        end_of_text: The token that ends every document; see `TextTokenizer`.

    Raises:
        TokenizerError: If there is no tokenizer at `path`, or it has no end-of-text token.
    """
    from lit_interns1.data.dynamic_tokenizer import files as dynamic  # its classes build on TextTokenizer

    if str(path).startswith("bundled:"):
        if str(path) != "bundled:tokenizer":
            raise TokenizerError(f"tokenizer={str(path)!r} is not bundled; there is only 'bundled:tokenizer'")
        file = BUNDLED_TOKENIZER
    else:
        file = Path(path).expanduser()
    if file.is_dir():
        if dynamic.is_published_folder(file):
            return dynamic.load_published_folder(file, end_of_text)
        if (file / "tokenizer.json").is_file():
            file = file / "tokenizer.json"
        elif (file / "vocab.json").is_file() and (file / "merges.txt").is_file():
            return _from_vocabulary_and_merges(file, end_of_text)
        else:
            raise TokenizerError(f"{path}: the directory has neither tokenizer.json nor vocab.json with merges.txt")
    if not file.is_file():
        raise TokenizerError(f"tokenizer={str(path)!r}: no such file or directory")
    if is_gguf_file(file):
        return _from_gguf(file, end_of_text)
    content = file.read_bytes()
    if dynamic.is_saved_form(content):
        return dynamic.load_saved(content, str(path), end_of_text)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from None
    return TextTokenizer(tokenizer, hashlib.blake2b(content, digest_size=16).hexdigest(), end_of_text, str(path))


def _from_gguf(file: Path, end_of_text: str | None) -> TextTokenizer:
    """The tokenizer in a GGUF file; its own last token ends documents if none of the common names is there."""
    try:
        tokenizer, last = read_gguf_tokenizer(file)
    except GGUFError as error:
        raise TokenizerError(str(error)) from None
    if all(tokenizer.token_to_id(name) is None for name in END_OF_TEXT_NAMES):
        end_of_text = end_of_text or last
    return TextTokenizer(tokenizer, None, end_of_text, str(file))


def _from_vocabulary_and_merges(folder: Path, end_of_text: str | None) -> TextTokenizer:
    """A byte-level BPE as GPT-2 and Qwen write it; `tokenizer_config.json` or `added_tokens.json` give added tokens."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        added: dict[int, dict[str, Any]] = {}
        if (folder / "added_tokens.json").is_file():
            listed = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
            added = {index: {"content": content, "special": True} for content, index in listed.items()}
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            added |= {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    except Exception as error:
        raise TokenizerError(f"{folder}: vocab.json and merges.txt are not a byte-level BPE ({error})") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for index, entry in sorted(added.items()):
        token = tokenizers.AddedToken(entry["content"], special=bool(entry.get("special", True)), normalized=False)
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(entry["content"]) != index:
            raise TokenizerError(
                f"{folder}: the added token {entry['content']!r} should have id {index}, but gets "
                f"{tokenizer.token_to_id(entry['content'])}: the vocabulary has a gap; use a tokenizer.json instead"
            )
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return TextTokenizer(tokenizer, digest.hexdigest(), end_of_text, str(folder))
