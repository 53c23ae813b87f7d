"""config.json → `LanguageModelConfig`, field by field; what the network here cannot do is refused.

transformers has renamed fields: in files that its fifth version writes, `num_experts` is `num_local_experts`, and
`rope_theta` with `rope_scaling` is `rope_parameters`. Both spellings are read; where both are there, they must agree.
The tables are read backwards by `config_writer`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_interns1.checkpoints.gguf.config import gguf_end_of_text_ids, read_gguf_config
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.field_types import check_field_types
from lit_interns1.checkpoints.huggingface.json_file import read_json
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.data.gguf_file import is_gguf_file
from lit_interns1.models import LanguageModelConfig, MoEConfig, PositionConfig

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

DECODER_FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
}
"""Fields that every config must have: ours, and how files spell them."""

DEFAULTED_FIELDS: dict[str, tuple[str, ...]] = {
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "rms_norm_eps": ("rms_norm_eps",),
    "initializer_range": ("initializer_range",),
}
"""Fields that may be left out of a file."""

MOE_FIELDS: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "intermediate_size": ("moe_intermediate_size",),
}
"""The same for sparse layers."""

_MIXTRAL_FIELDS = {**MOE_FIELDS, "num_experts": ("num_local_experts",), "intermediate_size": ("intermediate_size",)}
_MOE_FIELDS_OF = {"mixtral": _MIXTRAL_FIELDS}


def moe_fields(text_type: str) -> dict[str, tuple[str, ...]]:
    """The fields of sparse layers in a text type."""
    return _MOE_FIELDS_OF.get(text_type, MOE_FIELDS)


ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
}
"""Fields that change the network, with the values that ours has."""

RUN_CHOICES = frozenset((
    "attention_backend", "activation_checkpointing", "expert_backend", "expert_precision", "freeze_router",
    "router_gradient", "ste_temperature", "router_dtype", "head_dtype", "fope_seed", "fope_trainable",
))  # fmt: skip
"""Fields of ours that no file has: how a network is computed and trained."""

_NO_MEANING = frozenset((
    "_name_or_path", "add_cross_attention", "architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "problem_type", "pruned_heads", "quantization_config", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise",
    "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
))  # fmt: skip
"""Fields that say nothing about the network: tokens, sampling, outputs, training losses, bookkeeping."""


class ConfigFields:
    """A config's fields; notes which were looked at."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where, self._used = values, where, set[str]()

    def get(self, *spellings: str, default: Any = None) -> Any:
        """The value, null and absent being the same; all spellings that are there must agree."""
        self._used.update(spellings)
        found = {name: self.values[name] for name in spellings if self.values.get(name) is not None}
        first = next(iter(found.values()), default)
        if any(value != first for value in found.values()):
            raise WeightsError(f"{self.where} contradicts itself: {', '.join(f'{k} = {v}' for k, v in found.items())}")
        return first

    def need(self, *spellings: str) -> Any:
        """As `get`; raises WeightsError if it is not there."""
        value = self.get(*spellings)
        if value is None:
            raise WeightsError(f"{self.where} has no {' or '.join(spellings)}")
        return value

    def only(self, name: str, allowed: Collection[Any]) -> None:
        """Raises WeightsError if the field has a value that is not allowed."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise WeightsError(
                f"{self.where}: {name} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}"
            )

    def unknown(self) -> list[str]:
        """Fields with a value that nobody has looked at."""
        looked_at = self._used | _NO_MEANING
        return sorted(k for k, v in self.values.items() if k not in looked_at and v not in (None, False, [], {}))


@dataclass(frozen=True)
class PretrainedConfig:
    """What config.json says.

    Attributes:
        layout: How the tensors are named.
        model: The network.
        block_shape: Rows and columns that share one scale, if tensors are FP8.
    """

    layout: Layout
    model: LanguageModelConfig
    block_shape: tuple[int, int] = (128, 128)


def is_pretrained_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a config.json, as Hugging Face's libraries write them, or a GGUF file."""
    return (Path(path) / CONFIG_FILE).is_file() or (is_gguf_file(path) and Path(path).is_file())


def config_from_pretrained(folder: str | Path) -> LanguageModelConfig:
    """The config of the language model in a Hugging Face folder.

    Raises:
        WeightsError: If there is none, its architecture is unknown, or a field asks for what is not supported.
    """
    return read_pretrained_config(folder).model


def end_of_text_ids(folder: str | Path) -> list[int]:
    """Tokens that end a text, as generation_config.json or else config.json says, or a GGUF file; may be empty."""
    if is_gguf_file(folder):
        return gguf_end_of_text_ids(folder)
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
        values = read_json(Path(folder) / name) if (Path(folder) / name).is_file() else {}
        for part in (values, *(values.get(layout.text_key) or {} for layout in LAYOUTS.values())):
            ids = part.get("eos_token_id") if isinstance(part, dict) else None
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if any(type(token) is not int or token < 0 for token in ids):
                    raise WeightsError(f"{Path(folder) / name}: eos_token_id = {ids!r:.80} are no token ids")
                return ids
    return []


def read_pretrained_config(folder: str | Path) -> PretrainedConfig:
    """All that config.json says; errors as `config_from_pretrained`."""
    folder = Path(folder)
    if is_gguf_file(folder):
        return PretrainedConfig(*read_gguf_config(folder))
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder of this machine: names of the Hub must be downloaded first")
    path = folder / CONFIG_FILE
    return parse_pretrained_config(read_json(path), path)


def parse_pretrained_config(values: Mapping[str, Any], path: str | Path = CONFIG_FILE) -> PretrainedConfig:
    """What the values of a config.json say.

    Args:
        values: Its content.
        path: Where they are from, for messages.

    Raises:
        WeightsError: As `config_from_pretrained`.
    """
    check_field_types(values, str(path))
    name = values.get("model_type")
    if name not in LAYOUTS:
        architecture = " ".join(values.get("architectures") or ["no architecture"])
        raise WeightsError(f"{path}: model_type = {name!r} ({architecture}) is unknown: known are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    text, where = values, str(path)
    if layout.text_types:
        text, where = values.get(layout.text_key), f"{path}: {layout.text_key}"  # type: ignore[assignment]
        if not isinstance(text, dict):
            raise WeightsError(f"{path} has no {layout.text_key}")
        if text.get("model_type") not in layout.text_types:
            raise WeightsError(
                f"{where}: model_type = {text.get('model_type')!r} is unknown in {name}: known are "
                + ", ".join(layout.text_types)
            )
    if deepstack := (values.get("vision_config") or {}).get("deepstack_visual_indexes"):
        raise WeightsError(
            f"{path}: vision_config.deepstack_visual_indexes = {deepstack} is not supported: the decoder takes image "
            "features at its input only"
        )
    fields = ConfigFields(text, where)
    # the outer config decides, as in transformers; if it is wrong, the audit of the keys says so
    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    try:
        model = _decoder(fields, str(text["model_type"]), bool(tied))
    except WeightsError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{where} describes no model: {error}") from None
    if unknown := fields.unknown():
        _log.warning("%s: nothing here depends on %s", where, ", ".join(unknown))
    return PretrainedConfig(layout, model, _block_shape(values, path))


def _decoder(fields: ConfigFields, text_type: str, tied: bool) -> LanguageModelConfig:
    for name, allowed in ONLY.items():
        fields.only(name, allowed)
    _full_attention_only(fields)
    shape = {ours: fields.need(*theirs) for ours, theirs in DECODER_FIELDS.items()}
    layers, heads = shape["num_layers"], shape["num_heads"]
    dense_layers: tuple[int, ...] = tuple(range(layers))
    moe = None
    if text_type in SPARSE_ROUTERS:
        step, listed = fields.get("decoder_sparse_step", default=1), fields.get("mlp_only_layers", default=[])
        dense_layers = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
        moe = MoEConfig(
            **{ours: fields.need(*theirs) for ours, theirs in moe_fields(text_type).items()},
            **SPARSE_ROUTERS[text_type](fields),
        )
    defaults = {
        "num_kv_heads": heads,
        "head_dim": 128 if text_type == "qwen3" else shape["hidden_size"] // heads,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    }
    shape |= {ours: fields.get(*theirs, default=defaults[ours]) for ours, theirs in DEFAULTED_FIELDS.items()}
    intermediate_size = fields.need("intermediate_size") if dense_layers else 0
    fields.get("intermediate_size")  # without dense layers it has no meaning
    return LanguageModelConfig(
        **shape,
        intermediate_size=intermediate_size,
        moe=moe,
        dense_layers=dense_layers if moe is not None else (),
        positions=_positions(fields, text_type, shape["head_dim"]),
        qk_norm=text_type not in WITHOUT_QK_NORM,
        tie_word_embeddings=tied,
    )


def _top_k(fields: ConfigFields) -> dict[str, Any]:
    return {"normalize_weights": fields.get("norm_topk_prob", default=False)}


def _always_normalized(fields: ConfigFields) -> dict[str, Any]:
    fields.only("norm_topk_prob", (True,))
    return {"normalize_weights": True}


def _grouped(fields: ConfigFields) -> dict[str, Any]:
    groups = fields.get("router_n_groups", default=1)
    router = {"router": "grouped", "num_groups": groups} if groups > 1 else {}
    # the files cannot say it: Intern-S1-Pro trains its router straight-through (arXiv 2603.25040 §2.2)
    return {"normalize_weights": fields.need("norm_topk_prob"), "router_gradient": "ste", **router}


SPARSE_ROUTERS = {
    "qwen3_moe": _top_k,
    "mixtral": _always_normalized,
    "qwen3_vl_moe_text": _always_normalized,
    "interns1_pro_text": _grouped,
}
"""How text types with sparse layers describe their router."""

WITHOUT_QK_NORM = frozenset(("llama", "mixtral"))
"""Text types that do not normalise queries and keys."""

RELEASED_SIN_PAD = 1.0
"""Padded sine channels of FoPE in the released code of Intern-S1-Pro; no file says it."""

_MORE_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "qwen3_vl_moe_text": ("mrope_section", "mrope_interleaved"),  # text has equal positions on all axes: plain RoPE
    "interns1_pro_text": ("fope_init_factor", "fope_sep_head", "fope_sep_heads", "num_inv_freq", "fope_num_inv_freq"),
}
"""What may stand beside base and type in the rope fields."""


def _full_attention_only(fields: ConfigFields) -> None:
    if fields.get("use_sliding_window", default=True) and (window := fields.get("sliding_window")):
        raise WeightsError(f"{fields.where}: sliding_window = {window} is in use, which is not supported")
    fields.get("sliding_window")
    if others := sorted(set(fields.get("layer_types", default=[])) - {"full_attention"}):
        raise WeightsError(f"{fields.where}: layer_types has {', '.join(others)}, only full_attention is supported")


def _positions(fields: ConfigFields, text_type: str, head_dim: int) -> PositionConfig:
    old, new = fields.get("rope_scaling", default={}), fields.get("rope_parameters", default={})
    values: dict[str, Any] = {}
    for part in (old, new, {"rope_theta": fields.get("rope_theta")}):
        for name, value in part.items():
            if value is not None and values.setdefault(name, value) != value:
                raise WeightsError(f"{fields.where} contradicts itself: {name} = {values[name]} and {value}")
    rope = ConfigFields(values, f"{fields.where}: rope_parameters")
    kind = rope.get("rope_type", "type", default="default")
    if kind != "default":
        raise WeightsError(f"{rope.where}: rope_type = {kind!r} is not supported, only 'default'")
    rope.only("partial_rotary_factor", (1.0,))
    known = {name: rope.get(name) for name in _MORE_ROPE_FIELDS.get(text_type, ())}
    theta = rope.get("rope_theta", default=1e4)
    if unknown := rope.unknown():
        raise WeightsError(f"{rope.where}: {', '.join(unknown)} is not supported in {text_type}")
    longest = fields.need("max_position_embeddings")
    fourier = [name for name in known if not name.startswith("mrope") and known[name] is not None]
    if not fourier:
        return PositionConfig(theta=theta, max_position_embeddings=longest)
    frequencies = rope.get("num_inv_freq", "fope_num_inv_freq")
    if frequencies is None and known["fope_init_factor"] is None:
        # the released code drops frequencies only where it finds one of these two
        frequencies = head_dim // 2
    return PositionConfig(
        kind="fope",
        theta=theta,
        max_position_embeddings=longest,
        fope_init_factor=known["fope_init_factor"] if known["fope_init_factor"] is not None else 0.0,
        fope_separate_heads=bool(rope.get("fope_sep_head", "fope_sep_heads", default=False)),
        fope_num_frequencies=frequencies,
        fope_sin_pad=RELEASED_SIN_PAD,
    )


def _block_shape(values: Mapping[str, Any], path: str | Path) -> tuple[int, int]:
    quantization = values.get("quantization_config")
    if not quantization:
        return (128, 128)
    method, shape = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(shape, list) or len(shape) != 2:
        raise WeightsError(
            f"{path}: quantization_config with quant_method = {method!r} and weight_block_size = {shape} is not "
            "supported, only 'fp8' with blocks of rows × columns"
        )
    return int(shape[0]), int(shape[1])
