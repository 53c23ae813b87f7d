"""config.json written: what is read back is what was written, and what cannot be said is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_interns1.checkpoints import WeightsError
from lit_interns1.checkpoints.huggingface import LAYOUTS, end_of_text_ids
from lit_interns1.checkpoints.huggingface.config import parse_pretrained_config
from lit_interns1.checkpoints.huggingface.config_writer import config_to_pretrained, default_layout
from lit_interns1.models import LanguageModelConfig, MoEConfig, PositionConfig, preset
from lit_interns1.nn.rotary import kept_frequencies

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "interns1_pro_tiny" / "config.json").read_text())
DENSE = LanguageModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    positions=PositionConfig(theta=3e3, max_position_embeddings=128),
)  # fmt: skip
SPARSE = replace(DENSE, intermediate_size=0, moe=MoEConfig(8, 2, 12))
GROUPED = replace(SPARSE, moe=MoEConfig(8, 4, 12, router="grouped", num_groups=2, router_gradient="ste"))
FOPE = replace(GROUPED, positions=PositionConfig("fope", 3e3, 128, fope_sin_pad=1.0))


# -- any config of any layout ----------------------------------------------------------------------------------------

SIZES = st.integers(1, 40)


@st.composite
def positions(draw, head_dim, fourier):
    theta, longest = draw(st.floats(1.5, 1e7)), draw(st.integers(8, 1 << 20))
    if not fourier or draw(st.booleans()):
        return PositionConfig(theta=theta, max_position_embeddings=longest)
    half = head_dim // 2
    by_rule = kept_frequencies(head_dim, theta, longest, None)
    given_count = draw(st.integers(1, half)) if not 1 <= by_rule <= half or draw(st.booleans()) else None
    return PositionConfig(
        "fope", theta, longest, fope_sin_pad=1.0, fope_init_factor=draw(st.floats(0, 2)),
        fope_separate_heads=draw(st.booleans()), fope_num_frequencies=given_count,
    )  # fmt: skip


@st.composite
def experts(draw, layout):
    groups = draw(st.integers(1, 4)) if layout == "interns1_pro" else 1
    per_group = draw(st.integers(1, 6))
    return MoEConfig(
        num_experts=groups * per_group,
        experts_per_token=groups * draw(st.integers(1, per_group)),
        intermediate_size=draw(SIZES),
        router="grouped" if groups > 1 else "topk",
        num_groups=groups,
        normalize_weights=layout in ("qwen3_vl_moe", "mixtral") or draw(st.booleans()),
        router_gradient="ste" if layout == "interns1_pro" else "topk",
    )


@st.composite
def configs(draw, name):
    """What a layout can say, from what its text types are; written without the writer's own tables."""
    kinds = LAYOUTS[name].text_types or (name,)
    kind = draw(st.sampled_from(kinds))
    sparse = kind not in ("llama", "qwen3")
    layers, kv_heads, head_dim = draw(SIZES), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 40))
    dense = tuple(sorted(draw(st.sets(st.integers(0, layers - 1))))) if sparse and kind != "mixtral" else ()
    return LanguageModelConfig(
        vocab_size=draw(SIZES),
        hidden_size=draw(SIZES),
        num_layers=layers,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=draw(SIZES) if dense or not sparse else 0,
        moe=draw(experts(name)) if sparse else None,
        dense_layers=dense,
        positions=draw(positions(head_dim, name == "interns1_pro")),
        qk_norm=kind not in ("llama", "mixtral"),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(0, 1)),
    )


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_written_is_read(name, data):
    config, again = data.draw(configs(name)), data.draw(configs(name))
    values = json.loads(json.dumps(config_to_pretrained(config, LAYOUTS[name], "bfloat16")))
    read = parse_pretrained_config(values)
    assert read.model == config
    assert read.layout.name == name
    assert values["architectures"] == [LAYOUTS[name].architecture]
    # nothing of another network of the same layout is left, but widths of dense layers that do not exist
    like = {**values, "eos_token_id": 7}
    other, afresh = (config_to_pretrained(again, LAYOUTS[name], "float32", given) for given in (like, {}))
    assert parse_pretrained_config(other).model == again
    assert other.pop("eos_token_id") == 7
    for part in (other, afresh):
        text = part.get(LAYOUTS[name].text_key, part)
        text["intermediate_size"] = again.intermediate_size
        for form in ("rope_scaling", "rope_parameters"):
            (text[form] or {}).pop("mrope_section", None)
    assert other == afresh


# -- what is written -------------------------------------------------------------------------------------------------


def test_the_official_config_of_intern_s1_pro_comes_back():
    config = parse_pretrained_config(GOLDEN).model
    written = config_to_pretrained(config, LAYOUTS["interns1_pro"], "float32", GOLDEN)

    def added(theirs, ours):
        assert {k: v for k, v in ours.items() if k in theirs and not isinstance(v, dict)} == {
            k: v for k, v in theirs.items() if not isinstance(v, dict)
        }
        inner = {k: added(v, ours[k]) for k, v in theirs.items() if isinstance(v, dict)}
        return sorted(ours.keys() - theirs.keys()) + [f"{k}.{name}" for k, names in inner.items() for name in names]

    assert added(GOLDEN, written) == ["torch_dtype", "text_config.rope_parameters", "text_config.torch_dtype"]


def test_fields_for_old_and_new_readers():
    values = config_to_pretrained(
        replace(SPARSE, dense_layers=(1,), intermediate_size=9), LAYOUTS["qwen3_moe"], "float16"
    )
    assert values == {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "float16",
        "dtype": "float16", "tie_word_embeddings": False, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
        "initializer_range": 0.02, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "max_position_embeddings": 128, "rope_theta": 3e3, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e3}, "num_experts": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [1], "intermediate_size": 9, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 3,
    }  # fmt: skip
    pro = config_to_pretrained(replace(FOPE, tie_word_embeddings=True), LAYOUTS["interns1_pro"], "float32")
    assert pro["tie_word_embeddings"] is pro["text_config"]["tie_word_embeddings"] is True
    fourier = {"rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None}
    assert pro["text_config"]["rope_scaling"] == fourier
    assert pro["text_config"]["rope_parameters"] == {**fourier, "rope_theta": 3e3}
    assert pro["text_config"]["router_n_groups"] == 2
    assert pro["text_config"]["intermediate_size"] == 4 * 12
    vision = config_to_pretrained(replace(SPARSE, head_dim=128), LAYOUTS["qwen3_vl_moe"], "float32")["text_config"]
    assert vision["rope_scaling"]["mrope_section"] == vision["rope_parameters"]["mrope_section"] == [24, 20, 20]
    chat = config_to_pretrained(DENSE, LAYOUTS["internvl_chat"], "float32")
    assert chat["llm_config"]["architectures"] == ["Qwen3ForCausalLM"]


def test_what_a_config_says_of_other_things_is_kept():
    like = {
        "model_type": "internvl", "architectures": ["Old"], "image_token_id": 60, "torch_dtype": "float32",
        "quantization_config": {"quant_method": "gptq"}, "hidden_size": 999,
        "vision_config": {"hidden_size": 24, "dtype": "float32", "norm_type": "rms_norm"},
        "text_config": {
            "model_type": "llama", "vocab_size": 5, "num_local_experts": 77, "layer_types": ["full_attention"],
            "eos_token_id": 2, "use_cache": False, "rope_scaling": {"rope_type": "yarn"}, "mlp_bias": False,
        },
    }  # fmt: skip
    values = config_to_pretrained(DENSE, LAYOUTS["internvl"], "bfloat16", like)
    assert values["image_token_id"] == 60
    assert values["vision_config"] == {"hidden_size": 24, "dtype": "float32", "norm_type": "rms_norm"}
    assert values["architectures"] == ["InternVLForConditionalGeneration"]
    assert values["hidden_size"] == 32  # where a file repeats a field of the text part
    assert "quantization_config" not in values
    text = values["text_config"]
    assert (text["model_type"], text["vocab_size"], text["eos_token_id"], text["use_cache"]) == ("qwen3", 64, 2, False)
    assert text["layer_types"] == ["full_attention"] * 3
    assert not {"num_local_experts", "mlp_bias"} & text.keys()
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert config_to_pretrained(DENSE, LAYOUTS["internvl"], "bfloat16", like, blocks)["quantization_config"] == blocks
    assert like["quantization_config"] == {"quant_method": "gptq"}
    sections = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"model_type": "qwen3_vl_moe", "text_config": sections}
    text = config_to_pretrained(SPARSE, LAYOUTS["qwen3_vl_moe"], "float32", vision)["text_config"]
    assert text["rope_parameters"]["mrope_section"] == [2, 3, 3]


@pytest.mark.parametrize("name", ["qwen3", "internvl", "internvl_chat"])
def test_tokens_that_end_a_text_are_found_where_they_are_kept(name, tmp_path):
    key = LAYOUTS[name].text_key
    like = {"eos_token_id": 7} if name == "qwen3" else {key: {"eos_token_id": 7}}
    values = config_to_pretrained(DENSE, LAYOUTS[name], "float32", like)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert end_of_text_ids(tmp_path) == [7]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (replace(DENSE, qk_norm=False), "llama"), (DENSE, "qwen3"), (SPARSE, "qwen3_moe"), (GROUPED, "interns1_pro"),
        (FOPE, "interns1_pro"), (preset("tiny-s1-pro"), "interns1_pro"), (preset("intern-s1-241b"), "qwen3_moe"),
        (replace(SPARSE, positions=FOPE.positions), "interns1_pro"),
    ],
    ids=str,
)  # fmt: skip
def test_the_plainest_layout(config, name):
    assert default_layout(config).name == name


def test_choices_of_a_run_are_no_part_of_it():
    config = replace(
        FOPE, attention_backend="dense", activation_checkpointing="block", head_dtype="float32",
        moe=replace(FOPE.moe, router_gradient="topk", ste_temperature=2.0, freeze_router=True, router_dtype="native",
                    expert_backend="loop"),
        positions=replace(FOPE.positions, fope_seed=5, fope_trainable=True),
    )  # fmt: skip
    values = config_to_pretrained(config, LAYOUTS["interns1_pro"], "float32")
    assert values == config_to_pretrained(FOPE, LAYOUTS["interns1_pro"], "float32")
    one_group = replace(SPARSE, moe=replace(SPARSE.moe, router="grouped"))
    assert config_to_pretrained(one_group, LAYOUTS["qwen3_moe"], "float32")["num_experts"] == 8


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (replace(SPARSE, moe=MoEConfig(8, 2, 12, router="sigmoid")), "qwen3_moe",
         "moe.router: 'sigmoid' → 'topk'; layouts that can: none"),
        (replace(SPARSE, moe=MoEConfig(8, 2, 12, scaling_factor=2.5)), "interns1_pro",
         "moe.scaling_factor: 2.5 → 1.0; layouts that can: none"),
        (GROUPED, "qwen3_moe",
         "moe.num_groups: 2 → 1; moe.router: 'grouped' → 'topk'; layouts that can: interns1_pro"),
        (FOPE, "interns1", "positions.kind: 'fope' → 'rope'; layouts that can: interns1_pro"),
        (replace(DENSE, positions=FOPE.positions), "qwen3", "positions.kind: 'fope' → 'rope'; layouts that can: none"),
        (replace(FOPE, positions=replace(FOPE.positions, fope_sin_pad=0.0)), "interns1_pro",
         "positions.fope_sin_pad: 0.0 → 1.0; layouts that can: none"),
        (replace(DENSE, attention_bias=True), "qwen3", "attention_bias: True → False; layouts that can: none"),
        (DENSE, "llama", "qk_norm: True → False; layouts that can: qwen3, interns1, internvl, internvl_chat"),
        (replace(DENSE, qk_norm=False), "interns1",
         "qk_norm: False → True; layouts that can: llama, internvl, internvl_chat"),
        (SPARSE, "qwen3", "but its layers are dense; layouts that can: qwen3_moe, interns1, internvl, internvl_chat, "
         "interns1_pro, qwen3_vl_moe"),
        (DENSE, "interns1_pro", "moe: None, but its layers are sparse; layouts that can: qwen3, interns1, internvl"),
        (replace(SPARSE, moe=MoEConfig(8, 2, 12, normalize_weights=False)), "qwen3_vl_moe", "norm_topk_prob = False"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_layout_cannot_say_is_refused(config, name, message):
    with pytest.raises(WeightsError) as caught:
        config_to_pretrained(config, LAYOUTS[name], "float32")
    assert f"config.json of the layout {name} cannot say" in str(caught.value)
    assert message in str(caught.value)
    assert "fope_init_factor" not in str(caught.value)  # follows from the kind, which is named


def test_other_bad_input():
    every_frequency = replace(FOPE.positions, fope_sin_pad=0.0, fope_num_frequencies=8)  # nothing is padded
    assert default_layout(replace(FOPE, positions=every_frequency)).name == "interns1_pro"
    with pytest.raises(WeightsError, match=r"fope_sin_pad: 0\.0 → 1\.0; layouts that can: none"):
        default_layout(replace(FOPE, positions=replace(FOPE.positions, fope_sin_pad=0.0)))
    with pytest.raises(WeightsError, match="dtype = 'bf16' is unknown: choose one of float64, float32"):
        config_to_pretrained(DENSE, LAYOUTS["qwen3"], "bf16")
    with pytest.raises(WeightsError, match=r"like is a config\.json of the layout llama, not of qwen3"):
        config_to_pretrained(DENSE, LAYOUTS["qwen3"], "float32", {"model_type": "llama"})
    with pytest.raises(WeightsError, match="text_config = 3 is not an object"):
        config_to_pretrained(DENSE, LAYOUTS["interns1"], "float32", {"text_config": 3})
    vision = {"vision_config": {"deepstack_visual_indexes": [8]}}
    with pytest.raises(WeightsError, match=r"another meaning .*deepstack_visual_indexes = \[8\]"):
        config_to_pretrained(SPARSE, LAYOUTS["qwen3_vl_moe"], "float32", vision)
