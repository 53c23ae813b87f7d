"""Weights of a Hugging Face folder into a model of any layout: each rank reads what it holds, and nothing else.

    local[box ∩ shard] ← file[window]        for every piece of every tensor, cast on the way

Files are memory-mapped, so beside the model there is at most one matrix in memory, and that only where it is FP8.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_interns1.checkpoints.huggingface.audit import Source, plan_weights, saved_tensors
from lit_interns1.checkpoints.huggingface.config import PretrainedConfig, read_pretrained_config
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.files import WeightFiles, Window
from lit_interns1.checkpoints.huggingface.rules import Piece
from lit_interns1.models import LanguageModel, LanguageModelConfig
from lit_interns1.models.config import differing_fields
from lit_interns1.nn.initialization import allocate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedWeights:
    """What was read.

    Attributes:
        tensors: Tensors of the model that were filled.
        bytes_read: Bytes that this rank took from the files.
        elsewhere: Number of tensors in the files that are no part of the model, by pattern.
    """

    tensors: int
    bytes_read: int
    elsewhere: dict[str, int]


def load_pretrained_weights(
    model: nn.Module, folder: str | Path, device: torch.device | str = "cpu", check_config: bool = True
) -> LoadedWeights:
    """Fills a model in place with the weights of a Hugging Face folder.

    Args:
        model: A language model whose tensors are plain, DTensors of any mesh, or on the meta device.
        folder: Holds config.json and safetensors files.
        device: Where a model on the meta device goes.
        check_config: Refuse a model whose config gives the weights another meaning than config.json does, such as
            another base of the rotation. False for one that was changed on purpose.

    Raises:
        WeightsError: If the folder cannot be read or does not fit. The model is unchanged.
    """
    pretrained = read_pretrained_config(folder)
    config = getattr(model, "config", None)
    if check_config and isinstance(config, LanguageModelConfig):
        check_same_network(pretrained, config, folder)
    files = WeightFiles(Path(folder), pretrained.block_shape)
    plan = plan_weights(model, files, pretrained.layout)
    tensors = saved_tensors(model)
    for source in plan.sources:
        _check_copies(source, _window(tensors[source.name][0]), files)
    allocate(model, device)
    tensors = saved_tensors(model)
    for source in plan.sources:
        _fill(tensors[source.name][0], source, files)
    loaded = LoadedWeights(len(plan.sources), files.bytes_read, plan.elsewhere)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for pattern, count in plan.elsewhere.items():
            _log.warning("%s: %d tensors %s are not part of this model and were not read", folder, count, pattern)
        _log.info("%s: read %d tensors, %.3f GB", folder, loaded.tensors, loaded.bytes_read / 1e9)
    return loaded


def load_pretrained_model(folder: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The language model of a Hugging Face folder, with float32 parameters (or torch's default type).

    Raises:
        WeightsError: As `load_pretrained_weights`.
    """
    with torch.device("meta"):
        model = LanguageModel(read_pretrained_config(folder).model)
    load_pretrained_weights(model, folder, device)
    return model


_OWN_CHOICE = frozenset((
    "attention_backend", "activation_checkpointing", "expert_backend", "freeze_router", "router_gradient",
    "ste_temperature", "router_dtype", "head_dtype", "initializer_range", "fope_init_factor", "fope_seed",
    "fope_trainable",
))  # fmt: skip
"""Fields that leave the meaning of the weights as it is: how things are computed, started and trained."""

_IN_SHAPES = frozenset(("max_position_embeddings", "fope_separate_heads", "fope_num_frequencies"))
"""Fields that act only through the shape of the mixing matrices, which the audit compares."""


def check_same_network(pretrained: PretrainedConfig, config: LanguageModelConfig, folder: str | Path) -> None:
    """Whether weights mean the same under a model's config as under that of their folder.

    Raises:
        WeightsError: If not, with the fields that differ.
    """
    theirs, ours = _meaning(pretrained.model), _meaning(config)
    if differences := differing_fields(theirs, ours):
        raise WeightsError(f"{folder} holds another network (folder → model): " + "; ".join(differences))


def _meaning(config: LanguageModelConfig) -> dict[str, Any]:
    values = asdict(config)
    if config.num_moe_layers == config.num_layers:
        del values["intermediate_size"]
    for part in (values, values["moe"] or {}, values["positions"]):
        for name in (_OWN_CHOICE | _IN_SHAPES) & part.keys():
            del part[name]
    if config.positions.kind == "rope":
        del values["positions"]["fope_sin_pad"]
    return values


def _window(tensor: Tensor) -> Window:
    """What this rank holds of a tensor."""
    shape, first = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))


@torch.no_grad()
def _fill(tensor: Tensor, source: Source, files: WeightFiles) -> None:
    local, window = tensor.to_local() if isinstance(tensor, DTensor) else tensor, _window(tensor)
    for piece in source.pieces:
        for ours, theirs in _matrices(piece, window):
            target = local[tuple(slice(o.start - w.start, o.stop - w.start) for o, w in zip(ours, window, strict=True))]
            target.copy_(_as_ours(piece, files.read(piece.key, theirs)))


def _check_copies(source: Source, window: Window, files: WeightFiles) -> None:
    """Whether a tensor that is stored twice holds the same numbers, in this rank's part of it.

    Raises:
        WeightsError: If not.
    """
    for copy in source.copies:
        for piece in source.pieces:
            mine, other = piece.common(window), copy.common(window)
            if mine and other and not torch.equal(files.read(piece.key, mine[1]), files.read(copy.key, other[1])):
                raise WeightsError(
                    f"{files.folder}: tie_word_embeddings is true, but {copy.key} and {piece.key} differ"
                )


def _matrices(piece: Piece, window: Window) -> Iterator[tuple[Window, Window]]:
    """What piece and window share, one matrix of a stack after the other: in our coordinates, and in the file's."""
    stack = window[0] if len(window) == 3 and not piece.is_matrix else None
    parts = [window] if stack is None else [(slice(i, i + 1), *window[1:]) for i in range(stack.start, stack.stop)]
    for part in parts:
        if (shared := piece.common(part)) is not None:
            yield shared


def _as_ours(piece: Piece, values: Tensor) -> Tensor:
    values = values.mT if piece.transposed else values
    return values[None] if piece.is_matrix else values
