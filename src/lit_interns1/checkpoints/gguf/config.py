"""Metadata of a GGUF file → `LanguageModelConfig`; what the network here cannot do is refused.

    {architecture}.embedding_length → hidden_size, .attention.head_count_kv → num_kv_heads, .rope.freq_base → theta, …

Every value under the architecture's name is looked at: one that is unknown may change the network, so it ends the
import. Sizes must be those of the tensors. A head is tied where the file has no `output.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from lit_interns1.checkpoints.gguf.layouts import ARCHITECTURES, Architecture
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.layouts import Layout
from lit_interns1.data.gguf_file import GGUFError, GGUFFile
from lit_interns1.models import LanguageModelConfig, PositionConfig

_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
"""Values that change the network, with those that ours has."""

_END_OF_TEXT = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def open_gguf_file(path: str | Path) -> GGUFFile:
    """Head of a file.

    Raises:
        WeightsError: If it cannot be read.
    """
    try:
        return GGUFFile(path)
    except GGUFError as error:
        raise WeightsError(str(error)) from None


def gguf_end_of_text_ids(path: str | Path) -> list[int]:
    """Tokens that end a text, as the file says; empty if it does not."""
    values = open_gguf_file(path).metadata
    return [value for key in _END_OF_TEXT if isinstance(value := values.get(key), int)]


def gguf_architecture(file: GGUFFile) -> Architecture:
    """What the file's architecture stands for.

    Raises:
        WeightsError: If it is none that can be read, or the file is not a whole model.
    """
    values = file.metadata
    if (kind := values.get("general.type", "model")) != "model":
        raise WeightsError(f"{file.path}: general.type = {kind!r} is not supported, only 'model'")
    if (parts := values.get("split.count", 0)) not in (0, 1):
        raise WeightsError(
            f"{file.path} is one of {parts} parts: join them first (llama-gguf-split --merge FIRST_PART WHOLE)"
        )
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise WeightsError(
            f"{file.path}: general.architecture = {name!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def read_gguf_config(path: str | Path) -> tuple[Layout, LanguageModelConfig]:
    """How a file names its tensors, and the network that it describes.

    Raises:
        WeightsError: If it cannot be read or is not supported.
    """
    file = open_gguf_file(path)
    return gguf_architecture(file).layout, gguf_config(file)


def gguf_config(file: GGUFFile) -> LanguageModelConfig:
    """The network that a file describes.

    Raises:
        WeightsError: If a value is missing, contradicts the tensors, or asks for what is not supported.
    """
    architecture, values = gguf_architecture(file), _Values(file)
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    shape: dict[str, Any] = {
        "num_layers": values.count("block_count"),
        "hidden_size": (hidden_size := values.count("embedding_length")),
        "intermediate_size": values.count("feed_forward_length"),
        "num_heads": (heads := values.count("attention.head_count")),
        "num_kv_heads": (kv_heads := values.count("attention.head_count_kv", heads)),
        "head_dim": (width := values.count("attention.key_length", max(1, hidden_size // heads))),
    }
    vocabulary, hidden = file_shape(file, "token_embd.weight", 2)
    shape["vocab_size"] = values.count("vocab_size", vocabulary)
    for name, said, found in (
        ("block_count", shape["num_layers"], len(layers)),
        ("vocab_size", shape["vocab_size"], vocabulary),
        ("embedding_length", shape["hidden_size"], hidden),
        ("feed_forward_length", shape["intermediate_size"], file_shape(file, "blk.0.ffn_gate.weight", 2)[0]),
        ("attention.head_count × width of a head", heads * width, file_shape(file, "blk.0.attn_q.weight", 2)[0]),
        ("attention.head_count_kv × width of a head", kv_heads * width, file_shape(file, "blk.0.attn_k.weight", 2)[0]),
    ):
        if said != found:
            raise WeightsError(f"{file.path}: {values.prefix}{name} = {said}, but its tensors have {found}")
    values.only("rope.dimension_count", (width,))
    values.only("attention.value_length", (width,))
    for name, allowed in _ONLY.items():
        values.only(name, allowed)
    theta, longest = values.number("rope.freq_base", 1e4), values.count("context_length")
    epsilon = values.number("attention.layer_norm_rms_epsilon")
    values.none_left()
    if "rope_freqs.weight" in file.tensors:
        raise WeightsError(f"{file.path}: rope_freqs.weight scales the rotation, which is not supported")
    try:
        return LanguageModelConfig(
            **shape,
            positions=PositionConfig(theta=theta, max_position_embeddings=longest),
            qk_norm=architecture.qk_norm,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            rms_norm_eps=epsilon,
            tie_word_embeddings="output.weight" not in file.tensors,
        )
    except ValueError as error:
        raise WeightsError(f"{file.path} describes no model: {error}") from None


def file_shape(file: GGUFFile, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there.

    Raises:
        WeightsError: If it is not, or has another number of dimensions.
    """
    if name not in file.tensors:
        raise WeightsError(f"{file.path} holds no tensor {name}")
    if len(shape := file.tensors[name].shape) != dimensions:
        raise WeightsError(f"{file.path}: {name} has the shape {shape}, not {dimensions} dimensions")
    return shape


class _Values:
    """Metadata under the architecture's name; notes what was looked at."""

    def __init__(self, file: GGUFFile) -> None:
        self.prefix, self._path = f"{file.metadata['general.architecture']}.", file.path
        self._values = {k: v for k, v in file.metadata.items() if k.startswith(self.prefix)}

    def _take(self, name: str, default: Any) -> Any:
        value = self._values.pop(self.prefix + name, default)
        if value is None:
            raise WeightsError(f"{self._path} has no {self.prefix}{name}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._take(name, default)
        if type(value) is not int or value < 1:
            raise WeightsError(f"{self._path}: {self.prefix}{name} = {value!r:.80} must be one whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0: of all decimal numbers that are the same in float32 the shortest, as 1e-05."""
        value = self._take(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise WeightsError(f"{self._path}: {self.prefix}{name} = {value!r:.80} must be one number above 0")
        return float(str(np.float32(value)))

    def only(self, name: str, allowed: Collection[Any]) -> None:
        """A value that may be absent, and else must be one of those."""
        if (value := self._values.pop(self.prefix + name, None)) is not None and value not in allowed:
            raise WeightsError(
                f"{self._path}: {self.prefix}{name} = {value!r:.80} is not supported, only "
                + " or ".join(map(repr, allowed))
            )

    def none_left(self) -> None:
        """Whether all was looked at."""
        if self._values:
            raise WeightsError(
                f"{self._path}: {', '.join(f'{k} = {v!r:.40}' for k, v in sorted(self._values.items()))} may change "
                "the network and is not supported"
            )
