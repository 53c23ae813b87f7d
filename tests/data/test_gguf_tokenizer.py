"""Tokenizers inside GGUF files: ids are those of the tokenizers that the names of the splitters stand for."""

import json

import pytest
import tokenizers
from tokenizers import pre_tokenizers, trainers

from gguf_files import CONFIG, metadata, random_model, write_gguf, write_model, written_tensors
from lit_interns1.commands.generate import continue_prompt
from lit_interns1.data import load_tokenizer
from lit_interns1.data.tokenizer import TokenizerError
from lit_interns1.models import LanguageModelConfig

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(numbers):
    pattern = {"Regex": f"{LETTERS}|{numbers}{REST}"}
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PUBLISHED = {
    "default": (BYTES, None, False),
    "smollm": ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, None, False),
    "qwen2": (split(r"\p{N}"), {"type": "NFC"}, False),
    "llama-bpe": (split(r"\p{N}{1,3}"), None, True),
}
"""Pre-tokenizer, normaliser and `ignore_merges` as the tokenizer.json files of these models spell them."""
TEXTS = (
    "The cat's 12345 hats cost $67.89!\n\nIt'LL do,  they said:   42  times\r\n", "e\u0301 \u00e9 Ω≈ 你好 🙂",
    "a  7  b and what is unmerged",
    "<|endoftext|>x<think>hm</think> y", "\t\tif x == 10:\n        return  0\n \n", "", " ", "DON'T stop 2024-01-02",
)  # fmt: skip
CORPUS = [
    *(text for text in TEXTS if "<" not in text and "unmerged" not in text),
    "the cat sat on the mat and the hat " * 20,
    "123 456 789 12 23 34 " * 20,
    "\u00e9t\u00e9 " * 30,
]


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens, merges and types; trained without any splitting, so that merges cross what splitters cut."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    tokens.append("Ġunmerged")  # no merges lead to it
    special, defined = ["<|endoftext|>", "<|im_end|>"], ["<think>", "</think>"]
    types = [1] * len(tokens) + [3] * len(special) + [4] * len(defined)
    return [*tokens, *special, *defined], [" ".join(pair) for pair in model["merges"]], types


def write(path, vocabulary, splitter, more=None, **changes):
    tokens, merges, types = (changes.get(n, v) for n, v in zip(("tokens", "merges", "types"), vocabulary, strict=True))
    end = vocabulary[0].index("<|im_end|>")
    return write_gguf(path, "llama", {}, {}, tokenizer=(tokens, merges, types, splitter, end), more=more)


def published(splitter, vocabulary):
    pre_tokenizer, normalizer, whole_words = PUBLISHED[splitter]
    tokens, merges, types = vocabulary
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind == 3,
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind > 1
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_words,
        "vocab": {token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1},
        "merges": [merge.split(" ") for merge in merges],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": BYTES, "model": model,
    }  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("splitter", PUBLISHED)
def test_ids_are_those_of_the_published_definition(splitter, vocabulary, tmp_path):
    ours = load_tokenizer(write(tmp_path / "a.gguf", vocabulary, splitter))
    theirs = published(splitter, vocabulary)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids, skip_special_tokens=False)
    assert ours.vocab_size == len(vocabulary[0])
    assert ours.end_of_text == "<|endoftext|>"


def test_splitters_differ_on_these_texts(vocabulary):
    ids = {name: [published(name, vocabulary).encode(text).ids for text in TEXTS] for name in PUBLISHED}
    assert all(ids[a] != ids[b] for a in ids for b in ids if a != b)


@pytest.mark.parametrize(("splitter", "kind"), [("qwen2", "Qwen2Tokenizer"), (None, "GPT2Tokenizer")])
def test_ids_are_those_of_transformers(splitter, kind, vocabulary, tmp_path):
    import transformers

    tokens, merges, types = vocabulary
    theirs = getattr(transformers, kind)(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]
    )
    theirs.add_special_tokens({"additional_special_tokens": [t for t, k in zip(tokens, types, strict=True) if k == 3]})
    theirs.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    ours = load_tokenizer(write(tmp_path / "a.gguf", vocabulary, splitter))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_the_same_vocabulary_has_the_same_fingerprint(vocabulary, tmp_path):
    first, second, other = (
        load_tokenizer(write(tmp_path / f"{name}.gguf", vocabulary, splitter, more={"general.name": name}))
        for name, splitter in (("a", "qwen2"), ("b", "qwen2"), ("c", "smollm"))
    )
    assert first.fingerprint == second.fingerprint != other.fingerprint
    first.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[0]) == first.encode(TEXTS[0])


def test_its_own_last_token_ends_documents_where_no_common_name_does(vocabulary, tmp_path):
    tokens = [token.replace("<|im_end|>", "<last>").replace("<|endoftext|>", "<first>") for token in vocabulary[0]]
    path = write_gguf(
        tmp_path / "a.gguf", "llama", {}, {}, tokenizer=(tokens, *vocabulary[1:], "qwen2", tokens.index("<last>"))
    )
    assert load_tokenizer(path).end_of_text == "<last>"
    assert load_tokenizer(path, end_of_text="<first>").end_of_text == "<first>"


def test_what_cannot_be_built_is_refused(vocabulary, tmp_path):
    tokens, merges, types = vocabulary
    path = tmp_path / "a.gguf"
    cases = [
        ("tokenizer.ggml.pre = 'tekken' is unknown: known are default, gpt-2, smollm", {"splitter": "tekken"}),
        ("is no pair", {"merges": [*merges, "abc"]}),
        ("tokens and merges are no BPE", {"merges": [*merges, "never there"]}),
        ("holds a token twice", {"tokens": [*tokens[:-1], tokens[0]]}),
        ("tokenizer.ggml.token_type does not go with", {"types": types[:-1]}),
    ]
    for words, changes in cases:
        splitter = changes.pop("splitter", "qwen2")
        with pytest.raises(TokenizerError, match=r"a\.gguf") as caught:
            load_tokenizer(write(path, vocabulary, splitter, **changes))
        assert words in str(caught.value)
    for more, words in (({}, "no tokenizer"), ({"tokenizer.ggml.model": "llama"}, "a tokenizer of kind 'llama'")):
        with pytest.raises(TokenizerError, match=f"holds {words}") as caught:
            load_tokenizer(write_gguf(path, "llama", {}, {}, more=more))
        assert "name another with --tokenizer" in str(caught.value)
    more = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [1, 2]}
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens is no list of strings"):
        load_tokenizer(write_gguf(path, "llama", {}, {}, more=more))
    path.write_bytes(b"GGUF\x03" + bytes(5))
    with pytest.raises(TokenizerError, match="truncated"):
        load_tokenizer(path)


def test_generate_needs_the_file_alone(vocabulary, tmp_path):
    """Greedy text of the file is that of a tokenizer.json beside it; it stops at the file's own last token."""
    from dataclasses import replace

    config: LanguageModelConfig = replace(CONFIG, vocab_size=len(vocabulary[0]), tie_word_embeddings=True)
    model, end = random_model(config), vocabulary[0].index("<|im_end|>")
    path = write_model(tmp_path / "a.gguf", model, "llama", tokenizer=(*vocabulary, "qwen2", end))
    encoder = load_tokenizer(path)
    (text,) = continue_prompt(path, "The cat", max_new_tokens=12, temperature=0.0)
    encoder.save(tmp_path / "tokenizer.json")
    assert [text] == continue_prompt(path, "The cat", str(tmp_path / "tokenizer.json"), 12, temperature=0.0)
    # with rows that point at the last token, it comes first and ends the text
    tensors = written_tensors(model, "llama")
    tensors["output.weight"] = tensors["token_embd.weight"] * 0
    tensors["output_norm.weight"] = tensors["output_norm.weight"] * 0 + 1
    tensors["output.weight"][end] = 1
    for row in (1, -1):
        tensors["output.weight"][end] = row
        ended = write_gguf(
            tmp_path / f"b{row}.gguf", "llama", tensors, metadata(config, "llama"),
            tokenizer=(*vocabulary, "qwen2", end),
        )  # fmt: skip
        text = continue_prompt(ended, "The cat", max_new_tokens=12, temperature=0.0)[0]
        if text.startswith("The cat<|im_end|>"):
            assert text == "The cat<|im_end|>"
            break
    else:
        raise AssertionError("neither sign made the last token the likeliest")
