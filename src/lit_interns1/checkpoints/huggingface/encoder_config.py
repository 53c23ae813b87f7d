"""config.json of whole models: the parts about encoders, read and written by the same tables.

    vision_config → InternVisionConfig | NativeVisionConfig,   ts_config → TimeSeriesConfig,   placeholder ids

What the encoders here cannot do is refused by name, as for the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_interns1.checkpoints.huggingface.config import (
    CONFIG_FILE,
    ConfigFields,
    parse_pretrained_config,
    read_pretrained_config,
)
from lit_interns1.checkpoints.huggingface.config_writer import config_to_pretrained, default_layout
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.json_file import read_json
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.models import (
    InternVisionConfig,
    LanguageModel,
    LanguageModelConfig,
    MultimodalConfig,
    MultimodalModel,
    NativeVisionConfig,
    TimeSeriesConfig,
)


@dataclass(frozen=True)
class _Family:
    """How a family of layouts writes its image encoder.

    Attributes:
        config: Our config.
        fields: Our fields, and how files spell them.
        sides: Fields that files write as a side or as [height, width].
        only: Fields with the one value that the encoder here has.
        outer: The same at the top of config.json.
        model_type: Of vision_config, by layout.
        ids: Placeholder ids, by our name; the first spelling is written.
    """

    config: type[InternVisionConfig] | type[NativeVisionConfig]
    fields: Mapping[str, str]
    sides: tuple[str, ...]
    only: Mapping[str, Any]
    outer: Mapping[str, Any]
    model_type: Mapping[str, str]
    ids: Mapping[str, tuple[str, ...]]


_SIGNAL_IDS = ("ts_token_id", "time_series_token_id")
_INTERN = _Family(
    InternVisionConfig,
    {
        "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size", "image_size": "image_size", "patch_size": "patch_size",
        "norm": "norm_type", "qk_norm": "use_qk_norm", "attention_bias": "attention_bias",
        "norm_eps": "layer_norm_eps", "layer_scale": "layer_scale_init_value", "initializer_range": "initializer_range",
    },
    ("image_size", "patch_size"),
    {
        "hidden_act": "gelu", "use_absolute_position_embeddings": True, "use_mask_token": False,
        "use_mean_pooling": True, "num_channels": 3, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0, "drop_path_rate": 0.0,
    },
    {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
    {"interns1": "interns1_vision", "internvl": "internvl_vision"},
    {"image_token_id": ("image_token_id",), "time_series_token_id": _SIGNAL_IDS},
)  # fmt: skip
_INTERN_CHAT = _Family(
    InternVisionConfig,
    {
        "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size", "image_size": "image_size", "patch_size": "patch_size",
        "norm": "norm_type", "qk_norm": "qk_normalization", "attention_bias": "qkv_bias",
        "norm_eps": "layer_norm_eps", "layer_scale": "initializer_factor", "initializer_range": "initializer_range",
    },
    (),
    {"hidden_act": "gelu", "num_channels": 3, "attention_dropout": 0.0, "dropout": 0.0},
    {"select_layer": -1, "ps_version": "v2"},
    {"internvl_chat": "intern_vit_6b"},
    {"image_token_id": ("img_context_token_id", "image_token_id")},
)  # fmt: skip
_NATIVE = _Family(
    NativeVisionConfig,
    {
        "hidden_size": "hidden_size", "num_layers": "depth", "num_heads": "num_heads",
        "intermediate_size": "intermediate_size", "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size",
        "num_positions": "num_position_embeddings", "initializer_range": "initializer_range",
    },
    (),
    {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3},
    {},
    {"interns1_pro": "interns1_pro_vision", "qwen3_vl_moe": "qwen3_vl_moe_vision"},
    {"image_token_id": ("image_token_id",), "video_token_id": ("video_token_id",), "time_series_token_id": _SIGNAL_IDS},
)  # fmt: skip

FAMILIES: dict[str, _Family] = {
    name: family for family in (_INTERN, _INTERN_CHAT, _NATIVE) for name in family.model_type
}
"""By layout."""

_SIGNAL_FIELDS = {
    "hidden_size": "d_model", "num_layers": "encoder_layers", "num_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim", "adapted_size": "num_mel_bins", "max_positions": "max_source_positions",
    "output_size": "ts_adapt_out_dim", "patch_heads": "ts_patch_heads", "patch_intermediate_size": "ts_patch_ffn_dim",
}  # fmt: skip
"""The last two have one value in the released code, and no field there; small models of ours have other ones."""
_SIGNAL_ONLY = {
    "activation_function": "gelu", "scale_embedding": False, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
}  # fmt: skip
_SIGNAL_KEYS = ("ts_config", "time_series_config")


def multimodal_config_from_pretrained(folder: str | Path, image_token_id: int | None = None) -> MultimodalConfig:
    """The config of the whole model in a Hugging Face folder.

    Args:
        folder: Holds config.json.
        image_token_id: The placeholder of images, for files that do not name it (OpenGVLab's own).

    Raises:
        WeightsError: If there is none, its architecture is unknown, or a field asks for what is not supported.
    """
    text = read_pretrained_config(folder)
    path = Path(folder) / CONFIG_FILE
    return parse_multimodal_config(read_json(path), text.model, text.layout, path, image_token_id)


def parse_multimodal_config(
    values: Mapping[str, Any], text: LanguageModelConfig, layout: Layout, path: str | Path = CONFIG_FILE,
    image_token_id: int | None = None,
) -> MultimodalConfig:  # fmt: skip
    """What the values of a config.json say of the whole model; arguments and errors as above."""
    family = FAMILIES.get(layout.name)
    if family is None:
        raise WeightsError(f"{path}: {layout.name} is a layout of language models: it has no encoders")
    outer = ConfigFields(values, str(path))
    for name, value in family.outer.items():
        outer.only(name, (value,))
    ids: dict[str, Any] = {ours: outer.get(*theirs) for ours, theirs in family.ids.items()}
    if image_token_id is not None:
        if ids["image_token_id"] not in (None, image_token_id):
            raise WeightsError(f"image_token_id = {image_token_id}, but {path} says {ids['image_token_id']}")
        ids["image_token_id"] = image_token_id
    if ids["image_token_id"] is None:
        raise WeightsError(f"{path} has no {family.ids['image_token_id'][0]}: give image_token_id")
    signals = next((values[key] for key in _SIGNAL_KEYS if values.get(key)), None)
    try:
        vision = _vision(values, family, text, path)
        time_series = None if signals is None else _signals(signals, f"{path}: {_SIGNAL_KEYS[0]}", text)
        if time_series is None:
            ids.pop("time_series_token_id", None)
        return MultimodalConfig(text, vision, time_series, **ids, mrope_section=_sections(values, layout))
    except WeightsError:
        raise
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} describes no model: {error}") from None


def _vision(values: Mapping[str, Any], family: _Family, text: LanguageModelConfig, path: str | Path) -> Any:
    given = values.get("vision_config")
    if not isinstance(given, dict):
        raise WeightsError(f"{path} has no vision_config")
    fields = ConfigFields(given, f"{path}: vision_config")
    for name, value in family.only.items():
        fields.only(name, (value,))
    found = {ours: fields.get(theirs) for ours, theirs in family.fields.items()}
    for name in ("image_size", "patch_size"):
        side = found.get(name)
        if isinstance(side, list):
            if len(side) != 2 or side[0] != side[1]:
                raise WeightsError(f"{fields.where}: {name} = {side} is not supported, only squares")
            found[name] = side[0]
    if family.config is InternVisionConfig:
        ratio = values.get("downsample_ratio", 0.5)
        if not 0 < ratio <= 1 or round(1 / ratio) * ratio != 1:
            raise WeightsError(f"{path}: downsample_ratio = {ratio} must be one over a whole number")
        found["merge_size"] = round(1 / ratio)
    elif (width := fields.get("out_hidden_size")) not in (None, text.hidden_size):
        raise WeightsError(f"{fields.where}: out_hidden_size = {width} must be the decoder's {text.hidden_size}")
    return family.config(**{name: value for name, value in found.items() if value is not None})


def _signals(given: Any, where: str, text: LanguageModelConfig) -> TimeSeriesConfig:
    if not isinstance(given, dict):
        raise WeightsError(f"{where} is no object")
    fields = ConfigFields(given, where)
    for name, value in _SIGNAL_ONLY.items():
        fields.only(name, (value,))
    found = {ours: fields.get(theirs) for ours, theirs in _SIGNAL_FIELDS.items()}
    fields.only("out_hidden_size", (text.hidden_size,))
    if found["output_size"] is not None:
        fields.only("ts_hidden_dim", (found["output_size"],))
    joined = fields.get("ts_adapt_in_dim")
    if joined is not None:
        found["patch_size"] = joined // 2
    return TimeSeriesConfig(**{name: value for name, value in found.items() if value is not None})


def _sections(values: Mapping[str, Any], layout: Layout) -> tuple[int, int, int] | None:
    """Qwen3-VL's rotation by time, height and width; Intern-S1-Pro has taken its encoder without it."""
    if layout.name != "qwen3_vl_moe":
        return None
    text = values[layout.text_key]
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    if not rope.get("mrope_interleaved", True):
        raise WeightsError(f"{layout.name}: mrope_interleaved = False is not supported")
    first, second, third = rope.get("mrope_section") or (24, 20, 20)
    return first, second, third


# -- writing -----------------------------------------------------------------------------------------------------------


def multimodal_layout(config: MultimodalConfig) -> Layout:
    """The layout of Intern-S1 or Intern-S1-Pro, as the encoder says."""
    return LAYOUTS["interns1" if isinstance(config.vision, InternVisionConfig) else "interns1_pro"]


def multimodal_config_to_pretrained(
    config: MultimodalConfig, layout: Layout, dtype: str, like: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The values of the config.json of a whole model; arguments as `config_to_pretrained`.

    Raises:
        WeightsError: As `config_to_pretrained`, and if the layout has another encoder, or reads it otherwise.
    """
    family = FAMILIES.get(layout.name)
    if family is None or not isinstance(config.vision, family.config):
        kind = type(config.vision).__name__ if config.vision is not None else "no image encoder"
        raise WeightsError(f"the layout {layout.name} is not one of models with {kind}")
    base = {name: value for name, value in (like or {}).items() if name not in _SIGNAL_KEYS}
    values = config_to_pretrained(config.text, layout, dtype, base, quantization)
    vision: dict[str, Any] = {theirs: getattr(config.vision, ours) for ours, theirs in family.fields.items()}
    for name in family.sides:
        vision[name] = [vision[name], vision[name]]
    vision |= {"model_type": family.model_type[layout.name], **family.only}
    if isinstance(config.vision, InternVisionConfig):
        values["downsample_ratio"] = 1 / config.vision.merge_size
        values["image_seq_length"] = config.vision.tokens_per_tile
    else:
        vision |= {"out_hidden_size": config.text.hidden_size, "deepstack_visual_indexes": []}
        if layout.name == "interns1_pro":
            del vision["deepstack_visual_indexes"]
    values["vision_config"] = {**(base.get("vision_config") or {}), **vision}
    values |= family.outer
    for ours, theirs in family.ids.items():
        if (token := getattr(config, ours)) is not None:
            values[theirs[0]] = token
    if config.time_series is not None:
        values[_SIGNAL_KEYS[0]] = _signal_values(config.time_series, config.text)
    if config.mrope_section is not None:
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(rope := values[layout.text_key].get(name), dict):
                rope["mrope_section"] = list(config.mrope_section)
    read = parse_multimodal_config(values, parse_pretrained_config(values).model, layout)
    if differences := _differences(config, read):
        raise WeightsError(
            f"a config.json of the layout {layout.name} cannot say (ours → as it would be read): "
            + "; ".join(differences)
        )
    return values


def _signal_values(config: TimeSeriesConfig, text: LanguageModelConfig) -> dict[str, Any]:
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _SIGNAL_FIELDS.items()},
        **_SIGNAL_ONLY,
        "ts_adapt_in_dim": 2 * config.patch_size,
        "ts_hidden_dim": config.output_size,
        "out_hidden_size": text.hidden_size,
    }


_RUN_CHOICES = ("initializer_range", "dropout")


def _differences(config: MultimodalConfig, read: MultimodalConfig) -> list[str]:
    """Fields beside the decoder's that do not come back."""
    pairs: list[tuple[str, Any, Any]] = []
    for part in ("vision", "time_series"):
        ours, theirs = getattr(config, part), getattr(read, part)
        if (ours is None) != (theirs is None):
            pairs.append((part, ours, theirs))
        elif ours is not None:
            back = asdict(theirs)
            pairs += [(f"{part}.{n}", v, back[n]) for n, v in asdict(ours).items() if n not in _RUN_CHOICES]
    names = ("image_token_id", "video_token_id", "time_series_token_id", "mrope_section")
    pairs += [(name, getattr(config, name), getattr(read, name)) for name in names]
    return [f"{name}: {ours!r} → {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def check_same_encoders(config: MultimodalConfig, folder: str | Path) -> None:
    """Whether encoders mean the same under a model's config as under that of their folder.

    Raises:
        WeightsError: If not, with the fields that differ.
    """
    if differences := _differences(config, multimodal_config_from_pretrained(folder, config.image_token_id)):
        raise WeightsError(f"{folder} holds another network (model → folder): " + "; ".join(differences))


# -- language models and whole models alike ----------------------------------------------------------------------------

NetworkConfig = LanguageModelConfig | MultimodalConfig
"""What weights can be of."""


def network(config: NetworkConfig) -> LanguageModel | MultimodalModel:
    """The model that a config describes."""
    return MultimodalModel(config) if isinstance(config, MultimodalConfig) else LanguageModel(config)


def text_of(config: NetworkConfig) -> LanguageModelConfig:
    """The decoder."""
    return config.text if isinstance(config, MultimodalConfig) else config


def layout_of(config: NetworkConfig) -> Layout:
    """The plainest layout that can say what a network is; errors as `default_layout`."""
    return multimodal_layout(config) if isinstance(config, MultimodalConfig) else default_layout(config)


def pretrained_values(
    config: NetworkConfig, layout: Layout, dtype: str, like: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The values of a config.json; arguments and errors as `config_to_pretrained`."""
    if isinstance(config, MultimodalConfig):
        return multimodal_config_to_pretrained(config, layout, dtype, like, quantization)
    return config_to_pretrained(config, layout, dtype, like, quantization)
