"""Weights of a Hugging Face folder into a model of any layout: each rank reads what it holds, and nothing else.

    local[box ∩ shard] ← file[window]        for every piece of every tensor, cast on the way

Beside the model there is at most one matrix of an expert in memory, or 16 Mi numbers of a larger one. All checks come
first, and an error on one rank is an error on all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_interns1.checkpoints.agreement import gather, this_rank, together
from lit_interns1.checkpoints.huggingface.audit import Source, plan_weights, saved_tensors
from lit_interns1.checkpoints.huggingface.config import RUN_CHOICES, PretrainedConfig
from lit_interns1.checkpoints.huggingface.encoder_config import (
    check_same_encoders,
    multimodal_config_from_pretrained,
    text_of,
)
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.files import WeightFiles, Window
from lit_interns1.checkpoints.huggingface.opening import open_pretrained, verify_share
from lit_interns1.checkpoints.huggingface.rules import Piece
from lit_interns1.checkpoints.huggingface.sources import held_window, inside
from lit_interns1.models import LanguageModel, LanguageModelConfig, MultimodalConfig, MultimodalModel
from lit_interns1.models.config import differing_fields
from lit_interns1.nn.initialization import allocate, initialize_parameters

_log = logging.getLogger(__name__)

_BLOCK_NUMBERS = 1 << 24

_Found = dict[tuple[str, tuple[int, ...]], int]
"""How many numbers are not finite, by tensor and first index of the window that a rank holds of it."""


@dataclass(frozen=True)
class LoadedWeights:
    """What was read.

    Attributes:
        tensors: Tensors of the model that were filled.
        bytes_read: Bytes that this rank took from the files as weights.
        elsewhere: Number of tensors in the files that are no part of the model, by pattern.
        bytes_hashed: Bytes that this rank hashed beside that, to compare files with their checksums.
        nonfinite: How many numbers of a tensor are NaN or infinite in the model's type, by its name in the model, where
            there are any. Counted over all ranks; what several ranks hold counts once.
        fresh: Tensors that the files lack and that started afresh, such as the head of a reward model.
    """

    tensors: int
    bytes_read: int
    elsewhere: dict[str, int]
    bytes_hashed: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


def load_pretrained_weights(
    model: nn.Module,
    folder: str | Path,
    device: torch.device | str = "cpu",
    check_config: bool = True,
    verify_checksums: bool = True,
    seed: int = 0,
) -> LoadedWeights:
    """Fills a model in place with the weights of a Hugging Face folder. In a process group all ranks call it.

    Args:
        model: A language or reward model whose tensors are plain, DTensors of any mesh, or on the meta device.
        folder: Holds config.json and safetensors files, or is a GGUF file; all ranks see the same ones.
        device: Where a model on the meta device goes.
        check_config: Refuse a model whose config gives the weights another meaning than config.json does, such as
            another base of the rotation. False for one that was changed on purpose.
        verify_checksums: Compare the files with the SHA-256 sums of their index, if it has any; the ranks share the
            work, each file being hashed by one of them.
        seed: Of tensors that the files lack and that the model may start afresh.

    Raises:
        WeightsError: If the folder cannot be read or does not fit. The model is unchanged, unless the message says that
            reading broke off. All ranks raise the same.
    """
    with together():
        pretrained, files = open_pretrained(folder)
    return _load(model, pretrained, files, device, check_config, verify_checksums, seed)


def load_pretrained_model(
    folder: str | Path, device: torch.device | str = "cpu", verify_checksums: bool = True
) -> LanguageModel:
    """The language model of a Hugging Face folder, with float32 parameters (or torch's default type).

    Args:
        folder: As in `load_pretrained_weights`.
        device: Where the model goes.
        verify_checksums: As in `load_pretrained_weights`.

    Raises:
        WeightsError: As `load_pretrained_weights`.
    """
    with together():
        pretrained, files = open_pretrained(folder)
        with torch.device("meta"):
            model = LanguageModel(pretrained.model)
    _load(model, pretrained, files, device, check_config=False, verify_checksums=verify_checksums)
    return model


def load_pretrained_multimodal_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    verify_checksums: bool = True,
    image_token_id: int | None = None,
) -> MultimodalModel:
    """The whole model of a Hugging Face folder, with float32 parameters (or torch's default type).

    Args:
        folder: As in `load_pretrained_weights`.
        device: Where the model goes.
        verify_checksums: As in `load_pretrained_weights`.
        image_token_id: The placeholder of images, for files that do not name it (OpenGVLab's own).

    Raises:
        WeightsError: As `load_pretrained_weights`.
    """
    with together():
        pretrained, files = open_pretrained(folder)
        with torch.device("meta"):
            model = MultimodalModel(multimodal_config_from_pretrained(folder, image_token_id))
    _load(model, pretrained, files, device, check_config=False, verify_checksums=verify_checksums)
    return model


def _load(
    model: nn.Module,
    pretrained: PretrainedConfig,
    files: WeightFiles,
    device: torch.device | str,
    check_config: bool,
    verify_checksums: bool,
    seed: int = 0,
) -> LoadedWeights:
    with together():
        config = getattr(model, "config", None)
        if check_config and isinstance(config, (LanguageModelConfig, MultimodalConfig)):
            check_same_network(pretrained, text_of(config), files.folder)
        if check_config and isinstance(config, MultimodalConfig):
            check_same_encoders(config, files.folder)
        plan = plan_weights(model, files, pretrained.layout)
        bytes_hashed = verify_share(files) if verify_checksums else 0
        tensors = saved_tensors(model)
        for source in plan.sources:
            _check_copies(source, held_window(tensors[source.name][0]), files)
    found: _Found = {}
    with together():
        allocate(model, device)
        tensors = saved_tensors(model)
        try:
            for source in plan.sources:
                found |= _fill(tensors[source.name][0], source, files)
        except WeightsError as error:
            raise WeightsError(f"reading broke off, the model is filled in part: {error}") from None
        initialize_parameters(model, seed, only=plan.fresh)
    nonfinite: dict[str, int] = {}
    for (name, _), count in {key: count for part in gather(found) for key, count in part.items()}.items():
        nonfinite[name] = nonfinite.get(name, 0) + count
    loaded = LoadedWeights(len(plan.sources), files.bytes_read, plan.elsewhere, bytes_hashed, nonfinite, plan.fresh)
    if this_rank()[0] == 0:
        for pattern, count in plan.elsewhere.items():
            _log.warning("%s: %d tensors %s are not part of this model and were not read", files.folder, count, pattern)
        for name in plan.fresh:
            _log.info("%s does not hold %s: it starts afresh", files.folder, name)
        for name, count in nonfinite.items():
            _log.warning("%s: %d numbers of %s are NaN or infinite", files.folder, count, name)
        _log.info("%s: read %d tensors, %.3f GB", files.folder, loaded.tensors, loaded.bytes_read / 1e9)
    return loaded


_OWN_CHOICE = RUN_CHOICES | {"initializer_range", "fope_init_factor"}
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


@torch.no_grad()
def _fill(tensor: Tensor, source: Source, files: WeightFiles) -> _Found:
    """Fills what this rank holds of a tensor, and counts what is not finite in it."""
    local, window = tensor.to_local() if isinstance(tensor, DTensor) else tensor, held_window(tensor)
    nonfinite = 0
    for piece in source.pieces:
        for ours, theirs in _blocks(piece, window):
            target = local[inside(ours, window)]
            target.copy_(piece.as_ours(files.read(piece.key, theirs)))
            if not all(bound.isfinite() for bound in target.aminmax()):  # NaN is passed on by both
                nonfinite += target.numel() - int(target.isfinite().sum())
    return {(source.name, tuple(part.start for part in window)): nonfinite} if nonfinite else {}


def _check_copies(source: Source, window: Window, files: WeightFiles) -> None:
    """Whether a tensor that is stored twice holds the same numbers, in this rank's part of it.

    Raises:
        WeightsError: If not.
    """
    for copy in source.copies:
        for piece in source.pieces:
            for ours, mine in _blocks(piece, window):
                other = copy.common(ours)
                if other and not torch.equal(files.read(piece.key, mine), files.read(copy.key, other[1])):
                    raise WeightsError(
                        f"{files.folder}: tie_word_embeddings is true, but {copy.key} and {piece.key} differ"
                    )


def _blocks(piece: Piece, window: Window) -> Iterator[tuple[Window, Window]]:
    """What piece and window share, one matrix of a stack after the other and large ones in rows of the file: in our
    coordinates, and in the file's."""
    stack = window[0] if len(window) == 3 and not piece.is_matrix else None
    parts = [window] if stack is None else [(slice(i, i + 1), *window[1:]) for i in range(stack.start, stack.stop)]
    for part in parts:
        if (shared := piece.common(part)) is None:
            continue
        ours = shared[0]
        along = len(ours) - (1 if piece.transposed or len(ours) == 1 else 2)
        numbers = math.prod(size.stop - size.start for size in ours) // (ours[along].stop - ours[along].start)
        step = max(_BLOCK_NUMBERS // numbers, 1)
        for start in range(ours[along].start, ours[along].stop, step):
            rows = slice(start, min(start + step, ours[along].stop))
            if (block := piece.common((*ours[:along], rows, *ours[along + 1 :]))) is not None:
                yield block
