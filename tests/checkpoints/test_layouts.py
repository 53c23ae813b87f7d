"""Whole models: decoder, vision, projector and time series under the names of every layout."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from huggingface_folders import CONFIG, VALUES, nested_modules, write_folder, written_tensors
from lit_interns1.checkpoints import WeightsError, load_pretrained_weights
from lit_interns1.checkpoints.huggingface.export import export_pretrained
from lit_interns1.checkpoints.huggingface.sources import ModelSource
from lit_interns1.models import LanguageModel, PositionConfig

H, M, D = 6, 8, 32  # width of the vision encoder, inside its feed-forward networks, of the decoder
FOPE = replace(
    CONFIG,
    moe=replace(CONFIG.moe, experts_per_token=4, router="grouped", num_groups=2),
    positions=PositionConfig("fope", 3e3, 128, fope_sin_pad=1.0),
)
FOPE_VALUES = {
    **VALUES, "model_type": "interns1_pro_text", "num_experts_per_tok": 4, "router_n_groups": 2,
    "rope_scaling": {"rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None},
}  # fmt: skip


# -- the files of every layout, written out by hand -------------------------------------------------------------------


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(name, rows, columns, bias=True):
    return {f"{name}.weight": random(rows, columns), **({f"{name}.bias": random(rows)} if bias else {})}


def norm(name, size, bias=True):
    return {f"{name}.weight": random(size), **({f"{name}.bias": random(size)} if bias else {})}


def intern_vit(prefix, big):
    """As transformers and Intern-S1 name it: the large one has RMSNorm, normalised queries and keys, and no biases."""
    embeddings = f"{prefix}vision_tower.embeddings."
    tensors = {
        embeddings + "cls_token": random(1, 1, H),
        embeddings + "position_embeddings": random(1, 5, H),
        embeddings + "patch_embeddings.projection.weight": random(H, 3, 2, 2),
        embeddings + "patch_embeddings.projection.bias": random(H),
    }
    for layer in range(2):
        block = f"{prefix}vision_tower.encoder.layer.{layer}."
        tensors |= {block + "lambda_1": random(H), block + "lambda_2": random(H) + 1}
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors |= {k: v + ord(name[0]) for k, v in linear(f"{block}attention.{name}", H, H, not big).items()}
        if big:
            tensors |= norm(block + "attention.q_norm", H, False) | norm(block + "attention.k_norm", H, False)
        tensors |= linear(block + "attention.projection_layer", H, H)
        tensors |= linear(block + "mlp.fc1", M, H) | linear(block + "mlp.fc2", H, M)
        tensors |= norm(block + "layernorm_before", H, not big) | norm(block + "layernorm_after", H, not big)
    projector = f"{prefix}multi_modal_projector."
    tensors |= norm(projector + "layer_norm", 4 * H)
    return tensors | linear(projector + "linear_1", D, 4 * H) | linear(projector + "linear_2", D, D)


def chat_vit(big):
    """The same in OpenGVLab's own files, with fused projections."""
    names = {
        "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
        "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
        "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
        "vision_tower.encoder.layer.": "vision_model.encoder.layers.", "lambda_": "ls",
        "attention.projection_layer": "attn.proj", "attention.": "attn.", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "multi_modal_projector.layer_norm": "mlp1.0",
        "multi_modal_projector.linear_1": "mlp1.1", "multi_modal_projector.linear_2": "mlp1.3",
    }  # fmt: skip
    renamed = {}
    for key, tensor in intern_vit("", big).items():
        for theirs, chat in names.items():
            key = key.replace(theirs, chat)
        renamed[key] = tensor
    for key in [key for key in renamed if "q_proj" in key]:
        parts = [renamed.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
        renamed[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return renamed


def native_vit():
    tensors = linear("model.visual.patch_embed.proj", H, 3)
    tensors["model.visual.patch_embed.proj.weight"] = random(H, 3, 2, 2, 2)
    tensors["model.visual.pos_embed.weight"] = random(9, H)
    for layer in range(2):
        block = f"model.visual.blocks.{layer}."
        tensors |= norm(block + "norm1", H) | norm(block + "norm2", H)
        tensors |= linear(block + "attn.qkv", 3 * H, H) | linear(block + "attn.proj", H, H)
        tensors |= linear(block + "mlp.linear_fc1", M, H) | linear(block + "mlp.linear_fc2", H, M)
    tensors |= norm("model.visual.merger.norm", H) | linear("model.visual.merger.linear_fc1", 4 * H, 4 * H)
    return tensors | linear("model.visual.merger.linear_fc2", D, 4 * H)


def time_series(prefix):
    part = f"{prefix}time_series."
    local = part + "encoder_embed.transformer_encoder.layers.0."
    tensors = {part + "encoder_embed.conv.weight": random(4, 1, 5), local + "self_attn.in_proj_weight": random(12, 4)}
    tensors |= linear(part + "encoder.layers.1.self_attn.q_proj", H, H)
    return tensors | norm(part + "projector.layer_norm", H) | linear(part + "encoder.adapt_in", H, 8)


def text(layout, body="model.language_model.", head=""):
    """The decoder's tensors: ours, and theirs."""
    model = LanguageModel.create(FOPE if layout == "interns1_pro" else CONFIG, seed=4)
    theirs = {
        head + k if k.startswith("lm_head") else k.replace("model.", body, 1): v
        for k, v in written_tensors(model).items()
    }
    if layout == "qwen3_vl_moe":
        theirs = {key: tensor for key, tensor in theirs.items() if ".experts." not in key}
        theirs |= {
            body + name: tensor.detach().mT.contiguous()
            for name, tensor in model.state_dict().items()
            if ".experts." in name
        }
    return model, theirs


LEGACY = {"body": "language_model.model.", "head": "language_model."}
FILES = {
    "interns1, large": ("interns1", intern_vit("model.", True) | time_series("model."), {}),
    "interns1, small": ("interns1", intern_vit("", False) | time_series(""), {}),
    "internvl, large": ("internvl", intern_vit("", True), LEGACY),
    "internvl, small": ("internvl", intern_vit("", False), LEGACY),
    "internvl as transformers 5 names it": ("internvl", intern_vit("model.", False), {}),
    "internvl_chat, large": ("internvl_chat", chat_vit(True), LEGACY),
    "internvl_chat, small": ("internvl_chat", chat_vit(False), LEGACY),
    "interns1_pro": ("interns1_pro", native_vit() | time_series("model."), {}),
    "interns1_pro, other time series": ("interns1_pro", native_vit() | time_series(""), {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", native_vit(), {}),
}


def config_values(layout):
    values = FOPE_VALUES if layout == "interns1_pro" else VALUES
    if layout == "qwen3_vl_moe":
        values = {**values, "model_type": "qwen3_vl_moe_text"}
    part = "llm_config" if layout == "internvl_chat" else "text_config"
    return {"model_type": layout, part: values, "tie_word_embeddings": False}


# -- whole models of ours ---------------------------------------------------------------------------------------------

OUR_NAMES = (
    (r".*(cls_token|class_embedding)", "vision.class_token"),
    (r"vision_\w+\.embeddings\.position_embeddings?", "vision.position_embedding"),
    (r"(vision_\w+\.embeddings\.patch_embeddings?(\.projection)?|visual\.patch_embed\.proj)", "vision.patch_embedding"),
    (r"visual\.pos_embed", "vision.position_embedding"),
    (r"(vision_\w+\.encoder\.layers?|visual\.blocks)\.(?=\d)", "vision.layers."),
    (r"\.(lambda_|ls)(?=\d)", ".layer_scale"),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.attn\.", ".attention."),
    (r"(?<=vision)(\.layers\.\d\.attention\.)proj(ection_layer)?\b", r"\1o_proj"),
    (r"(multi_modal_projector\.layer_norm|mlp1\.0|visual\.merger\.norm)", "projector.norm"),
    (r"(multi_modal_projector\.linear_1|mlp1\.1|visual\.merger\.linear_fc1)", "projector.fc1"),
    (r"(multi_modal_projector\.linear_2|mlp1\.3|visual\.merger\.linear_fc2)", "projector.fc2"),
    (r"mlp\.linear_fc", "mlp.fc"),
)
"""Encoders' names, one regular expression after the other: told in another way than by the tables."""


def encoder_tensors(stored):
    """What a model of ours holds of stored encoders."""
    result = {}
    for key, tensor in stored.items():
        name = key.removeprefix("model.")
        if not name.startswith("time_series"):
            for pattern, ours in OUR_NAMES:
                name = re.sub(pattern, ours, name)
        result[name] = tensor
    for name in [name for name in result if ".q_proj" in name and name.startswith("vision")]:
        parts = [result.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        result[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return result


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def whole_model(layout, encoders):
    model = nested_modules(shapes(encoder_tensors(encoders)))
    model.language_model = LanguageModel.create(FOPE if layout == "interns1_pro" else CONFIG, seed=9)
    return model


@pytest.fixture(params=FILES)
def files(request):
    layout, encoders, prefixes = FILES[request.param]
    model, theirs = text(layout, **prefixes)
    return layout, encoders, model, theirs


def test_whole_models_are_read_and_written_bit_by_bit(files, tmp_path):
    layout, encoders, decoder, theirs = files
    stored = {**theirs, **encoders}
    model = whole_model(layout, encoders)
    folder = write_folder(tmp_path / "theirs", stored, config_values(layout))
    assert load_pretrained_weights(model, folder).elsewhere == {}
    state = dict(model.state_dict())
    expected = encoder_tensors(encoders) | {f"language_model.{k}": v for k, v in decoder.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    export_pretrained(ModelSource(model), decoder.config, tmp_path / "again", like=folder)
    (file,) = (tmp_path / "again").glob("*.safetensors")
    again = load_file(file)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


def refused(model, folder):
    with pytest.raises(WeightsError) as caught:
        load_pretrained_weights(model, folder)
    assert caught.value.problems, caught.value
    return {(problem.kind, problem.key) for problem in caught.value.problems}


PARTS = {
    "interns1": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.",
                 "model.time_series."),
    "internvl": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
    "internvl_chat": ("language_model.model.", "language_model.lm_head.", "vision_model.", "mlp1."),
    "interns1_pro": ("model.language_model.", "lm_head.", "model.visual.", "model.visual.merger.",
                     "model.time_series."),
    "qwen3_vl_moe": ("model.language_model.", "lm_head.", "model.visual.", "model.visual.merger."),
}  # fmt: skip
"""What each part starts with, as it is usually written."""


@pytest.mark.parametrize(
    "name", [n for n in FILES if n not in ("interns1, small", "internvl as transformers 5 names it",
                                           "interns1_pro, other time series")],
)  # fmt: skip
def test_every_part_is_audited(name, tmp_path):
    """In each part a tensor is missing, one has another shape, and one is too many."""
    layout, encoders, prefixes = FILES[name]
    stored = {**text(layout, **prefixes)[1], **encoders}
    model, expected = whole_model(layout, encoders), set()
    for part in PARTS[layout]:
        keys = [key for key in stored if key.startswith(part)]
        absent = keys[len(keys) // 2]
        del stored[absent]
        stored[part + "other.weight"] = torch.zeros(2)
        expected |= {("missing", absent), ("unexpected", part + "other.weight")}
        if len(keys) > 1:
            last = next(key for key in reversed(keys) if "merger" not in key or "merger" in part)
            stored[last] = torch.zeros(*stored[last].shape, 1)
            expected.add(("shape", last))
    assert refused(model, write_folder(tmp_path, stored, config_values(layout))) == expected


@pytest.mark.parametrize("name", ["interns1, small", "internvl, large"])
def test_encoders_under_two_prefixes_are_refused(name, tmp_path):
    layout, encoders, prefixes = FILES[name]
    _, theirs = text(layout, **prefixes)
    other = intern_vit("model.", "large" in name) | (time_series("model.") if layout == "interns1" else {})
    problems = refused(
        whole_model(layout, encoders), write_folder(tmp_path, {**theirs, **encoders, **other}, config_values(layout))
    )
    assert {kind for kind, _ in problems} == {"duplicate"}
    assert len(problems) == len(encoder_tensors(encoders))


# -- parts that a model does not have --------------------------------------------------------------------------------


def count(tensors, prefix):
    return sum(key.startswith(prefix) for key in tensors)


def test_what_a_model_lacks_lies_elsewhere(files, tmp_path, caplog):
    layout, encoders, decoder, theirs = files
    folder = write_folder(tmp_path, {**theirs, **encoders}, config_values(layout))
    alone = LanguageModel.create(decoder.config, seed=9)
    loaded = load_pretrained_weights(alone, folder)
    assert sum(loaded.elsewhere.values()) == len(encoders)
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in decoder.state_dict().items())
    for pattern, number in loaded.elsewhere.items():
        assert f"{number} tensors {pattern} are not part of this model" in caplog.text
    # encoders without a decoder
    model = nested_modules(shapes(encoder_tensors(encoders)))
    loaded = load_pretrained_weights(model, folder)
    assert sum(loaded.elsewhere.values()) == len(theirs)
    head = next(key for key in theirs if "lm_head" in key).removesuffix("weight")
    assert loaded.elsewhere[f"{head}*"] == 1
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder_tensors(encoders).items())


def test_a_merger_inside_the_vision_module_is_a_part_of_its_own(tmp_path):
    _, theirs = text("interns1_pro")
    encoders = native_vit()
    buffers = {
        "model.language_model.rotary_emb.inv_freq": random(8),
        "time_series.encoder_embed.pos_encoder.pe": random(9, 1, 4),
    }
    stored = {**theirs, **encoders, **time_series(""), **buffers}
    folder = write_folder(tmp_path, stored, config_values("interns1_pro"))
    patterns = {
        "model.visual.*": count(encoders, "model.visual.") - 6, "model.visual.merger.*": 6,
        "time_series.*": len(time_series("")), "*.rotary_emb.inv_freq": 1, "*.encoder_embed.pos_encoder.pe": 1,
    }  # fmt: skip
    for parts in (("vision.",), ("projector.",), ("vision.", "projector."), ("time_series.",)):
        whole = whole_model("interns1_pro", {**encoders, **time_series("")})
        for name in {"vision.", "projector.", "time_series."} - set(parts):
            delattr(whole, name[:-1])
        mine = {"vision.": "model.visual.*", "projector.": "model.visual.merger.*", "time_series.": "time_series.*"}
        expected = {k: v for k, v in patterns.items() if k not in {mine[part] for part in parts}}
        assert load_pretrained_weights(whole, folder).elsewhere == expected, parts
    # what lies in a part that is there has to be part of it
    del whole.time_series
    whole.projector = nested_modules(shapes(encoder_tensors(encoders))).projector
    stored["model.visual.merger.norm3.weight"] = random(3)
    stored["model.visual.blocks.7.norm1.weight"] = random(3)
    problems = refused(whole, write_folder(tmp_path, stored, config_values("interns1_pro")))
    assert problems == {("unexpected", "model.visual.merger.norm3.weight")}


def test_a_buffer_that_a_model_has_is_no_longer_computed(tmp_path):
    _, theirs = text("interns1_pro")
    series = {**time_series(""), "time_series.encoder_embed.pos_encoder.pe": random(9, 1, 4)}
    model = whole_model("interns1_pro", series)
    loaded = load_pretrained_weights(model, write_folder(tmp_path, {**theirs, **series}, config_values("interns1_pro")))
    assert loaded.elsewhere == {}
    assert torch.equal(model.time_series.encoder_embed.pos_encoder.pe, random(9, 1, 4))


def test_encoders_that_a_layout_does_not_have(tmp_path):
    theirs, encoders = written_tensors(LanguageModel.create(CONFIG)), native_vit()
    problems = refused(whole_model("qwen3_moe", encoders), write_folder(tmp_path, {**theirs, **encoders}))
    assert {kind for kind, _ in problems} == {"missing", "unexpected"}
    assert ("missing", "vision.position_embedding.weight") in problems
    assert ("unexpected", "model.visual.pos_embed.weight") in problems
