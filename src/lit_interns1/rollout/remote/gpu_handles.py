"""Tensors in the memory of a GPU as text: handles that another process on that GPU opens, not their numbers.

base64(pickle of (name, handle) pairs), the handles as torch.multiprocessing makes them
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from multiprocessing.reduction import ForkingPickler

from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from lit_interns1.rollout.engine import EngineError


def handles(named: Sequence[tuple[str, Tensor]], reduced: bool) -> str:
    """Handles of tensors in the memory of a GPU, which another process on it opens; not their numbers.

    Args:
        named: The tensors; they must live until the server has answered.
        reduced: As pairs of a function and its arguments, which is what LMDeploy unpacks; otherwise as they are.

    Raises:
        EngineError: If a tensor is not on a GPU.
    """
    off = next((f"{name} is on {t.device}" for name, t in named if t.device.type != "cuda"), None)
    if off is not None:
        raise EngineError(
            f"RemoteEngine: weight_transfer = 'tensor' shares the memory of a GPU with the server, and {off}: train on "
            "that GPU, or use weight_transfer = 'disk'"
        )
    return pickled([(name, reduce_tensor(t)) for name, t in named] if reduced else list(named))


def pickled(value: object) -> str:
    """As multiprocessing sends it, in base64."""
    stream = BytesIO()
    ForkingPickler(stream).dump(value)
    return base64.b64encode(stream.getvalue()).decode()
