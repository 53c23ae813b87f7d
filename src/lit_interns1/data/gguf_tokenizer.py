"""The tokenizer inside a GGUF file: byte-level BPE from its tokens, merges, token types and the name of its splitter.

    text → (normalise) → added tokens cut out → split by the rule named `tokenizer.ggml.pre` → bytes → merges

The file says the name of the rule only; the rules here are those of the models' own tokenizer.json files, which the
names stand for. Where transformers' GGUF reader simplifies them (digits of "smollm", normal forms of "qwen2", whole
words of "llama-bpe") this module does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lit_interns1.data.gguf_file import GGUFError, GGUFFile

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens that are found whole in a text; the first are special."""


@dataclass(frozen=True)
class _Splitter:
    """How text is cut before merges.

    Attributes:
        digits: Longest run of digits in one piece, by the common expression; None: GPT-2's expression.
        single_digits: Cut out every digit before all else.
        compose: Compose characters first (Unicode NFC).
        whole_words: A piece that is a token is taken whole, whatever the merges say.
    """

    digits: int | None = None
    single_digits: bool = False
    compose: bool = False
    whole_words: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        if self.digits is None:
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
            if not self.single_digits:
                return byte_level
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        numbers = r"\p{N}" if self.digits == 1 else rf"\p{{N}}{{1,{self.digits}}}"
        parts = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", numbers, r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
        )  # fmt: skip
        split = pre_tokenizers.Split(Regex("|".join(parts)), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = _Splitter(digits=3, whole_words=True)
SPLITTERS: dict[str, _Splitter] = {
    "default": _Splitter(),
    "gpt-2": _Splitter(),
    "smollm": _Splitter(single_digits=True),
    "qwen2": _Splitter(digits=1, compose=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
}
"""Rules by the name in the file. "default", as also a file that names none, is taken as GPT-2's."""


def read_gguf_tokenizer(path: str | Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer of a file, and its token that ends a text, if the file names one.

    Raises:
        GGUFError: If the file is damaged, or holds no tokenizer that can be built here.
    """
    values = GGUFFile(path).metadata
    kind = values.get("tokenizer.ggml.model")
    if kind != "gpt2":
        what = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}, only 'gpt2' (byte-level BPE) is read"
        raise GGUFError(f"{path} holds {what}: {_NAME_ANOTHER}")
    name = values.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTERS:
        raise GGUFError(
            f"{path}: tokenizer.ggml.pre = {name!r} is unknown: known are {', '.join(SPLITTERS)}; {_NAME_ANOTHER}"
        )
    splitter, tokens = SPLITTERS[name], _strings(path, values, "tokenizer.ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise GGUFError(f"{path}: tokenizer.ggml.tokens holds a token twice; {_NAME_ANOTHER}")
    listed = _strings(path, values, "tokenizer.ggml.merges")
    if (wrong := next((merge for merge in listed if merge.count(" ") != 1), None)) is not None:
        raise GGUFError(f"{path}: tokenizer.ggml.merges holds {wrong!r:.80}, which is no pair; {_NAME_ANOTHER}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in listed)]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitter.whole_words))
    except Exception as error:  # tokenizers raises bare Exception
        raise GGUFError(f"{path}: tokens and merges are no BPE ({error}); {_NAME_ANOTHER}") from None
    if splitter.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter.pre_tokenizer(), decoders.ByteLevel()
    types = values.get("tokenizer.ggml.token_type", [])
    if types and (not isinstance(types, list) or len(types) != len(tokens)):
        raise GGUFError(f"{path}: tokenizer.ggml.token_type does not go with its {len(tokens)} tokens")
    control = [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == _CONTROL and t]
    defined = [AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == _USER_DEFINED and t]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(defined)
    last = values.get("tokenizer.ggml.eos_token_id")
    return tokenizer, tokens[last] if isinstance(last, int) and 0 <= last < len(tokens) else None


_NAME_ANOTHER = "name another with --tokenizer (in fit: --data.tokenizer)"


def _strings(path: str | Path, values: Mapping[str, Any], key: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(entry, str) for entry in found):
        raise GGUFError(f"{path}: {key} is no list of strings; {_NAME_ANOTHER}")
    return found
