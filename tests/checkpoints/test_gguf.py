"""GGUF files: what fits is read exactly, in windows; what does not is named before anything is written."""

import os
import struct
import sys
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_harness import run_ranks
from gguf_files import CONFIG, CONFIGS, metadata, random_model, write_gguf, write_model, written_tensors
from lit_interns1.checkpoints import (
    WeightsError,
    config_from_pretrained,
    load_pretrained_model,
    load_pretrained_weights,
)
from lit_interns1.checkpoints.gguf.weights import open_gguf_weights
from lit_interns1.checkpoints.huggingface import end_of_text_ids
from lit_interns1.commands.expand import expand_weights
from lit_interns1.commands.export import export_weights
from lit_interns1.models import LanguageModel
from lit_interns1.modules.language_model_module import LanguageModelModule, load_language_model

VALUES = metadata(CONFIG, "llama")


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture
def tensors(model):
    return written_tensors(model, "llama")


def refused(path, config=CONFIG):
    """The problems and the message; the model that was to be filled must be as before."""
    target = LanguageModel.create(config, seed=9)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_pretrained_weights(target, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    return {(problem.kind, problem.key) for problem in caught.value.problems}, str(caught.value)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_file_comes_back_bit_by_bit(architecture, tmp_path):
    model = random_model(CONFIGS[architecture])
    path = write_model(tmp_path / "model.gguf", model, architecture)
    assert config_from_pretrained(path) == model.config
    target = LanguageModel.create(model.config, seed=9)
    loaded = load_pretrained_weights(target, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    assert loaded.bytes_read == sum(tensor.nbytes for tensor in written_tensors(model, architecture).values())


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_logits_are_those_of_transformers(architecture, kind, tmp_path, monkeypatch):
    import transformers.modeling_utils

    # from_pretrained asks for accelerate before it reads a GGUF file, and does not use it
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *args: True)
    path = write_model(tmp_path / "model.gguf", random_model(CONFIGS[architecture]), architecture, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained_model(path)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=2e-5)


def blocks(kind, rows, columns, seed=0):
    """Random bytes of a type whose scales, float16, are finite: bit 14 of every pair of bytes is 0."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    return raw & 0xBF


def written_types():
    from transformers.integrations.gguf.dequant import GGML_NAME

    return sorted(GGML_NAME.items())


@pytest.mark.parametrize("neighbours", [False, True])
def test_every_type_is_multiplied_out_and_every_window_is_that_of_the_whole(tmp_path, neighbours):
    """The other implementation is transformers', in torch."""
    from transformers.integrations.gguf.dequant import dequantize

    types = written_types()
    assert len(types) == 17
    architecture = "llama" if neighbours else "qwen2"
    config = replace(CONFIG, hidden_size=512, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1)
    base = written_tensors(random_model(config), architecture)
    for number, kind in types:
        # the embedding lies as it is, queries may lie otherwise
        raw = {name: blocks(kind, rows, 512) for name, rows in (("token_embd.weight", 96), ("blk.0.attn_q.weight", 32))}
        path = write_gguf(
            tmp_path / f"{kind}.gguf", architecture, base | {name: (r, kind) for name, r in raw.items()},
            metadata(config, "qwen3") if not neighbours else {**metadata(config, "qwen3"), "rope.dimension_count": 8},
        )  # fmt: skip
        weights = open_gguf_weights(path)
        for name, source in raw.items():
            whole = dequantize(torch.from_numpy(source), number).view(len(source), 512)
            assert whole.isfinite().all()
            if neighbours and "attn_q" in name:
                order = [8 * h + 2 * j + half for h in range(4) for half in (0, 1) for j in range(4)]
                whole = whole[order]
            for rows, columns in (
                ((0, len(source)), (0, 512)),
                ((3, 21), (0, 512)),
                ((9, 10), (31, 400)),
                ((8, 24), (256, 512)),
            ):
                before = weights.bytes_read
                window = (slice(*rows), slice(*columns))
                torch.testing.assert_close(weights.read(name, window), whole[window], rtol=1e-6, atol=1e-9)
                per_row = source.nbytes // len(source)
                heads = 8 if neighbours and "attn_q" in name else 1
                read_rows = -(-rows[1] // heads) * heads - rows[0] // heads * heads
                assert weights.bytes_read - before <= read_rows * per_row
                if columns == (256, 512) and rows == (8, 24):
                    assert weights.bytes_read - before == read_rows * per_row // 2


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_plain_types_stay_as_they_are(kind, model, tmp_path):
    path = write_model(tmp_path / "a.gguf", model, "llama", kind)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    weights = open_gguf_weights(path)
    window = (slice(3, 40), slice(5, 60))
    read = weights.read("blk.1.attn_q.weight", window)
    assert read.dtype == dtype
    assert torch.equal(read, model.layers[1].self_attn.q_proj.weight[window].to(dtype))
    assert torch.equal(load_pretrained_model(path).lm_head.weight, model.lm_head.weight.to(dtype).float())


def test_tied_heads_that_are_stored_twice_are_not_tied(model, tmp_path):
    assert not config_from_pretrained(write_model(tmp_path / "a.gguf", model, "llama")).tie_word_embeddings


# -- the audit -------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(tensors, tmp_path):
    del tensors["blk.1.ffn_up.weight"], tensors["output_norm.weight"]
    tensors["blk.1.attn_v.bias"] = np.zeros(32, np.float32)
    tensors["blk.0.ffn_down.weight"] = np.zeros((64, 90), np.float32)
    problems, message = refused(write_gguf(tmp_path / "a.gguf", "llama", tensors, VALUES))
    assert problems == {
        ("missing", "blk.1.ffn_up.weight"), ("missing", "output_norm.weight"), ("unexpected", "blk.1.attn_v.bias"),
        ("shape", "blk.0.ffn_down.weight"),
    }  # fmt: skip
    assert "(64, 90) in the file, (64, 96) needed" in message


def test_another_network_is_refused(tensors, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, {**VALUES, "rope.freq_base": 1e4})
    assert "positions.theta: 10000.0 → 500000.0" in refused(path)[1]


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"attention.sliding_window": 64}, {}, "llama.attention.sliding_window = 64 is not supported, only 0"),
        ({"rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type = 'yarn' is not supported, only 'none'"),
        ({"rope.scaling.factor": 4.0}, {}, "llama.rope.scaling.factor = 4.0"),
        ({"rope.dimension_count": 8}, {}, "llama.rope.dimension_count = 8 is not supported, only 16"),
        ({"attention.value_length": 8}, {}, "llama.attention.value_length = 8 is not supported, only 16"),
        ({"expert_count": 8}, {}, "llama.expert_count = 8 is not supported, only 0"),
        ({"logit_scale": 0.5}, {}, "llama.logit_scale = 0.5"),
        ({"attention.soft_cap": 30.0}, {}, "llama.attention.soft_cap = 30.0 may change the network"),
        ({"block_count": 3}, {}, "llama.block_count = 3, but its tensors have 2"),
        ({"block_count": 2**31}, {}, "llama.block_count = 2147483648, but"),
        ({"vocab_size": 97}, {}, "llama.vocab_size = 97, but its tensors have 96"),
        ({"embedding_length": 128}, {}, "llama.embedding_length = 128, but"),
        ({"feed_forward_length": 95}, {}, "llama.feed_forward_length = 95, but"),
        ({"feed_forward_length": [96, 96]}, {}, "feed_forward_length = [96, 96] must be one whole number"),
        ({"attention.head_count": 2**31}, {}, "llama.attention.head_count × width of a head = 2147483648, but"),
        ({"attention.head_count": 0}, {}, "llama.attention.head_count = 0 must be one whole number above 0"),
        ({"attention.head_count_kv": 4}, {}, "llama.attention.head_count_kv × width of a head = 64, but"),
        ({"attention.key_length": 32, "rope.dimension_count": 32}, {}, "attention.head_count × width of a head = 128"),
        ({"attention.key_length": "16"}, {}, "llama.attention.key_length = '16'"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, {}, "llama.attention.layer_norm_rms_epsilon = nan"),
        ({"attention.layer_norm_rms_epsilon": None}, {}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"rope.freq_base": float("inf")}, {}, "llama.rope.freq_base = inf"),
        ({"rope.freq_base": 0.5}, {}, "describes no model: positions.theta must be above 1"),
        ({"context_length": None}, {}, "has no llama.context_length"),
        ({}, {"split.count": 3}, "is one of 3 parts"),
        ({}, {"general.type": "adapter"}, "general.type = 'adapter' is not supported"),
    ],
)  # fmt: skip
def test_what_would_change_the_network_is_refused(tensors, tmp_path, changes, more, words):
    message = refused(write_gguf(tmp_path / "a.gguf", "llama", tensors, {**VALUES, **changes}, more=more))[1]
    assert words in message
    assert "a.gguf" in message


def test_values_that_change_nothing_are_accepted(tensors, model, tmp_path):
    neutral = {"expert_count": 0, "rope.scaling.type": "none", "attention.causal": True, "attention.sliding_window": 0}
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, {**VALUES, **neutral}, more={"general.name": "x"})
    assert config_from_pretrained(path) == CONFIG
    defaults = {**VALUES, "vocab_size": None, "rope.freq_base": None, "rope.dimension_count": None}
    config = config_from_pretrained(write_gguf(tmp_path / "b.gguf", "llama", tensors, defaults))
    assert config == replace(CONFIG, positions=replace(CONFIG.positions, theta=1e4))


def test_other_architectures_and_scaled_rotations(tensors, tmp_path):
    for name in ("gemma3", "qwen3moe"):
        path = write_gguf(tmp_path / "a.gguf", name, tensors, VALUES)
        assert f"general.architecture = '{name}' is not supported, only llama, qwen2, qwen3" in refused(path)[1]
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    path = write_gguf(tmp_path / "b.gguf", "llama", tensors, VALUES)
    assert "rope_freqs.weight scales the rotation" in refused(path)[1]
    del tensors["token_embd.weight"]
    assert "holds no tensor token_embd.weight" in refused(write_gguf(tmp_path / "c.gguf", "llama", tensors, VALUES))[1]
    tensors["token_embd.weight"] = np.ones(64, np.float32)
    assert "not 2 dimensions" in refused(write_gguf(tmp_path / "d.gguf", "llama", tensors, VALUES))[1]


def test_types_that_cannot_be_multiplied_out(tensors, tmp_path):
    for kind, width in (("Q8_K", 292), ("I32", 64 * 4)):
        more = {"output.weight": (np.zeros((96, width), np.uint8), kind)}
        if kind == "I32":
            more = {"output.weight": np.zeros((96, 64), np.int32)}
        problems, message = refused(write_gguf(tmp_path / "a.gguf", "llama", tensors | more, VALUES))
        assert problems == {("type", "output.weight")}
        assert f"{kind} (number {gguf.GGMLQuantizationType[kind].value} of ggml) cannot be multiplied out" in message


def test_without_the_library_the_error_says_how_to_get_it(tensors, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, VALUES)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'lit-interns1[gguf]'" in refused(path)[1]


# -- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    tokenizer = (["a", "b", "ab", "<|endoftext|>"], ["a b"], [1, 1, 1, 3], "smollm", 3)
    path = write_model(tmp_path_factory.mktemp("whole") / "a.gguf", model, "llama", tokenizer=tokenizer)
    return path.read_bytes()


def test_truncated_files(content, tmp_path):
    path, target = tmp_path / "a.gguf", LanguageModel.create(CONFIG)
    for size in [*range(0, 3000, 61), *range(3000, len(content) - 32, 9973), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError, match=r"truncated|damaged|no GGUF|no tensor|do not fit|ends at byte"):
            load_pretrained_weights(target, path)
    problems, message = refused(path)  # the last byte of the last tensor is missing
    assert {kind for kind, _ in problems} == {"missing"}
    assert "it is truncated" in message


def little(kind, number):
    return struct.pack("<" + kind, number)


def entry(name, shape=(4,), kind=0, offset=0):
    return (
        little("Q", len(name)) + name + little("I", len(shape)) + b"".join(little("Q", n) for n in shape)
        + little("I", kind) + little("Q", offset)
    )  # fmt: skip


def head(tensors=0, values=0, version=3, magic=b"GGUF"):
    return magic + little("I", version) + little("Q", tensors) + little("Q", values)


def value(key, kind, raw):
    return little("Q", len(key)) + key + little("I", kind) + raw


HUGE = 2**62
HOSTILE = {
    "magic": (head(magic=b"GGML"), "does not start with GGUF"),
    "version 1": (head(version=1), "version 1 of GGUF is not supported, only 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), r"big-endian\?"),
    "tensor count": (head(tensors=HUGE) + bytes(99), "4611686018427387904 tensors do not fit"),
    "value count": (head(values=HUGE) + bytes(99), "4611686018427387904 metadata values do not fit"),
    "key length": (head(values=1) + little("Q", HUGE) + bytes(99), "would take 4611686018427387904 bytes"),
    "string": (head(values=1) + value(b"k", 8, little("Q", HUGE)) + bytes(99), "metadata 'k' would take"),
    "array": (head(values=1) + value(b"k", 9, little("I", 4) + little("Q", HUGE)) + bytes(99), "said to have"),
    "long array": (head(values=1) + value(b"k", 9, little("I", 4) + little("Q", 1 << 20)) + bytes(99), "would take"),
    "strings": (head(values=1) + value(b"k", 9, little("I", 8) + little("Q", 1 << 20)) + bytes(99), "do not fit"),
    "nested array": (head(values=1) + value(b"k", 9, little("I", 9) + little("Q", 3)) + bytes(99), "array of type 9"),
    "value type": (head(values=1) + value(b"k", 77, bytes(99)), "is of type 77"),
    "no UTF-8": (head(values=1) + value(b"\xff", 4, bytes(99)), "no UTF-8"),
    "twice": (head(values=2) + 2 * value(b"k", 4, bytes(4)), "'k' twice"),
    "alignment": (head(values=1) + value(b"general.alignment", 4, little("I", 48)), "alignment = 48"),
    "no alignment": (head(values=1) + value(b"general.alignment", 4, little("I", 0)), "alignment = 0"),
    "dimensions": (head(tensors=1) + entry(b"t", (1,) * 5) + bytes(99), "5 dimensions, not 1 to 4"),
    "many dimensions": (head(tensors=1) + little("Q", 1) + b"t" + little("I", 2**31) + bytes(99), "2147483648 dim"),
    "no dimensions": (head(tensors=1) + entry(b"t", ()) + bytes(99), "0 dimensions"),
    "shape": (head(tensors=1) + entry(b"t", (HUGE, HUGE)) + bytes(99), "has the shape"),
    "empty": (head(tensors=1) + entry(b"t", (0, 4)) + bytes(99), "has the shape"),
    "offset": (head(tensors=1) + entry(b"t", offset=HUGE) + bytes(99), "said to start at byte"),
    "unaligned": (head(tensors=1) + entry(b"t", offset=3) + bytes(99), "said to start at byte"),
    "tensor twice": (head(tensors=2) + 2 * entry(b"t") + bytes(99), "'t' is there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_heads_end_early(case, tmp_path):
    raw, words = HOSTILE[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=words) as caught:
            config_from_pretrained(path)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_tables_that_do_not_fit_the_bytes(tensors, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, VALUES)
    whole = path.read_bytes()
    at = whole.index(name := little("Q", 13) + b"output.weight") + len(name) + 4 + 2 * 8  # its type, then its offset
    assert whole[at : at + 4] == little("I", 0)

    def changed(kind=0, offset=None):
        offset = struct.unpack("<Q", whole[at + 4 : at + 12])[0] if offset is None else offset
        path.write_bytes(whole[:at] + little("I", kind) + little("Q", offset) + whole[at + 12 :])
        return refused(path)

    problems, message = changed(offset=0)
    assert {kind for kind, _ in problems} == {"duplicate"}
    assert "lies at the place of" in message
    own = struct.unpack("<Q", whole[at + 4 : at + 12])[0]
    assert {kind for kind, _ in changed(offset=own - 32 if own else 32)[0]} == {"duplicate"}
    size = sum(-(-tensor.nbytes // 32) * 32 for tensor in tensors.values())
    problems, message = changed(offset=size - 32)
    assert ("missing", "output.weight") in problems
    assert "it is truncated" in message
    assert "an unknown type (number 12345 of ggml)" in changed(kind=12345)[1]
    assert "rows of Q4_K blocks of 256" in changed(kind=12)[1]


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_changed_bytes_end_with_the_typed_error_or_with_other_numbers(content, tmp_path_factory, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 2600))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(changed)
    tracemalloc.start()
    try:
        load_pretrained_model(path)
    except WeightsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30e6


def test_what_is_no_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "a.gguf")[1]
    os.mkfifo(tmp_path / "b.gguf")
    assert "b.gguf is no file" in refused(tmp_path / "b.gguf")[1]
    assert end_of_text_ids(write_model(tmp_path / "c.gguf", random_model(CONFIG), "llama")) == []


# -- commands --------------------------------------------------------------------------------------------------------


def test_files_are_exported_and_expanded_as_folders_are(tmp_path):
    ids = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    path = write_model(tmp_path / "a.gguf", random_model(CONFIGS["qwen3"]), "qwen3", "Q8_0")
    dense = load_pretrained_model(path)
    export_weights(str(path), str(tmp_path / "dense"))
    assert torch.equal(load_pretrained_model(tmp_path / "dense")(ids).logits, dense(ids).logits)
    expand_weights(str(path), str(tmp_path / "sparse"), experts=4, experts_per_token=2)
    sparse = load_pretrained_model(tmp_path / "sparse")
    assert sparse.config.moe is not None
    assert sparse.config.moe.num_experts == 4
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    llama = write_model(tmp_path / "b.gguf", random_model(CONFIG), "llama")
    expand_weights(str(llama), str(tmp_path / "mixtral"), experts=4, experts_per_token=2)
    sparse, dense = load_pretrained_model(tmp_path / "mixtral"), load_pretrained_model(llama)
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    biased = write_model(tmp_path / "c.gguf", random_model(CONFIGS["qwen2"]), "qwen2")
    with pytest.raises(WeightsError, match="layouts that can: none"):
        expand_weights(str(biased), str(tmp_path / "never"), experts=4, experts_per_token=2)


def test_a_run_starts_from_a_file(tmp_path):
    path = write_model(tmp_path / "a.gguf", random_model(CONFIGS["qwen2"]), "qwen2", "Q4_0")
    module = LanguageModelModule(init_weights=str(path), changes={"activation_checkpointing": "block"})
    module.configure_model()
    assert module.config == replace(config_from_pretrained(path), activation_checkpointing="block")
    whole = load_language_model(path).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in module.model.state_dict().items())
    with pytest.raises(WeightsError, match="does not exist"):
        LanguageModelModule(init_weights=str(tmp_path / "b.gguf"))


# -- several ranks ---------------------------------------------------------------------------------------------------


def load_sharded_model(rank, world, path):
    """Whole tensors after loading into DTensors, and the bytes that this rank took."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        sharded = LanguageModel(config_from_pretrained(path))
    mesh = init_device_mesh("cpu", (world,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loaded = load_pretrained_weights(sharded, path)
    return {name: t.full_tensor() for name, t in sharded.state_dict().items()}, loaded.bytes_read


def test_ranks_read_the_rows_that_they_hold(tmp_path):
    """Three ranks cut heads in the middle, so of queries and keys they read whole heads."""
    path = write_model(tmp_path / "a.gguf", random_model(CONFIG), "llama", "Q8_0")
    whole, read = load_pretrained_model(path).state_dict(), open_gguf_weights(path)
    for name in read.tensors:
        read.read(name, tuple(slice(0, size) for size in read.tensors[name].shape))
    results = run_ranks(load_sharded_model, 3, path, timeout=60)
    for tensors, _ in results:
        assert tensors.keys() == whole.keys()
        assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    shares = [share for _, share in results]
    assert read.bytes_read <= sum(shares) < 1.2 * read.bytes_read
    assert max(shares) < 0.5 * read.bytes_read
