"""Weights that a run starts from: a Hugging Face folder, a GGUF file, or a checkpoint of an earlier run.

Of a checkpoint the language model's weights are taken and nothing else: no optimizer, no clock, no place in the data.
A reward model takes the body of a language model, and the head of a reward model where there is one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_interns1.checkpoints import (
    CONFIG_KEY,
    METADATA_FILE,
    MULTIMODAL_KEY,
    REWARD_KEY,
    WeightsError,
    config_from_pretrained,
    load_pretrained_weights,
    load_sharded,
    read_checkpoint,
)
from lit_interns1.checkpoints.huggingface import LoadedWeights, is_pretrained_folder
from lit_interns1.checkpoints.whole import load_whole_weights
from lit_interns1.models import LanguageModelConfig
from lit_interns1.models.config import config_from_dict, differing_fields
from lit_interns1.nn.initialization import allocate, initialize_parameters


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path leads to what a run has saved, and not to a Hugging Face folder or a GGUF file."""
    path = Path(path)
    return not is_pretrained_folder(path) and (path.is_file() or (path / METADATA_FILE).is_file())


def config_of_weights(path: str | Path) -> LanguageModelConfig:
    """The config of the language model whose weights lie there.

    Raises:
        WeightsError: If it is a folder or a GGUF file that cannot be read, or a checkpoint without a language model.
        ValueError: As `read_checkpoint`.
    """
    if not is_checkpoint(path):
        return config_from_pretrained(path)
    return config_from_dict(_checkpoint(path)[CONFIG_KEY])


def load_weights(
    model: nn.Module, path: str | Path, device: torch.device | str = "cpu", check_config: bool = True, seed: int = 0
) -> LoadedWeights | None:
    """Fills a model in place, divided over ranks or whole. In a process group all ranks call it.

    Args:
        model: A language or reward model whose tensors are plain, DTensors of any mesh, or on the meta device.
        path: A Hugging Face folder, a GGUF file, or a checkpoint of `LanguageModelModule` or of a module built on it.
            For a reward model also a checkpoint of `RewardModelModule`.
        device: Where a model on the meta device goes.
        check_config: Refuse a model with another config than that of the weights.
        seed: Of the head of a reward model, if there is none in the weights.

    Returns:
        What was read; None for a checkpoint.

    Raises:
        WeightsError: If they cannot be read or do not fit.
    """
    if not is_checkpoint(path):
        return load_pretrained_weights(model, path, device, check_config, seed=seed)
    checkpoint = _checkpoint(path)
    differences = differing_fields(checkpoint[CONFIG_KEY], asdict(model.config))  # type: ignore[call-overload]
    if check_config and differences:
        raise WeightsError(f"{path} holds another network (checkpoint → model): " + "; ".join(differences))
    own_head: tuple[str, ...] = getattr(model, "fresh_weights", ())
    foreign: tuple[str, ...] = getattr(model, "foreign_weights", ())
    fresh = () if REWARD_KEY in checkpoint else own_head
    if REWARD_KEY in checkpoint and not own_head:
        raise WeightsError(f"{path} holds a reward model, which has no head for a {type(model).__name__}")
    prefix = "model.language_model." if MULTIMODAL_KEY in checkpoint else "model."
    allocate(model, device)
    if Path(path).is_dir():
        own = model.state_dict().items()
        load_sharded({"state_dict": {prefix + name: tensor for name, tensor in own if name not in fresh}}, path)
    else:
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        weights = {name: tensor for name, tensor in weights.items() if name not in foreign}
        try:
            load_whole_weights(model, weights, absent=fresh)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from None
    initialize_parameters(model, seed, only=fresh)
    return None


def _checkpoint(path: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    if CONFIG_KEY not in checkpoint:
        raise WeightsError(f"checkpoint {path} has no {CONFIG_KEY!r}: it holds no language model")
    return checkpoint
