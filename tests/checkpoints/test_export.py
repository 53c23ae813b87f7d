"""Exports of one process: what is written is what was read, and what cannot be written leaves nothing behind."""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import save

from huggingface_folders import CONFIG, VALUES, write_folder, written_tensors
from lit_interns1.checkpoints import (
    FolderSource,
    ModelSource,
    WeightsError,
    config_from_pretrained,
    export_pretrained,
    load_pretrained_model,
    open_source,
)
from lit_interns1.checkpoints.huggingface import TensorInfo, export, is_pretrained_folder
from lit_interns1.checkpoints.huggingface.safetensors_file import SafetensorsFile, StoredTensor
from lit_interns1.checkpoints.huggingface.safetensors_writer import SafetensorsWriter, blocks, plan_files
from lit_interns1.checkpoints.sharded_tensors import ShardedTensors
from lit_interns1.data.tokenizer import BUNDLED_TOKENIZER
from lit_interns1.models import LanguageModel, PositionConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(CONFIG, seed=4)


def stored(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same_bytes(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert tensor.shape == other[key].shape, key
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, other[key]))), key


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def checkpoint(model, path, sharded, **more):
    """As a run saves it, with an optimizer and a metric beside the weights."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["validation_loss.total"] = torch.zeros(3)
    rest = {"language_model_config": asdict(model.config), "global_step": 7}
    if sharded:
        save({"state_dict": weights | more, "optimizer_0": {"state": {"m": torch.ones(4)}}}, checkpoint_id=path)
        torch.save(rest, path / "meta.pt")
    else:
        torch.save({"state_dict": weights | more, **rest, "optimizer_states": [{"m": torch.ones(4)}]}, path)
    return path


# -- what is written -------------------------------------------------------------------------------------------------


def test_a_model_is_written_as_others_read_it(model, tmp_path):
    result = export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    same_bytes(stored(tmp_path / "out"), written_tensors(model))
    assert config_from_pretrained(tmp_path / "out") == CONFIG
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.total_bytes == result.bytes_written == total
    layers = [key.split(".")[2] for key in index["weight_map"] if key.startswith("model.layers")]
    assert layers == sorted(layers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_files_have_their_size_their_hash_and_whole_tensors(model, tmp_path):
    deep = LanguageModel.create(replace(CONFIG, num_layers=11, vocab_size=300), seed=1)
    result = export_pretrained(ModelSource(deep), deep.config, tmp_path / "out", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 10
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000 or len(tensors) == 1
        assert index["metadata"]["sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert all(index["weight_map"][key] == file.name for key in tensors)
        assert file.stat().st_size == result.files[file.name]
    numbers = [int(key.split(".")[2]) for key in index["weight_map"] if key.startswith("model.layers")]
    assert numbers == sorted(numbers)
    same_bytes(stored(tmp_path / "out"), written_tensors(deep))
    again = load_pretrained_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in deep.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_all_sources_of_one_model_write_the_same_files(model, tmp_path):
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "live", max_shard_bytes=50_000)
    write_folder(tmp_path / "hub", written_tensors(model), files=3)
    paths = [
        checkpoint(model, tmp_path / "last.ckpt", False),
        checkpoint(model, tmp_path / "sharded.ckpt", True),
        tmp_path / "hub",
        tmp_path / "live",
    ]
    for number, path in enumerate(paths):
        source, config = open_source(path)
        assert config == CONFIG
        export_pretrained(source, config, tmp_path / f"{number}", max_shard_bytes=50_000)
        assert contents(tmp_path / f"{number}") == contents(tmp_path / "live"), path


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_asked_for_is_the_type_of_everything(model, tmp_path, name):
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "out", dtype=name)
    same_bytes(stored(tmp_path / "out"), written_tensors(model, getattr(torch, name)))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["torch_dtype"] == values["dtype"] == name


def test_small_blocks_write_the_same(model, tmp_path, monkeypatch):
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "whole")
    monkeypatch.setattr(export, "BLOCK_BYTES", 100)
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "parts")
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_windows_of_any_shape_land_where_they_belong(tmp_path):
    """Against numpy: every array is cut into random boxes, each written in blocks and in any order."""
    generator = np.random.default_rng(0)
    shapes = [(), (1,), (7,), (5, 6), (3, 4, 5), (2, 3, 4, 5), (6, 1, 7)]
    arrays = {f"t.{i}": generator.standard_normal(shape).astype("f4") for i, shape in enumerate(shapes)}
    files, places = plan_files({key: (array.shape, "F32") for key, array in arrays.items()}, 400)
    writer = SafetensorsWriter(tmp_path)
    writer.create(files)
    for key, array in arrays.items():
        cuts = [sorted({0, n, *generator.integers(0, n + 1, 2).tolist()}) for n in array.shape]
        boxes = [()]
        for cut in cuts:
            boxes = [(*box, slice(a, b)) for box in boxes for a, b in itertools.pairwise(cut)]
        for number in generator.permutation(len(boxes)):
            for block in blocks(boxes[number], int(generator.integers(1, 9))):
                writer.write(places[key], block, torch.from_numpy(np.array(array[block])))
    writer.close()
    same_bytes(stored(tmp_path), {key: torch.from_numpy(array) for key, array in arrays.items()})


def test_blocks_of_rows_keep_to_multiples():
    parts = list(blocks((slice(0, 2), slice(128, 700), slice(0, 10)), 1300, 128))
    assert [(p[0].start, p[1].start, p[1].stop) for p in parts] == [
        (e, start, min(start + 128, 700)) for e in range(2) for start in range(128, 700, 128)
    ]


def test_tensors_begin_at_multiples_of_their_numbers(tmp_path):
    tensors = {
        "a": ((3,), "F8_E4M3"),
        "b": ((1,), "F32"),
        "c": ((1,), "BF16"),
        "d": ((5,), "F8_E4M3"),
        "e": ((2,), "F64"),
    }
    files, places = plan_files(tensors, 10**9)
    SafetensorsWriter(tmp_path).create(files)
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1}
    assert all(place.start % sizes[place.dtype] == 0 for place in places.values())
    assert list(places) == list("abcde")
    header = SafetensorsFile(tmp_path / files[0].name).tensors
    assert header == places
    assert all(isinstance(place, StoredTensor) for place in header.values())


# -- like ------------------------------------------------------------------------------------------------------------


def test_the_official_intern_s1_pro_folder_comes_back(tmp_path, caplog):
    source, config = open_source(GOLDEN)
    result = export_pretrained(source, config, tmp_path / "out", like=GOLDEN, max_shard_bytes=400_000)
    same_bytes(stored(tmp_path / "out"), load_file(GOLDEN / "model.safetensors"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, tmp_path / "out"))
    assert {key: after[key] for key in before if key != "text_config"} == {
        k: before[k] for k in before if k != "text_config"
    }
    assert {key: after["text_config"][key] for key in before["text_config"]} == before["text_config"]
    assert result.copied == sum(key.startswith("model.visual.") for key in load_file(GOLDEN / "model.safetensors"))
    assert not result.without_encoders
    assert "encoders" not in caplog.text

    result = export_pretrained(ModelSource(load_pretrained_model(GOLDEN)), config, tmp_path / "text")
    text = {k: v for k, v in load_file(GOLDEN / "model.safetensors").items() if not k.startswith("model.visual.")}
    same_bytes(stored(tmp_path / "text"), text)
    assert result.without_encoders
    assert "the layout interns1_pro is one of models with encoders, but there is only the language model" in caplog.text
    assert config_from_pretrained(tmp_path / "text") == config


def test_encoders_are_not_copied_from_a_file_that_has_changed(tmp_path):
    source, config = open_source(GOLDEN)
    export_pretrained(source, config, tmp_path / "like", like=GOLDEN)
    (file,) = (tmp_path / "like").glob("*.safetensors")
    place = SafetensorsFile(file).tensors["model.visual.pos_embed.weight"]
    with file.open("r+b") as stream:
        stream.seek(place.start)
        stream.write(b"\x7f")
    with pytest.raises(WeightsError, match=r"model-00001-of-00001\.safetensors"):
        export_pretrained(source, config, tmp_path / "out", like=tmp_path / "like")
    assert not (tmp_path / "out").exists()


def nested(tensors, body="model.language_model.", head=""):
    return {head + k if k.startswith("lm_head") else k.replace("model.", body, 1): v for k, v in tensors.items()}


def stacked(tensors, transposed):
    result = {key: tensor for key, tensor in nested(tensors).items() if ".experts." not in key}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = [[tensors[f"{prefix}{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(8)]
        stacks = torch.stack([torch.cat(p[:2]) for p in parts]), torch.stack([p[2] for p in parts])
        for name, stack in zip(("gate_up_proj", "down_proj"), stacks, strict=True):
            key = f"model.language_model.layers.{layer}.mlp.experts.{name}"
            result[key] = stack.mT.contiguous() if transposed else stack
    return result


@pytest.mark.parametrize("form", ["legacy", "nested", "stacked", "transposed"])
def test_a_folder_is_written_in_the_form_that_it_had(model, tmp_path, form):
    tensors = written_tensors(model, torch.bfloat16)
    if form in ("stacked", "transposed"):
        tensors = stacked(tensors, form == "transposed")
        values = {"model_type": "qwen3_vl_moe", "text_config": {**VALUES, "model_type": "qwen3_vl_moe_text"}}
        tensors["model.visual.blocks.0.norm1.weight"] = torch.randn(3)
    else:
        body, head = ("language_model.model.", "language_model.") if form == "legacy" else ("model.language_model.", "")
        tensors = nested(tensors, body, head)
        values = {"model_type": "internvl", "text_config": {**VALUES, "model_type": "qwen3_moe"}}
        tensors[("" if head else "model.") + "vision_tower.encoder.layer.0.lambda_1"] = torch.randn(3)
    values |= {"tie_word_embeddings": False, "image_token_id": 7}
    folder = write_folder(tmp_path / "in", tensors, values, files=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("pass")
    model_again = load_pretrained_model(folder)  # float32: the types come from the folder
    result = export_pretrained(ModelSource(model_again), CONFIG, tmp_path / "out", like=folder)
    assert result.copied == 1
    same_bytes(stored(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == 7
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "modeling.py").read_text() == "pass"
    assert config_from_pretrained(tmp_path / "out") == CONFIG


def test_types_are_those_of_like_tensor_by_tensor(model, tmp_path):
    tensors = written_tensors(model, torch.bfloat16)
    router = "model.layers.1.mlp.gate.weight"
    tensors[router] = written_tensors(model)[router]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    folder = write_folder(tmp_path / "in", tensors)
    source = FolderSource(folder)
    assert source.tensors["layers.1.mlp.router.weight"].dtype == torch.float32
    export_pretrained(source, CONFIG, tmp_path / "out", like=folder)
    same_bytes(stored(tmp_path / "out"), tensors)
    # more experts than `like` has: those that it lacks have the type of those that it has
    config = replace(CONFIG, moe=replace(CONFIG.moe, num_experts=12))
    export_pretrained(ModelSource(LanguageModel.create(config)), config, tmp_path / "more", like=folder)
    assert stored(tmp_path / "more")["model.layers.0.mlp.experts.11.up_proj.weight"].dtype == torch.bfloat16
    with pytest.raises(WeightsError, match=r"layout = 'qwen3', but .*in, which it is to be like, has 'qwen3_moe'"):
        export_pretrained(source, CONFIG, tmp_path / "no", like=folder, layout="qwen3")


@pytest.mark.parametrize("kept", [("embed", "lm_head"), ("embed",), ("lm_head",)])
def test_tied_heads_are_stored_as_often_as_before(tmp_path, kept):
    config = replace(CONFIG, tie_word_embeddings=True)
    tied = LanguageModel.create(config, seed=4)
    tensors = written_tensors(tied)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if not any(name in key for name in kept):
            del tensors[key]
    folder = write_folder(tmp_path / "in", tensors, {**VALUES, "tie_word_embeddings": True})
    export_pretrained(ModelSource(tied), config, tmp_path / "out", like=folder)
    same_bytes(stored(tmp_path / "out"), tensors)
    source, _ = open_source(checkpoint(tied, tmp_path / "last.ckpt", False))
    export_pretrained(source, config, tmp_path / "plain")
    assert stored(tmp_path / "plain").keys() == written_tensors(tied).keys() - {"lm_head.weight"}


def test_like_with_tensors_of_no_part_of_the_layout_is_refused(model, tmp_path):
    folder = write_folder(tmp_path / "in", {**written_tensors(model), "model.adapter.weight": torch.zeros(2)})
    with pytest.raises(WeightsError) as caught:
        export_pretrained(ModelSource(model), CONFIG, tmp_path / "out", like=folder)
    assert [(p.kind, p.key) for p in caught.value.problems] == [("unexpected", "model.adapter.weight")]


def test_the_tokenizer_goes_along(tmp_path):
    config = replace(CONFIG, vocab_size=4096)
    source = ModelSource(LanguageModel.create(config))
    export_pretrained(source, config, tmp_path / "out", tokenizer=BUNDLED_TOKENIZER)
    import tokenizers

    end = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).token_to_id("<|endoftext|>")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": end}
    with pytest.raises(WeightsError, match="has 4096 entries, the vocabulary only 64"):
        export_pretrained(
            ModelSource(LanguageModel.create(CONFIG)), CONFIG, tmp_path / "a", tokenizer=BUNDLED_TOKENIZER
        )


# -- FP8 -------------------------------------------------------------------------------------------------------------

WIDE = replace(
    CONFIG, hidden_size=192, num_heads=6, num_kv_heads=2, head_dim=48, dense_layers=(0,), intermediate_size=136,
    moe=replace(CONFIG.moe, num_experts=2, intermediate_size=130),
)  # fmt: skip


def test_fp8_is_within_half_a_step_of_every_number(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BLOCK_BYTES", 1)  # as small as it gets: 128 rows
    wide = LanguageModel.create(WIDE, seed=2)
    with torch.no_grad():
        for tensor in wide.state_dict().values():
            if tensor.ndim > 1:
                tensor.mul_(torch.exp(torch.randn(tensor.shape[-2], 1)))
    export_pretrained(ModelSource(wide), WIDE, tmp_path / "out", dtype="fp8")
    tensors, values = stored(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = values["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert values["torch_dtype"] == "bfloat16"
    scaled = {key for key in tensors if tensors[key].dtype == torch.float8_e4m3fn}
    assert {key.split(".")[-2] for key in scaled} == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(scaled) == 2 * 4 + 3 + 3 * 2
    plain = {key for key in tensors if tensors[key].dtype == torch.bfloat16}
    assert set(quantization["modules_to_not_convert"]) == {key.removesuffix(".weight") for key in plain}
    assert plain | scaled | {key + "_scale_inv" for key in scaled} == tensors.keys()
    again, expected = (written_tensors(m) for m in (load_pretrained_model(tmp_path / "out"), wide))
    for key in scaled:
        scales = tensors[key + "_scale_inv"].double()
        assert scales.shape == tuple(-(-n // 128) for n in tensors[key].shape)
        for i, rows in enumerate(expected[key].double().split(128, 0)):
            for j, block in enumerate(rows.split(128, 1)):
                amax = block.abs().max()
                assert torch.isclose(scales[i, j], amax.clamp(min=1e-4) / 448, rtol=1e-6)
                # 3 bits behind the point: half a step is 1/16 of a number, and below 2^-6 half of 2^-9
                error = (again[key][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].double() - block).abs()
                assert (error <= 1.0001 * torch.maximum(block.abs() / 16, scales[i, j] * 2**-10)).all(), key


@pytest.mark.parametrize("narrow", [False, True])
def test_an_fp8_folder_comes_back(tmp_path, narrow):
    wide = LanguageModel.create(WIDE, seed=2)
    export_pretrained(ModelSource(wide), WIDE, tmp_path / "first", dtype="fp8")
    if narrow:  # scales as Intern-S1-Pro has them
        tensors, values = stored(tmp_path / "first"), json.loads((tmp_path / "first" / "config.json").read_text())
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key] = torch.exp2(torch.log2(tensors[key]).ceil()).to(torch.float8_e8m0fnu)
            source = written_tensors(wide)[key.removesuffix("_scale_inv")]
            steps = tensors[key].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensors[key.removesuffix("_scale_inv")] = (source / steps[: source.shape[0], : source.shape[1]]).to(
                torch.float8_e4m3fn
            )
        values["quantization_config"]["scale_fmt"] = "ue8m0"
        shutil.rmtree(tmp_path / "first")
        write_folder(tmp_path / "first", tensors, values)
    source, config = open_source(tmp_path / "first")
    export_pretrained(source, config, tmp_path / "second", like=tmp_path / "first")
    one, other = stored(tmp_path / "first"), stored(tmp_path / "second")
    same_bytes(one, other)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    export_pretrained(source, config, tmp_path / "wide", dtype="bfloat16", like=tmp_path / "first")
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    assert {tensor.dtype for tensor in stored(tmp_path / "wide").values()} == {torch.bfloat16}


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    wide = LanguageModel.create(WIDE)
    with torch.no_grad():
        wide.layers[1].mlp.experts.down_proj[1, 3, 4] = 1e6
    with pytest.raises(WeightsError, match=r"experts\.1\.down_proj\.weight holds numbers beyond ±65504"):
        export_pretrained(ModelSource(wide), WIDE, tmp_path / "out", dtype="float16")
    with torch.no_grad():
        wide.layers[1].mlp.experts.down_proj[1, 3, 4] = float("nan")
    with pytest.raises(WeightsError, match=r"experts\.1\.down_proj\.weight holds numbers that are not finite"):
        export_pretrained(ModelSource(wide), WIDE, tmp_path / "out", dtype="fp8")
    assert list(tmp_path.iterdir()) == []
    export_pretrained(ModelSource(wide), WIDE, tmp_path / "out")  # as it is
    assert stored(tmp_path / "out")["model.layers.1.mlp.experts.1.down_proj.weight"].isnan().sum() == 1


# -- the audit -------------------------------------------------------------------------------------------------------


class Dictionary:
    """A source that is a dict."""

    def __init__(self, tensors):
        self._tensors = tensors
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def windows(self, name):
        return [tuple(slice(0, size) for size in self.tensors[name].shape)]

    def read(self, name, window):
        return self._tensors[name][window]


def test_every_tensor_of_source_and_config_is_accounted_for(model, tmp_path):
    tensors = dict(model.state_dict())
    del tensors["norm.weight"]
    tensors["layers.2.input_layernorm.weight"] = torch.zeros(32)
    tensors["embed_tokens.weight"] = torch.zeros(60, 32)
    tensors["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.int32)
    with pytest.raises(WeightsError) as caught:
        export_pretrained(Dictionary(tensors), CONFIG, tmp_path / "out")
    assert {(problem.kind, problem.key) for problem in caught.value.problems} == {
        ("missing", "norm.weight"), ("unexpected", "layers.2.input_layernorm.weight"), ("shape", "embed_tokens.weight"),
        ("type", "lm_head.weight"),
    }  # fmt: skip
    assert "nothing was written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_layout_has_no_words_for_is_refused(model, tmp_path):
    fourier = replace(CONFIG, positions=PositionConfig(kind="fope", theta=3e3, max_position_embeddings=128))
    source = ModelSource(LanguageModel.create(fourier))
    with pytest.raises(WeightsError, match=r"rotary_emb\.sin_coef"):
        export_pretrained(source, fourier, tmp_path / "out", layout="qwen3_moe")
    for options, message in (
        ({"layout": "mamba"}, "layout = 'mamba' is unknown: choose one of"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown"),
        ({"max_shard_bytes": 0}, "the shard size must be at least 1 byte, got 0"),
        ({"layout": "llama"}, "llama"),
        ({"like": tmp_path / "nowhere"}, "nowhere"),
    ):
        with pytest.raises(WeightsError, match=message):
            export_pretrained(ModelSource(model), CONFIG, tmp_path / "out", **options)
    with torch.device("meta"):
        empty = LanguageModel(CONFIG)
    with pytest.raises(WeightsError, match=r"has no weights yet: embed_tokens\.weight is on the meta device"):
        ModelSource(empty)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_nobody_contributes_are_refused(model, tmp_path):
    source = Dictionary(model.state_dict())
    source.windows = lambda name: [] if name == "norm.weight" else Dictionary.windows(source, name)
    with pytest.raises(WeightsError, match=r"the ranks contribute 0 numbers to norm\.weight, which has 32"):
        export_pretrained(source, CONFIG, tmp_path / "out")


# -- all or nothing --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(model, tmp_path):
    source = ModelSource(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("full", "file", "link"):
        for dry_run in (False, True):
            with pytest.raises(WeightsError, match=f"{name} exists: an export overwrites nothing"):
                export_pretrained(source, CONFIG, tmp_path / name, dry_run=dry_run)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_pretrained(source, CONFIG, tmp_path / "empty")
    assert is_pretrained_folder(tmp_path / "empty")
    result = export_pretrained(source, CONFIG, tmp_path / "deep" / "er", dry_run=True)
    assert result.total_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert result.bytes_written == 0
    assert not (tmp_path / "deep").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "link", "empty"}


def test_an_error_on_the_way_leaves_nothing(model, tmp_path):
    source, reads = Dictionary(model.state_dict()), []

    def broken(name, window):
        reads.append(name)
        if len(reads) == 20:
            raise OSError("the disk is gone")
        return Dictionary.read(source, name, window)

    source.read = broken
    with pytest.raises(OSError, match="the disk is gone"):
        export_pretrained(source, CONFIG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match=r"out needs 0\.000 GB, its file system has 0\.000 GB left"):
        export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_folder_do_not_mix(model, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "left.safetensors").write_text("of an export that was killed")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as an export that is under way holds it
    with pytest.raises(WeightsError, match="another process is exporting to"):
        export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    assert (partial / "left.safetensors").exists()
    os.close(descriptor)
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    same_bytes(stored(tmp_path / "out"), written_tensors(model))


def test_a_folder_that_a_rank_does_not_see_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARED_FOLDER_SECONDS", 0.2)
    begin = export._Export._begin

    def elsewhere(self, token):
        begin(self, token)
        (self.partial / ".export").write_text("of another machine")

    monkeypatch.setattr(export._Export, "_begin", elsewhere)
    with pytest.raises(WeightsError, match=r"rank 0 does not see .*partial, which rank 0 has made"):
        export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- sharded checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_windows_of_a_sharded_checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a": torch.randn(6, 5, generator=generator),
        "b": torch.randn(5, 6, generator=generator).T,  # not contiguous: the file keeps the strides
        "c": torch.randn(3, 4, 5, generator=generator).bfloat16(),
        "d": torch.tensor(3.0, dtype=torch.float64),
        "e": torch.zeros(0, 4),
    }
    save({"state_dict": {"model": tensors}, "rest": {"x": 3}}, checkpoint_id=tmp_path)
    source = ShardedTensors(tmp_path, "state_dict.model.")
    assert source.tensors == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        for window in (
            tuple(slice(0, n) for n in tensor.shape),
            tuple(slice(n // 3, n - n // 4) for n in tensor.shape),
        ):
            assert torch.equal(source.read(name, window), tensor[window]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damaged_sharded_checkpoints_are_refused(tmp_path, model):
    path = checkpoint(model, tmp_path / "last.ckpt", True)
    (file,) = path.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is damaged: .*\.distcp ends before"):
        open_source(path)
    file.write_bytes(content[:100] + bytes(len(content) - 100))
    source, config = open_source(path)
    with pytest.raises(ValueError, match="cannot be read"):
        export_pretrained(source, config, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt"}
    file.unlink()
    with pytest.raises(ValueError, match="no file of it"):
        open_source(path)


def test_foreign_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="has no 'language_model_config'"):
        open_source(tmp_path / "other.ckpt")
    torch.save({"state_dict": {"w": torch.zeros(2)}, "language_model_config": asdict(CONFIG)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"holds no tensors whose names begin with 'model\.'"):
        open_source(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "nothing")
