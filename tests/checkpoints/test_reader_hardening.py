"""Files of strangers: what is not exactly a folder of weights is refused by name, before the model is touched."""

import hashlib
import importlib
import itertools
import json
import os
import pickle
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_harness import run_ranks
from huggingface_folders import CONFIG, VALUES, write_folder, written_tensors
from lit_interns1.checkpoints import (
    WeightsError,
    config_from_pretrained,
    load_pretrained_model,
    load_pretrained_weights,
)
from lit_interns1.checkpoints.huggingface import end_of_text_ids, load
from lit_interns1.checkpoints.huggingface.files import WeightFiles
from lit_interns1.checkpoints.huggingface.safetensors_file import DTYPES, SafetensorsFile
from lit_interns1.checkpoints.huggingface.sources import FolderSource
from lit_interns1.models import LanguageModel

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return written_tensors(LanguageModel.create(CONFIG, seed=4))


@pytest.fixture
def folder(tensors, tmp_path):
    """One file."""
    return write_folder(tmp_path / "one", tensors)


@pytest.fixture
def shards(tensors, tmp_path):
    """Three files, their index with checksums."""
    return with_checksums(write_folder(tmp_path / "many", tensors, files=3))


def with_checksums(folder, **metadata):
    files = sorted(folder.glob("*.safetensors"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    total = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    edit_index(folder, metadata={"total_size": total, "sha256": sums, **metadata})
    return folder


def edit_index(folder, **entries):
    path = folder / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(folder, config=CONFIG):
    """The message; the model that was to be filled must be as before."""
    target = LanguageModel.create(config, seed=9)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        load_pretrained_weights(target, folder)
    assert time.monotonic() - started < 30
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    return str(caught.value)


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path, header, numbers):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


# -- one file --------------------------------------------------------------------------------------------------------


def test_every_window_of_every_type_is_what_the_library_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    types = [dtype for _, dtype in DTYPES.values() if dtype is not None]
    tensors = {
        f"{dtype}": torch.randint(0, 2, (3, 5, 4 * dtype.itemsize), generator=generator, dtype=torch.uint8).view(dtype)
        for dtype in types
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "row": torch.arange(7)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        choices = [{(0, size), (min(1, size), size), (min(2, size), min(3, size))} for size in tensor.shape]
        for bounds in itertools.product(*choices):
            window = tuple(slice(*bound) for bound in bounds)
            read = file.read(key, window)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor[window].shape)
            bytes_of = [part.flatten().contiguous().view(torch.uint8) for part in (read, tensor[window])]
            assert torch.equal(*bytes_of), key


KEY = "model.embed_tokens.weight"
HEADERS = {
    "no bytes": (lambda h: {**h, KEY: {**h[KEY], "data_offsets": [4, 4]}}, "needs 8192 bytes"),
    "unknown type": (lambda h: {**h, KEY: {**h[KEY], "dtype": "F33"}}, "has the dtype 'F33', known are F64"),
    "type of no string": (lambda h: {**h, KEY: {**h[KEY], "dtype": ["F32"]}}, "has the dtype ['F32']"),
    "other type": (lambda h: {**h, KEY: {**h[KEY], "dtype": "F16"}}, "needs 4096 bytes"),
    "other shape": (lambda h: {**h, KEY: {**h[KEY], "shape": [64, 33]}}, "needs 8448 bytes"),
    "negative shape": (lambda h: {**h, KEY: {**h[KEY], "shape": [-64, -32]}}, "not whole numbers from 0 on"),
    "huge shape": (lambda h: {**h, KEY: {**h[KEY], "shape": [1 << 62, 1 << 62, 0]}}, "needs 0 bytes"),
    "overflow": (lambda h: {**h, KEY: {**h[KEY], "shape": [1 << 63, 2]}}, "not whole numbers from 0 on"),
    "wraps to its size": (lambda h: {**h, KEY: {**h[KEY], "shape": [2048, 2**62 + 1]}}, "needs 3.7"),
    "float shape": (lambda h: {**h, KEY: {**h[KEY], "shape": [64.0, 32]}}, "not whole numbers from 0 on"),
    "true as a size": (lambda h: {**h, KEY: {**h[KEY], "shape": [True, 2048]}}, "not whole numbers from 0 on"),
    "shape as text": (lambda h: {**h, KEY: {**h[KEY], "shape": "64,32"}}, "not whole numbers from 0 on"),
    "offsets reversed": (
        lambda h: {**h, KEY: {**h[KEY], "data_offsets": h[KEY]["data_offsets"][::-1]}}, "not a begin and an end"
    ),
    "three offsets": (lambda h: {**h, KEY: {**h[KEY], "data_offsets": [0, 1, 2]}}, "not a begin and an end"),
    "far offsets": (
        lambda h: {**h, KEY: {**h[KEY], "data_offsets": [1 << 50, (1 << 50) + 8192]}}, "leaves a gap before it"
    ),
    "another's place": (
        lambda h: {**h, KEY: {**h[KEY], "data_offsets": h["lm_head.weight"]["data_offsets"]}}, "overlaps the tensor"
    ),
    "not described": (lambda h: {**h, KEY: {"dtype": "F32", "shape": [64, 32]}}, "is not described by dtype, shape"),
    "described by more": (lambda h: {**h, KEY: {**h[KEY], "scale": 2}}, "is not described by dtype, shape"),
    "described by text": (lambda h: {**h, KEY: "F32"}, "is not described by dtype, shape"),
    "one too few": (lambda h: {k: v for k, v in h.items() if k != KEY}, "gap"),
    "empty": (lambda h: {}, "the header describes"),
    "a list": (lambda h: b"[1, 2]", "does not begin with '{'"),
    "metadata of numbers": (lambda h: {**h, "__metadata__": {"format": 1}}, "does not map names to strings"),
    "a key twice": (
        lambda h: (json.dumps(h)[:-1] + f', "lm_head.weight": {json.dumps(h["lm_head.weight"])}}}').encode(),
        "the key 'lm_head.weight' stands there twice",
    ),
    "nested": (lambda h: b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
    "no UTF-8": (lambda h: b'{"\xff\xfe": 1}', "is no JSON"),
    "half a pair": (lambda h: b'{"\\ud800": 1}', "is no JSON"),
    "not a number": (lambda h: b'{"a": NaN}', "NaN is no JSON number"),
    "long number": (lambda h: b'{"a": ' + b"9" * 6000 + b"}", "is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused(folder, name):
    change, message = HEADERS[name]
    path = folder / "model.safetensors"
    header, numbers = header_of(path)
    write_file(path, change(header), numbers)
    assert message in refused(folder)


def test_files_of_other_sizes_and_kinds_are_refused(folder, tensors):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content, message in (
        (b"", "it has 0 bytes"),
        (whole[:9], "it has 9 bytes"),
        (whole[:-1], f"the header describes {len(whole)} bytes, the file has {len(whole) - 1}"),
        (whole + b"\0", f"the header describes {len(whole)} bytes, the file has {len(whole) + 1}"),
        (whole[:100], "a header of"),
        (struct.pack("<Q", 1 << 63) + whole[8:], "a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", len(whole) - 8) + whole[8:], "is no JSON"),
        (b"GGUF" + whole, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "a pickle, which is not read"),
    ):
        path.write_bytes(content)
        assert message in refused(folder), message
    with path.open("wb") as sparse:  # more than any header may have, without a byte on the disk
        sparse.write(struct.pack("<Q", 1 << 40) + b"{")
        sparse.truncate(1 << 41)
    assert "a header of 1099511627776 bytes" in refused(folder)
    torch.save(tensors, path)
    assert "a zip archive, as torch.save writes it: a pickle, which is not read" in refused(folder)
    path.rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is not read" in refused(folder)


def test_a_pickle_is_never_run(folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "sprung"),)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    refused(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_pipes_directories_and_devices_are_not_waited_for(folder, shards, name):
    path = (shards if name == INDEX else folder) / name
    for make, message in (
        (os.mkfifo, "is a pipe, not a file"),
        (os.mkdir, "is a directory, not a file"),
        (lambda path: os.symlink("/dev/zero", path), "is a device, not a file"),
        (lambda path: os.symlink("nowhere", path), "is a link to what does not exist"),
        (lambda path: os.symlink(path.name, path), "cannot be opened"),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        assert message in refused(path.parent), message


def test_links_as_in_the_cache_of_the_hub_are_followed(shards, tensors, tmp_path):
    """snapshots/REVISION/FILE → ../../blobs/HASH"""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(shards.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    loaded = written_tensors(load_pretrained_model(snapshot))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    assert "does not exist" in refused(shards)


def test_files_that_cannot_be_opened(folder, monkeypatch):
    opened = os.open

    def refuse(path, *arguments, **named):
        if str(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert "model.safetensors' cannot be opened: [Errno 13]" in refused(folder)


# -- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../one/model.safetensors", "/etc/passwd", "/model.safetensors", "sub/a.safetensors", "..", ".", "",
        "a\\b.safetensors", "a\0.safetensors", "config.json", 3, None, ["a.safetensors"],
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_only(folder, shards, name):
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    edit_index(shards, weight_map={**weight_map, KEY: name})
    assert "is no file of this folder" in refused(shards)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight_map": []}, "has no 'weight_map'"),
        ({"weight_map": {}}, "has no 'weight_map'"),
        ({"weight_map": "model.safetensors"}, "has no 'weight_map'"),
        ({"metadata": []}, "metadata is a list, not an object"),
        ({"metadata": "none"}, "metadata is a str, not an object"),
        ({"metadata": {"sha256": []}}, "sha256 is a list, not an object"),
        ({"metadata": {"sha256": {}}}, "missing model-00001-of-00003.safetensors, model-00002"),
    ],
)
def test_indices_of_wrong_types_are_refused(shards, entries, message):
    edit_index(shards, **entries)
    assert message in refused(shards)


def test_an_index_and_its_files_agree_file_by_file(shards):
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(name for name in weight_map.values() if name != weight_map[KEY])
    edit_index(shards, weight_map={**weight_map, KEY: other})
    assert f"missing  {KEY}  {INDEX} says that it is in {other}" in refused(shards)
    edit_index(shards, weight_map={**weight_map, KEY: "a" * 300 + ".safetensors"})
    assert "cannot be opened" in refused(shards)
    (shards / INDEX).write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}')
    assert "the key 'a' stands there twice" in refused(shards)
    with (shards / INDEX).open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert "has 1099511627776 bytes, more than" in refused(shards)


def test_a_total_size_that_lies(shards, caplog):
    """An error where the index is ours; published ones are known to err, so there it is a warning."""
    with_checksums(shards, total_size=17)
    assert "total_size is 17, but the tensors of the files have" in refused(shards)
    edit_index(shards, metadata={"total_size": 17})
    load_pretrained_model(shards)
    assert "total_size is 17" in caplog.text


# -- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_are_compared_and_counted_apart(shards, tensors):
    target = LanguageModel.create(CONFIG, seed=9)
    loaded = load_pretrained_weights(target, shards)
    assert loaded.bytes_hashed == sum(path.stat().st_size for path in shards.glob("*.safetensors"))
    assert loaded.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    unchecked = load_pretrained_weights(target, shards, verify_checksums=False)
    assert (unchecked.bytes_hashed, unchecked.bytes_read) == (0, loaded.bytes_read)
    for path in sorted(shards.glob("*.safetensors")):
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        assert f"the SHA-256 of {path.name} (" in refused(shards)
        load_pretrained_weights(target, shards, verify_checksums=False)
        content[-9] ^= 1
        path.write_bytes(content)
    load_pretrained_weights(target, shards)


def test_checksums_name_every_file_and_no_other(shards):
    sums = json.loads((shards / INDEX).read_text())["metadata"]["sha256"]
    for changed, message in (
        ({name: digest for name, digest in sums.items() if name != SHARD}, f"missing {SHARD}, unknown none"),
        ({**sums, "other.safetensors": "0" * 64}, "missing none, unknown other.safetensors"),
        ({**sums, SHARD: "0" * 63}, "not 64 hexadecimal digits"),
        ({**sums, SHARD: 7}, "not 64 hexadecimal digits"),
        ({**sums, SHARD: "0" * 64}, f"the SHA-256 of {SHARD} ({sums[SHARD]}, written was 00"),
    ):
        with_checksums(shards, sha256=changed)
        assert message in refused(shards)


def test_what_cannot_be_detected_without_checksums(folder, tensors):
    """A changed number of a foreign file is a number like any other, as is another base of the rotation."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    loaded = written_tensors(load_pretrained_model(folder))
    assert sum(not torch.equal(loaded[key], tensor) for key, tensor in tensors.items()) == 1
    (folder / "config.json").write_text(json.dumps({**VALUES, "rope_theta": 4e3}))
    assert config_from_pretrained(folder).positions.theta == 4e3


# -- while it is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["verify_share", "allocate"])
def test_files_that_change_after_they_were_opened(folder, monkeypatch, when):
    path, original = folder / "model.safetensors", getattr(load, when)
    content = path.read_bytes()

    def cut_off(*arguments):
        path.write_bytes(content[:-4096])
        return original(*arguments)

    monkeypatch.setattr(load, when, cut_off)
    with pytest.raises(WeightsError, match="has been changed since its header was read") as caught:
        load_pretrained_weights(LanguageModel.create(CONFIG), folder)
    assert "the model is filled in part" in str(caught.value)  # even if its first tensor was the one


@pytest.mark.parametrize("failure", ["error", "end"])
def test_a_disk_that_fails_while_the_model_is_filled(folder, monkeypatch, failure):
    preadv, calls = os.preadv, []

    def fail(descriptor, buffers, position):
        calls.append(position)
        if len(calls) < 30:
            return preadv(descriptor, buffers, position)
        if failure == "end":
            return 0
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    message = "Input/output error" if failure == "error" else "it was cut off while it was read"
    with pytest.raises(WeightsError, match=message) as caught:
        load_pretrained_weights(LanguageModel.create(CONFIG), folder)
    assert "the model is filled in part" in str(caught.value)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_matrices_are_read_in_rows_of_the_file(tensors, tmp_path, monkeypatch, transposed):
    """Rows of the file, which in transposed stacks are columns of ours: nothing is read twice, or more than a block."""
    nested = {key.replace("model.", "model.language_model."): tensor for key, tensor in tensors.items()}
    stacks = {}
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        parts = [[nested.pop(f"{prefix}{e}.{n}_proj.weight") for n in ("gate", "up", "down")] for e in range(8)]
        stacks[prefix + "gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
        stacks[prefix + "down_proj"] = torch.stack([part[2] for part in parts])
    if transposed:
        stacks = {key: tensor.mT.contiguous() for key, tensor in stacks.items()}
    text = {**VALUES, "model_type": "qwen3_vl_moe_text"}
    values = {"model_type": "qwen3_vl_moe", "text_config": text, "tie_word_embeddings": False}
    folder = write_folder(tmp_path, nested | stacks, values)
    preadv, allocate, sizes = os.preadv, load.allocate, []

    def record(descriptor, buffers, position):
        sizes.append(len(buffers[0]))
        return preadv(descriptor, buffers, position)

    def start(*arguments):
        sizes.clear()  # behind the headers
        allocate(*arguments)

    monkeypatch.setattr(load, "_BLOCK_NUMBERS", 100)
    monkeypatch.setattr(load, "allocate", start)
    monkeypatch.setattr(os, "preadv", record)
    target = LanguageModel.create(CONFIG, seed=9)
    load_pretrained_weights(target, folder)
    ours = written_tensors(target)
    assert all(torch.equal(ours[key], tensor) for key, tensor in tensors.items())
    assert max(sizes) <= 4 * 100
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())


def test_short_reads_are_continued(folder, tensors, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: preadv(descriptor, [buffers[0][:100]], at))
    loaded = written_tensors(load_pretrained_model(folder))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


# -- numbers that are none -------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_counted_and_named(tensors, tmp_path, caplog):
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed[KEY][3, :5] = float("nan")
    changed["model.layers.1.mlp.experts.5.up_proj.weight"][0, 0] = float("inf")
    changed["model.layers.1.mlp.experts.6.gate_proj.weight"][0, 0] = -float("inf")
    changed["lm_head.weight"][0, 0] = 1e30
    folder = write_folder(tmp_path, changed)
    stack = "layers.1.mlp.experts.gate_up_proj"
    loaded = load_pretrained_weights(LanguageModel.create(CONFIG), folder)
    assert loaded.nonfinite == {"embed_tokens.weight": 5, stack: 2}
    assert "5 numbers of embed_tokens.weight are NaN or infinite" in caplog.text
    assert load_pretrained_weights(LanguageModel.create(CONFIG).bfloat16(), folder).nonfinite == loaded.nonfinite
    half = load_pretrained_weights(LanguageModel.create(CONFIG).half(), folder)
    assert half.nonfinite == {"embed_tokens.weight": 5, stack: 2, "lm_head.weight": 1}
    assert load_pretrained_weights(LanguageModel.create(CONFIG), write_folder(tmp_path, tensors)).nonfinite == {}


# -- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "is not a whole number from 1 to 4096"),
        ({"num_hidden_layers": -2}, "is not a whole number from 1 to 4096"),
        ({"num_hidden_layers": True}, "is not a whole number from 1 to 4096"),
        ({"num_hidden_layers": 2.0}, "is not a whole number from 1 to 4096"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2' is not a whole number"),
        ({"num_hidden_layers": 4096}, "num_layers = 4096, but its files have room for"),
        ({"num_experts": 10**9}, "num_experts = 1000000000 is not a whole number from 1 to"),
        ({"num_experts": 1 << 24}, "num_moe_layers · moe.num_experts = 33554432, but its files have room for"),
        ({"num_experts": [8]}, "num_experts = [8] is not a whole number"),
        ({"vocab_size": 1 << 24}, "vocab_size = 16777216, but its files have room for 64"),
        ({"hidden_size": 1 << 24}, "hidden_size = 16777216, but its files have room for 64"),
        ({"head_dim": 1 << 24}, "num_heads · head_dim = 33554432, but its files have room for 64"),
        ({"moe_intermediate_size": 1 << 24}, "moe.intermediate_size = 16777216, but its files have room for 64"),
        ({"mlp_only_layers": [0], "intermediate_size": 1 << 24}, "intermediate_size = 16777216, but its files have"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0 is not a whole number"),
        ({"mlp_only_layers": 0}, "mlp_only_layers = 0 is not a list, each a whole number"),
        ({"mlp_only_layers": ["0"]}, "is not a list, each a whole number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is not true or false"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob = 'false' is not true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is not a positive number"),
        ({"rms_norm_eps": -1e-5}, "is not a positive number"),
        ({"rope_theta": [3e3]}, "is not a positive number"),
        ({"rope_scaling": 4}, "rope_scaling = 4 is not an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters: rope_theta = 'big' is not a positive number"),
        ({"layer_types": {"full_attention": 1}}, "is not a list, each a string"),
        ({"layer_types": [["full_attention"]]}, "is not a list, each a string"),
        ({"model_type": ["qwen3_moe"]}, "model_type = ['qwen3_moe'] is not a string"),
        ({"model_type": "mamba", "architectures": 3}, "architectures = 3 is not a list"),
        ({"vision_config": []}, "vision_config = [] is not an object"),
        ({"vision_config": {"depth": 10**12}}, "depth = 1000000000000 is not a whole number from 1 to 4096"),
        ({"vision_config": {"patch_size": [14, "14"]}}, "patch_size = [14, '14'] is not a whole number from 1 to"),
        ({"ts_config": {"encoder_layers": 0}}, "ts_config: encoder_layers = 0 is not a whole number"),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8' is not an object"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "weight_block_size = [0, 1]"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "1"}}, "weight_block_size = '1'"),
        ({"max_position_embeddings": 10**100}, "is not a whole number from 1 to"),
        ({"model_type": "interns1", "text_config": "qwen3"}, "text_config = 'qwen3' is not an object"),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_other_types_and_sizes_are_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps({**VALUES, **changes}))
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        load_pretrained_model(folder)
    assert message in str(caught.value)
    assert time.monotonic() - started < 30


def test_config_files_that_are_no_json(folder):
    path = folder / "config.json"
    for content, message in (
        (b"", "is no JSON"),
        (b"[]", "holds a list, not an object"),
        (b"\xff\xfe{}", "is no JSON"),
        (json.dumps(VALUES).encode("utf-16"), "is no JSON"),
        (b"[" * 500_000, "nested too deeply"),
        (json.dumps({**VALUES, "rope_theta": float("inf")}).encode(), "Infinity is no JSON number"),
        (json.dumps(VALUES).replace("3000.0", "1e999", 1).encode(), "rope_theta = inf is not a positive number"),
        (json.dumps(VALUES).encode()[:-1] + b', "hidden_size": 32}', "'hidden_size' stands there twice"),
    ):
        path.write_bytes(content)
        assert message in refused(folder), message
    for ids, message in (("7", "are no token ids"), ([1, -2], "are no token ids"), ({"a": 1}, "are no token ids")):
        path.write_text(json.dumps({**VALUES, "eos_token_id": ids}))
        with pytest.raises(WeightsError, match=message):
            end_of_text_ids(folder)
    path.write_text(json.dumps({**VALUES, "text_config": None, "eos_token_id": [1, 2]}))
    assert end_of_text_ids(folder) == [1, 2]


def test_stacks_without_numbers_make_no_room(tensors, tmp_path):
    """A shape of (2²³, 0, 4) costs no byte."""
    folder = write_folder(
        tmp_path, {**tensors, "stack": torch.zeros(1 << 23, 0, 4)}, {**VALUES, "num_experts": 1 << 22}
    )
    with pytest.raises(WeightsError, match="but its files have room for"):
        load_pretrained_model(folder)
    assert WeightFiles(folder).tensors["stack"].nbytes == 0


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_share_the_hashing_and_fail_together(shards, tensors, tmp_path):
    broken = with_checksums(write_folder(tmp_path / "broken", tensors, files=3))
    with (broken / SHARD).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x77")
    nan = {key: tensor.clone() for key, tensor in tensors.items()}
    nan[KEY][:] = float("nan")
    nan["model.layers.0.mlp.experts.7.down_proj.weight"][1, 1:3] = float("inf")
    nan = write_folder(tmp_path / "nan", nan)
    results = run_ranks(on_ranks, 2, str(shards), str(broken), str(nan), str(tmp_path))
    files = [path.stat().st_size for path in shards.glob("*.safetensors")]
    for form in ("plain", "divided"):
        hashed = [result[form]["hashed"] for result in results]
        assert sum(hashed) == sum(files)
        assert max(hashed) < sum(files)
        for case, message in (
            ("checksum", f"the SHA-256 of {SHARD} ("),
            ("missing", "is no folder of this machine"),
            ("other", "rank 1 failed: ZeroDivisionError"),
            ("disk", "the model is filled in part"),
        ):
            errors = [result[form][case] for result in results]
            assert message in errors[0], (form, case)
            assert errors[1] == errors[0] or case == "other"
        assert "ZeroDivisionError" in results[1][form]["other"]
        counts = {"embed_tokens.weight": 64 * 32, "layers.0.mlp.experts.down_proj": 2}
        assert [result[form]["nonfinite"] for result in results] == [counts, counts]
        assert all(result[form]["unchanged"] for result in results)


def on_ranks(rank, world, shards, broken, nan, elsewhere):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    mesh, results = init_device_mesh("cpu", (world,)), {}

    def divided():
        model = LanguageModel.create(CONFIG, seed=9)
        fully_shard(model, mesh=mesh)
        return model

    def error(model, folder):
        try:
            load_pretrained_weights(model, folder)
        except (WeightsError, ZeroDivisionError) as caught:
            return repr(caught) if isinstance(caught, ZeroDivisionError) else str(caught)
        raise AssertionError("accepted")

    def local(model):
        tensors = [getattr(tensor, "to_local", lambda t=tensor: t)() for tensor in model.state_dict().values()]
        return [tensor.clone() for tensor in tensors]

    for form, make in (("plain", lambda: LanguageModel.create(CONFIG, seed=9)), ("divided", divided)):
        model = make()
        before = local(model)
        found = {"checksum": error(model, broken)}
        found["missing"] = error(model, shards if rank == 0 else elsewhere + "/nowhere")
        open_pretrained, preadv, reads = load.open_pretrained, os.preadv, []
        if rank == 1:
            load.open_pretrained = lambda folder: 1 // 0
        found["other"] = error(model, shards)
        load.open_pretrained = open_pretrained
        found["unchanged"] = all(map(torch.equal, local(model), before))

        def fail(*arguments, preadv=preadv, reads=reads):
            reads.append(arguments)
            if len(reads) > 40:
                raise OSError(5, "Input/output error")
            return preadv(*arguments)

        if rank == 1:
            os.preadv = fail
        found["disk"] = error(model, nan)
        os.preadv = preadv
        found["nonfinite"] = load_pretrained_weights(model, nan).nonfinite
        found["hashed"] = load_pretrained_weights(model, shards).bytes_hashed
        results[form] = found
    return results


def test_sources_of_exports_are_checked_too(shards, tensors):
    source = FolderSource(shards)
    assert torch.equal(source.read("embed_tokens.weight", (slice(3, 9), slice(0, 32))), tensors[KEY][3:9])
    with (shards / SHARD).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x77")
    with pytest.raises(WeightsError, match=f"the SHA-256 of {SHARD}"):
        FolderSource(shards)
    FolderSource(shards, verify_checksums=False)
    (shards / "config.json").write_text(json.dumps({**VALUES, "num_hidden_layers": 4096}))
    with pytest.raises(WeightsError, match="num_layers = 4096, but its files have room for"):
        FolderSource(shards)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conversions_hold_a_few_tensors_and_never_a_file(monkeypatch, tmp_path):
    """The benchmark at a size of 0.3 GB, with a limit that is smaller than a file."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    weights = importlib.import_module("weights")
    config = weights.benchmark_config(layers=2, experts=32, hidden=1024, intermediate=768, vocab=4096)
    with weights.started(weights.make_checkpoints, tmp_path, config, 200_000_000) as connection:
        connection.recv()
    assert max(path.stat().st_size for path in (tmp_path / "huggingface").iterdir()) > 190_000_000
    largest, _ = weights.limit_of(tmp_path)
    limit = 2 * largest + 64_000_000
    for name in ("import", "export of shards"):
        assert weights.memory_of(name, tmp_path, config) < limit, name
    for name in weights.CONTROLS:
        assert weights.memory_of(name, tmp_path, config) > limit, name
