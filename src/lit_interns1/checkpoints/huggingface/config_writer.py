"""`LanguageModelConfig` → config.json: `config` read backwards, and read again to see that nothing was lost.

    write(config, layout) = values        allowed only if        read(values) = config

Fields that only say how the network is computed or trained have no place in a file. Everything else that a layout has
no words for, or that its readers would take for something else, is refused by name with the layouts that can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lit_interns1.checkpoints.huggingface.config import (
    DECODER_FIELDS,
    DEFAULTED_FIELDS,
    MOE_FIELDS,
    ONLY,
    RUN_CHOICES,
    SPARSE_ROUTERS,
    WITHOUT_QK_NORM,
    moe_fields,
    parse_pretrained_config,
)
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.field_types import check_field_types
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.models import LanguageModelConfig
from lit_interns1.models.config import differing_fields
from lit_interns1.nn.rotary import kept_frequencies

DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Types of weights, as config.json spells them."""

_TEXT_ONLY = ("llama", "qwen3", "qwen3_moe", "mixtral", "interns1_pro")
_ONE_SPELLING_OF_EXPERTS = frozenset(("interns1_pro_text",))
_WITH_WINDOWS = frozenset(("qwen3", "qwen3_moe"))


def default_layout(config: LanguageModelConfig) -> Layout:
    """The plainest layout that can say what a network is: Llama, Qwen3, Qwen3-MoE, Mixtral, else Intern-S1-Pro.

    Raises:
        WeightsError: If none can, with what Intern-S1-Pro's would be read as.
    """
    found = next((LAYOUTS[name] for name in _TEXT_ONLY if not _unsayable(config, LAYOUTS[name])), None)
    if found is None:
        raise _refusal(config, LAYOUTS[_TEXT_ONLY[-1]])
    return found


def config_to_pretrained(
    config: LanguageModelConfig,
    layout: Layout,
    dtype: str,
    like: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a config.json.

    Args:
        config: The network.
        layout: How its tensors are named.
        dtype: Type of the weights: one of `DTYPES`.
        like: Values of a config.json of this layout. What it says of encoders and tokens is kept; what it says
            of the network, of types and of quantisation is replaced.
        quantization: Goes in as `quantization_config`; None: weights are not quantised.

    Raises:
        WeightsError: If the layout cannot say what the network is, or `like` is of another layout or contradicts it.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype = {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    like = like or {}
    check_field_types(like, "like")
    if like.get("model_type", layout.name) != layout.name:
        raise WeightsError(f"like is a config.json of the layout {like['model_type']}, not of {layout.name}")
    if _unsayable(config, layout):
        raise _refusal(config, layout)
    values = _values(config, layout, dtype, like)
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    if differences := _differences(config, values):
        raise WeightsError(
            f"fields of like give the network of {layout.name} another meaning (ours → as it would be read): "
            + "; ".join(differences)
        )
    return values


# -- what a layout can say -------------------------------------------------------------------------------------------


def _refusal(config: LanguageModelConfig, layout: Layout) -> WeightsError:
    others = [name for name, other in LAYOUTS.items() if not _unsayable(config, other)]
    return WeightsError(
        f"a config.json of the layout {layout.name} cannot say (ours → as it would be read): "
        f"{'; '.join(_unsayable(config, layout))}; layouts that can: {', '.join(others) or 'none'}"
    )


def _unsayable(config: LanguageModelConfig, layout: Layout) -> list[str]:
    """Fields, with their values, that a config.json of this layout has no words for."""
    text_type = _text_type(config, layout)
    if text_type is None:
        sparse = config.moe is not None
        return [f"moe: {config.moe!r}, but its layers are {'dense' if sparse else 'sparse'}"]
    return _differences(config, _values(config, layout, DTYPES[0], {}))


def _differences(config: LanguageModelConfig, values: Mapping[str, Any]) -> list[str]:
    try:
        read = parse_pretrained_config(values).model
    except WeightsError as error:
        return [str(error)]
    ours, theirs = _stated(config), _stated(read)
    for name in ours["positions"].keys() ^ theirs["positions"].keys():
        # Fourier fields are a consequence of the kind, which differs
        (ours if name in ours["positions"] else theirs)["positions"].pop(name)
    return differing_fields(ours, theirs)


def _stated(config: LanguageModelConfig) -> dict[str, Any]:
    """What a config says of the network: fields that act, each in one spelling."""
    values = asdict(config)
    if config.num_moe_layers == config.num_layers:
        del values["intermediate_size"]
    if config.moe is None:
        del values["dense_layers"]
    elif config.moe.num_groups == 1 and config.moe.router == "grouped":
        values["moe"]["router"] = "topk"
    if config.positions.kind == "rope":
        values["positions"] = {k: v for k, v in values["positions"].items() if not k.startswith("fope_")}
    elif _kept_frequencies(config) == config.head_dim // 2:
        del values["positions"]["fope_sin_pad"]
    for part in (values, values["moe"] or {}, values["positions"]):
        for name in RUN_CHOICES & part.keys():
            del part[name]
    return values


def _kept_frequencies(config: LanguageModelConfig) -> int:
    positions = config.positions
    return kept_frequencies(
        config.head_dim, positions.theta, positions.max_position_embeddings, positions.fope_num_frequencies
    )


def _text_type(config: LanguageModelConfig, layout: Layout) -> str | None:
    """`model_type` of the text part: among those that are as sparse the one whose attention is ours, else any."""
    types = [t for t in layout.text_types or (layout.name,) if (t in SPARSE_ROUTERS) == (config.moe is not None)]
    alike = [t for t in types if (t not in WITHOUT_QK_NORM) == config.qk_norm]
    return next(iter(alike or types), None)


# -- writing ---------------------------------------------------------------------------------------------------------


def _values(config: LanguageModelConfig, layout: Layout, dtype: str, like: Mapping[str, Any]) -> dict[str, Any]:
    text_type = _text_type(config, layout)
    assert text_type is not None
    types = {"torch_dtype": dtype, "dtype": dtype}
    outer = {
        "architectures": [layout.architecture],
        "model_type": layout.name,
        **types,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    like = {key: value for key, value in like.items() if key != "quantization_config"}
    if not layout.text_types:
        return _merged(like, outer | _text_values(config, text_type, like))
    text_like = {k: v for k, v in (like.get(layout.text_key) or {}).items() if k != "quantization_config"}
    text = {"model_type": text_type, **types, "tie_word_embeddings": config.tie_word_embeddings}
    if text_type in LAYOUTS:
        text["architectures"] = [LAYOUTS[text_type].architecture]
    text |= _text_values(config, text_type, text_like)
    repeated = {name: text[name] for name in like.keys() & text.keys() & _NETWORK_FIELDS}
    return {**like, **repeated, **outer, layout.text_key: _merged(text_like, text)}


def _merged(like: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `like` in their order, those of the network replaced or dropped, and then what is new."""
    return {k: v for k, v in like.items() if k in values or k not in _NETWORK_FIELDS} | dict(values)


def _text_values(config: LanguageModelConfig, text_type: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a decoder."""
    unused = ["partial_rotary_factor", *([] if text_type == "llama" else ["mlp_bias", "pretraining_tp"])]
    values = {name: allowed[0] for name, allowed in ONLY.items() if name not in unused}
    for table in (DECODER_FIELDS, DEFAULTED_FIELDS):
        values |= {theirs[0]: getattr(config, ours) for ours, theirs in table.items()}
    values |= _position_values(config, text_type, like)
    if config.num_moe_layers < config.num_layers:
        values["intermediate_size"] = config.intermediate_size
    if config.moe is not None:
        values |= _sparse_values(config, text_type, like)
    if text_type in _WITH_WINDOWS:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    if "layer_types" in like:
        values["layer_types"] = ["full_attention"] * config.num_layers
    return values


def _sparse_values(config: LanguageModelConfig, text_type: str, like: Mapping[str, Any]) -> dict[str, Any]:
    assert config.moe is not None
    if text_type == "mixtral":  # every layer is sparse, and weights are always normalised
        return {theirs[0]: getattr(config.moe, ours) for ours, theirs in moe_fields(text_type).items()}
    values: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    for ours, theirs in MOE_FIELDS.items():
        spellings = theirs[:1] if text_type in _ONE_SPELLING_OF_EXPERTS else theirs
        values |= dict.fromkeys(spellings, getattr(config.moe, ours))
    values["norm_topk_prob"] = config.moe.normalize_weights
    if text_type == "interns1_pro_text":
        values["router_n_groups"] = config.moe.num_groups
    if config.num_moe_layers == config.num_layers:
        # without dense layers it has no meaning; published files have the width that is active
        width = config.moe.experts_per_token * config.moe.intermediate_size
        values["intermediate_size"] = like.get("intermediate_size") or width
    return values


def _position_values(config: LanguageModelConfig, text_type: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """Both forms of the rotation's fields."""
    positions, kind = config.positions, {"rope_type": "default"}
    more: dict[str, Any] = {}
    if text_type == "interns1_pro_text":
        fourier = positions.kind == "fope"
        more = {
            "fope_init_factor": positions.fope_init_factor if fourier else None,
            "fope_sep_head": positions.fope_separate_heads if fourier else None,
            "num_inv_freq": positions.fope_num_frequencies if fourier else None,
        }
    elif text_type == "qwen3_vl_moe_text":
        more = {"mrope_section": _sections(config.head_dim // 2, like), "mrope_interleaved": True}
    return {
        "max_position_embeddings": positions.max_position_embeddings,
        "rope_theta": positions.theta,
        "rope_scaling": {**kind, **more} if more else None,
        "rope_parameters": {**kind, **more, "rope_theta": positions.theta},
    }


def _sections(frequencies: int, like: Mapping[str, Any]) -> list[int]:
    """Frequencies for time, height and width: those of `like`, else in the proportions of Qwen3-VL, 24 : 20 : 20."""
    for name in ("rope_parameters", "rope_scaling"):
        sections = (like.get(name) or {}).get("mrope_section")
        if sections and sum(sections) == frequencies:
            return list(sections)
    side = frequencies * 20 // 64
    return [frequencies - 2 * side, side, side]


_NETWORK_FIELDS = frozenset((
    *(name for table in (DECODER_FIELDS, DEFAULTED_FIELDS, MOE_FIELDS) for theirs in table.values() for name in theirs),
    *ONLY, "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "intermediate_size",
    "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "router_n_groups", "layer_types",
    "use_sliding_window", "sliding_window", "max_window_layers",
))  # fmt: skip
"""Fields of a decoder in any layout: where they are not written anew they would say what is no longer true."""
