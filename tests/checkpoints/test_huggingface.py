"""Hugging Face folders: what fits is read exactly, and whatever does not fit is named before anything is written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from huggingface_folders import CONFIG, VALUES, write_folder, written_tensors
from lit_interns1.checkpoints import (
    WeightsError,
    config_from_pretrained,
    load_pretrained_model,
    load_pretrained_weights,
)
from lit_interns1.models import LanguageModel, PositionConfig

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(CONFIG, seed=4)


@pytest.fixture
def tensors(model):
    return written_tensors(model)


def refused(folder, config=CONFIG):
    """The problems by kind; the model that was to be filled must be as before."""
    target = LanguageModel.create(config, seed=9)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_pretrained_weights(target, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    return [(problem.kind, problem.key) for problem in caught.value.problems], str(caught.value)


@pytest.mark.parametrize("files", [1, 3])
def test_a_folder_comes_back_bit_by_bit(model, tensors, tmp_path, files):
    folder = write_folder(tmp_path, tensors, files=files)
    assert config_from_pretrained(folder) == CONFIG
    target = LanguageModel.create(CONFIG, seed=9)
    loaded = load_pretrained_weights(target, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    assert loaded.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert loaded.tensors == len(model.state_dict())


def test_types_are_cast_on_the_way(model, tmp_path):
    folder = write_folder(tmp_path, written_tensors(model, torch.bfloat16))
    target = load_pretrained_model(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor.bfloat16().float()), name
    half = LanguageModel.create(CONFIG).bfloat16()
    load_pretrained_weights(half, write_folder(tmp_path, written_tensors(model)))
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())


# -- the audit -------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(tensors, tmp_path):
    del tensors[EXPERT], tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(8, 32)
    tensors["model.embed_tokens.weight"] = torch.zeros(60, 32)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(8, 32, dtype=torch.int8)
    problems, message = refused(write_folder(tmp_path, tensors))
    assert set(problems) == {
        ("missing", EXPERT), ("missing", "model.norm.weight"), ("unexpected", "model.layers.2.mlp.gate.weight"),
        ("shape", "model.embed_tokens.weight"), ("type", "model.layers.0.mlp.gate.weight"),
    }  # fmt: skip
    assert "2 missing" in message
    assert "(60, 32) in the file, (64, 32) needed" in message


def test_a_layer_too_many_or_too_few_is_refused(tensors, tmp_path):
    folder = write_folder(tmp_path, tensors, {**VALUES, "num_hidden_layers": 3})
    problems, message = refused(folder, replace(CONFIG, num_layers=3))
    assert {kind for kind, _ in problems} == {"missing"}
    assert len(problems) == 9 + 3 * 8
    assert "… and 13 more" in message
    folder = write_folder(tmp_path, tensors, {**VALUES, "num_hidden_layers": 1})
    problems, _ = refused(folder, replace(CONFIG, num_layers=1))
    assert {kind for kind, _ in problems} == {"unexpected"}
    problems, _ = refused(write_folder(tmp_path, tensors, {**VALUES, "num_experts": 6}), sparse(num_experts=6))
    assert {kind for kind, _ in problems} == {"shape", "unexpected"}


def sparse(**changes):
    return replace(CONFIG, moe=replace(CONFIG.moe, **changes))


def test_what_is_there_twice_is_refused(tensors, tmp_path):
    stack = "model.layers.0.mlp.experts.down_proj"
    folder = write_folder(tmp_path / "a", {**tensors, stack: torch.zeros(8, 32, 16)})
    problems, message = refused(folder)
    assert problems == [("duplicate", "model.layers.0.mlp.experts.{expert}.down_proj.weight")]
    assert stack in message
    folder = write_folder(tmp_path / "b", tensors, files=2)
    first, second = sorted(folder.glob("*.safetensors"))
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor}, second)
    problems, _ = refused(folder)
    assert problems == [("duplicate", key)]


def test_encoders_are_left_out_only_where_the_layout_says_so(tensors, tmp_path, caplog):
    tensors["model.visual.blocks.0.norm1.weight"] = torch.zeros(3)
    problems, _ = refused(write_folder(tmp_path / "text", tensors))
    assert problems == [("unexpected", "model.visual.blocks.0.norm1.weight")]
    nested = {k.replace("model.", "model.language_model.") if "visual" not in k else k: v for k, v in tensors.items()}
    text = {**VALUES, "model_type": "qwen3_vl_moe_text"}
    values = {"model_type": "qwen3_vl_moe", "text_config": text, "tie_word_embeddings": False}
    target = LanguageModel.create(CONFIG)
    # this layout stores experts as stacks
    stacked = {k: v for k, v in nested.items() if ".experts." not in k}
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        parts = [[nested[f"{prefix}{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(8)]
        stacked[prefix + "gate_up_proj"] = torch.stack([torch.cat(p[:2]).mT for p in parts]).contiguous()
        stacked[prefix + "down_proj"] = torch.stack([p[2].mT for p in parts]).contiguous()
    loaded = load_pretrained_weights(target, write_folder(tmp_path / "vision", stacked, values))
    assert loaded.elsewhere == {"model.visual.*": 1}
    assert "1 tensors model.visual.* are not part of this model" in caplog.text


@pytest.mark.parametrize(
    ("layout", "text_type", "body", "head"),
    [
        ("interns1", "qwen3_moe", "model.language_model.", ""),
        ("internvl", "qwen3_moe", "model.language_model.", ""),
        ("internvl", "qwen3_moe", "language_model.model.", "language_model."),
    ],
)
def test_text_parts_of_intern_s1(model, tensors, tmp_path, layout, text_type, body, head):
    renamed = {head + k if k.startswith("lm_head") else k.replace("model.", body, 1): v for k, v in tensors.items()}
    encoders = ("vision_tower.encoder.layer.0.lambda_1", "multi_modal_projector.linear_1.bias")
    renamed |= {f"{'' if head else 'model.'}{key}": torch.zeros(3) for key in encoders}
    text = {**VALUES, "model_type": text_type}
    values = {"model_type": layout, "text_config": text, "tie_word_embeddings": False}
    folder = write_folder(tmp_path, renamed, values)
    loaded = load_pretrained_model(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    values["text_config"] = {**text, "model_type": "mamba"}
    assert f"'mamba' is unknown in {layout}: known are" in refused(write_folder(tmp_path, renamed, values))[1]


def test_square_stacks_that_nothing_tells_apart_are_refused(tmp_path):
    tensors = written_tensors(LanguageModel.create(CONFIG))  # 2I = D: gate_up alone says nothing
    nested = {k.replace("model.", "model.language_model."): v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(2):
        nested[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(8, 32, 32)
    text = {**VALUES, "model_type": "qwen3_vl_moe_text"}
    folder = write_folder(tmp_path, nested, {"model_type": "qwen3_vl_moe", "text_config": text})
    problems, message = refused(folder)
    assert ("shape", "layers.0.mlp.experts.gate_up_proj") in problems
    assert "cannot be told apart" in message


# -- tied heads ------------------------------------------------------------------------------------------------------


def test_tied_heads(tmp_path):
    config = replace(CONFIG, tie_word_embeddings=True)
    model = LanguageModel.create(config, seed=4)
    tensors, values = written_tensors(model), {**VALUES, "tie_word_embeddings": True}
    both = write_folder(tmp_path / "both", tensors, values)
    embedding = write_folder(tmp_path / "one", {k: v for k, v in tensors.items() if k != "lm_head.weight"}, values)
    head = write_folder(tmp_path / "h", {k: v for k, v in tensors.items() if "embed_tokens" not in k}, values)
    for folder in (both, embedding, head):
        loaded = load_pretrained_model(folder)
        assert loaded.lm_head.weight is loaded.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    tensors["lm_head.weight"][3, 5] += 1
    _, message = refused(write_folder(tmp_path / "both", tensors, values), config)
    assert "lm_head.weight and model.embed_tokens.weight differ" in message
    untied = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    assert refused(write_folder(tmp_path / "one", untied))[0] == [("missing", "lm_head.weight")]


# -- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_are_multiplied_by_their_scales(model, tensors, tmp_path, scale_type):
    """Powers of two as scales and small integers as numbers: every product is exact."""
    rows, columns = 12, 10  # neither divides the matrices
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for key in [key for key in tensors if "proj" in key]:
        height, width = tensors[key].shape
        numbers = torch.randint(-8, 9, (height, width), generator=generator).float()
        scales = 2.0 ** torch.randint(-3, 4, (-(-height // rows), -(-width // columns)), generator=generator)
        tensors[key] = numbers.to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = scales.to(scale_type)
        expected[key] = torch.tensor(
            [[float(numbers[i, j] * scales[i // rows, j // columns]) for j in range(width)] for i in range(height)]
        )
    quantization = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    folder = write_folder(tmp_path, tensors, {**VALUES, "quantization_config": quantization})
    ours = written_tensors(load_pretrained_model(folder))
    assert len(expected) == 2 * (4 + 3 * 8)
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key


def test_scales_are_audited(tensors, tmp_path):
    tensors[EXPERT] = tensors[EXPERT].to(torch.float8_e4m3fn)
    assert refused(write_folder(tmp_path, tensors))[0] == [("missing", EXPERT + "_scale_inv")]
    tensors[EXPERT + "_scale_inv"] = torch.ones(2, 1)
    assert refused(write_folder(tmp_path, tensors))[0] == [("shape", EXPERT + "_scale_inv")]
    tensors[EXPERT + "_scale_inv"] = torch.ones(1, 1, dtype=torch.int64)
    assert refused(write_folder(tmp_path, tensors))[0] == [("type", EXPERT + "_scale_inv")]
    tensors[EXPERT] = torch.zeros(16, 32)
    tensors[EXPERT + "_scale_inv"] = torch.ones(1, 1)
    assert refused(write_folder(tmp_path, tensors))[0] == [("unexpected", EXPERT + "_scale_inv")]
    other = {**VALUES, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert "'gptq'" in refused(write_folder(tmp_path, tensors, other))[1]


# -- files -----------------------------------------------------------------------------------------------------------


def test_damaged_and_contradictory_files(tensors, tmp_path):
    folder = write_folder(tmp_path / "one", tensors)
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-40], whole[:30], b"", b"\xff" * 64, b"\x10" + b"\0" * 7 + b'{"a": 3}        '):
        (folder / "model.safetensors").write_bytes(content)
        assert "model.safetensors is damaged or no safetensors file" in refused(folder)[1]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle, which is not read" in refused(folder)[1]

    folder = write_folder(tmp_path / "many", tensors, files=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], **changes}}))
        return refused(folder)

    assert with_map(other="model-00001-of-00003.safetensors")[0] == [("missing", "other")]
    assert "nowhere.safetensors does not exist" in with_map(other="nowhere.safetensors")[1]
    assert "no file of this folder" in with_map(other="../one/model.safetensors")[1]
    weight_map = dict(content["weight_map"])
    key = next(iter(weight_map))
    del weight_map[key]
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refused(folder)[0] == [("unexpected", key)]
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        assert str(index) in refused(folder)[1]
    index.unlink()
    assert "holds 3 *.safetensors files, but no" in refused(folder)[1]
    save_file(tensors, folder / "model.safetensors")
    index.write_text(json.dumps(content))
    assert "remove the one that is out of date" in refused(folder)[1]


# -- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "'mamba' (MambaForCausalLM) is unknown",
        ),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096 is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor is not supported in qwen3_moe"),
        ({"rope_scaling": {"fope_init_factor": 0.5}}, "fope_init_factor is not supported in qwen3_moe"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta = 5.0 and 3000.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"vision_config": {"deepstack_visual_indexes": [8]}}, "deepstack_visual_indexes = [8] is not supported"),
        ({"num_experts": None}, "has no num_experts or num_local_experts"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "describes no model"),
        ({"hidden_size": "many"}, "hidden_size = 'many' is not a whole number"),
    ],
    ids=str,
)
def test_configs_that_are_not_honoured_are_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, **changes}))
    with pytest.raises(WeightsError) as caught:
        config_from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_folders_without_a_config(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        config_from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="names of the Hub must be downloaded first"):
        config_from_pretrained("Qwen/Qwen3-8B")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is no JSON"):
        config_from_pretrained(tmp_path)


def test_unknown_fields_are_mentioned(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, "sparkle": 3, "use_cache": True}))
    config_from_pretrained(tmp_path)
    assert "nothing here depends on sparkle" in caplog.text


def test_fope_fields_of_intern_s1_pro(tmp_path):
    text = {**VALUES, "model_type": "interns1_pro_text", "router_n_groups": 2}

    def positions(**fields):
        values = {
            "model_type": "interns1_pro",
            "text_config": {**text, "rope_scaling": {"rope_type": "default", **fields}},
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        return config_from_pretrained(tmp_path).positions

    rope = PositionConfig(theta=3e3, max_position_embeddings=128)
    fope = replace(rope, kind="fope", fope_sin_pad=1.0, fope_init_factor=0.25, fope_separate_heads=False)
    assert positions(fope_init_factor=None, fope_sep_head=None, num_inv_freq=None) == rope
    assert positions(fope_init_factor=0.25) == fope
    assert positions(fope_init_factor=0.25, fope_sep_head=True) == replace(fope, fope_separate_heads=True)
    assert positions(fope_init_factor=0.25, num_inv_freq=3) == replace(fope, fope_num_frequencies=3)
    # the released code then keeps all d/2 frequencies
    every = replace(fope, fope_init_factor=0.0, fope_separate_heads=True, fope_num_frequencies=8)
    assert positions(fope_sep_head=True) == every


def test_another_network_of_the_same_shapes_is_refused(tensors, tmp_path):
    folder = write_folder(tmp_path, tensors)
    other = replace(CONFIG, positions=replace(CONFIG.positions, theta=1e4))
    assert "positions.theta: 3000.0 → 10000.0" in refused(folder, other)[1]
    assert "moe.experts_per_token: 2 → 3" in refused(folder, sparse(experts_per_token=3))[1]
    assert "rms_norm_eps: 1e-05 → 1e-06" in refused(folder, replace(CONFIG, rms_norm_eps=1e-6))[1]
    load_pretrained_weights(LanguageModel.create(other), folder, check_config=False)
    trained = replace(sparse(router_gradient="ste", freeze_router=True), head_dtype="float32")
    load_pretrained_weights(LanguageModel.create(trained), folder)
