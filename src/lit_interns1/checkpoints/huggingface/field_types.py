"""Types and ranges of the fields of config.json that describe a network: checked before any of them is used.

A number as a string, a negative size, or a size that no network has ends with an error that names the field, and never
in a loop over 10¹² layers or a table of that length. null means absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lit_interns1.checkpoints.huggingface.errors import WeightsError

MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
MAX_POSITIONS = 1 << 40

_Check = tuple[str, Callable[[Any], bool]]


def _whole(low: int, high: int) -> _Check:
    return f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high


def _list_of(check: _Check) -> _Check:
    return f"a list, each {check[0]}", lambda value: isinstance(value, list) and all(map(check[1], value))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_SIZE, _INDEX, _LAYERS = _whole(1, MAX_SIZE), _whole(0, MAX_SIZE), _whole(1, MAX_LAYERS)
_SIDES: _Check = f"{_SIZE[0]} or a list of such", lambda value: all(map(_SIZE[1], _as_list(value)))
_POSITIVE: _Check = "a positive number", lambda value: type(value) in (int, float) and 0 < value < 1e30
_NUMBER: _Check = "a number from 0 on", lambda value: type(value) in (int, float) and 0 <= value < 1e30
_FLAG: _Check = "true or false", lambda value: isinstance(value, bool)
_TEXT: _Check = "a string", lambda value: isinstance(value, str)
_OBJECT: _Check = "an object", lambda value: isinstance(value, dict)

FIELD_TYPES: dict[str, _Check] = {
    **dict.fromkeys((
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
        "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "router_n_groups",
        "num_inv_freq", "fope_num_inv_freq", "num_heads", "num_position_embeddings", "temporal_patch_size",
        "spatial_merge_size", "out_hidden_size", "d_model", "encoder_attention_heads", "encoder_ffn_dim",
        "num_mel_bins", "max_source_positions", "ts_adapt_out_dim",
    ), _SIZE),
    **dict.fromkeys((
        "intermediate_size", "sliding_window", "image_token_id", "img_context_token_id", "video_token_id",
        "ts_token_id", "time_series_token_id",
    ), _INDEX),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("image_size", "patch_size"), _SIDES),
    "max_position_embeddings": _whole(1, MAX_POSITIONS),
    **dict.fromkeys((
        "rms_norm_eps", "rope_theta", "partial_rotary_factor", "layer_norm_eps", "downsample_ratio",
    ), _POSITIVE),
    **dict.fromkeys(("initializer_range", "fope_init_factor", "attention_dropout"), _NUMBER),
    **dict.fromkeys((
        "tie_word_embeddings", "norm_topk_prob", "attention_bias", "mlp_bias", "use_sliding_window", "fope_sep_head",
        "fope_sep_heads", "mrope_interleaved", "use_qk_norm", "qk_normalization", "qkv_bias",
    ), _FLAG),
    **dict.fromkeys(("model_type", "rope_type", "type", "hidden_act", "quant_method", "norm_type"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types"), _list_of(_TEXT)),
    **dict.fromkeys(("mlp_only_layers", "mrope_section", "deepstack_visual_indexes"), _list_of(_INDEX)),
    "weight_block_size": _list_of(_SIZE),
    **dict.fromkeys((
        "text_config", "llm_config", "vision_config", "ts_config", "time_series_config", "rope_scaling",
        "rope_parameters", "quantization_config",
    ), _OBJECT),
}  # fmt: skip
"""What a value must be, in words and as a test, by the field's name."""


def check_field_types(values: Mapping[str, Any], where: str) -> None:
    """Looks at all known fields, those of the objects inside included.

    Args:
        values: Content of a config.json or of an object in it.
        where: Its place, for messages.

    Raises:
        WeightsError: If a field has another type or lies outside its range.
    """
    for name, value in values.items():
        if value is None or name not in FIELD_TYPES:
            continue
        what, fits = FIELD_TYPES[name]
        if not fits(value):
            raise WeightsError(f"{where}: {name} = {value!r:.80} is not {what}")
        if isinstance(value, dict):
            check_field_types(value, f"{where}: {name}")
