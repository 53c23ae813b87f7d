"""Opens what a run has saved, without running code: a single file, or of a sharded checkpoint all but the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_interns1.checkpoints.sharded_writer import METADATA_FILE

CONFIG_KEY = "language_model_config"
"""Where a checkpoint holds the config of the language model, as plain values."""
MULTIMODAL_KEY = "multimodal_config"
"""Where a checkpoint of a whole model holds that of all its parts."""
REWARD_KEY = "reward_model"
"""Where a checkpoint of a reward model says that it is one, beside the config of its body."""


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of a run, unpickled without running code: one file, or of a sharded one all but the tensors.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is truncated or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    file = path / METADATA_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint of a run: it has no {METADATA_FILE}")
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"checkpoint {path} cannot be read (truncated, or no checkpoint): {reason}") from None
    wanted = "global_step" if path.is_dir() else "state_dict"
    if not isinstance(checkpoint, dict) or wanted not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of a run: it has no {wanted!r}")
    return checkpoint
