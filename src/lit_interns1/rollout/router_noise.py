"""Noise on the logits of routers, for studies of the mismatch between an engine that generates and one that trains.

    z ← z + σ ε,   ε ~ N(0, 1), a function of (noise seed, layer, expert, key of the token)

Where real engines differ in the order of their sums, this engine is the trained module itself and differs in nothing:
noise stands for what kernels, parallel layouts and precisions do. It does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from lit_interns1.models.sampling import as_int64, random_bits, uniform
from lit_interns1.nn.moe import Router


class RouterNoise:
    """Adds noise to routers while it is entered.

    Args:
        routers: Of the model, in order.
        deviation: σ, standard deviation of the noise.
        seed: Of the noise.
    """

    def __init__(self, routers: Sequence[Router], deviation: float, seed: int) -> None:
        self._routers, self._deviation, self._seed = routers, deviation, as_int64(seed)
        self._key_T: Tensor | None = None

    def on_tokens(self, key_T: Tensor) -> None:
        """Takes the keys of the tokens of the next forward pass."""
        self._key_T = key_T

    def __enter__(self) -> RouterNoise:
        """Changes the routers' decisions."""
        for layer, router in enumerate(self._routers):
            router.decide = self._noisy(router.decide, layer)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the routers as they were."""
        for router in self._routers:
            del router.decide

    def _noisy(self, decide: Callable[..., tuple[Tensor, Tensor, Tensor]], layer: int):
        def noisy(logits_TE: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return decide(logits_TE + self._deviation * self._normal(logits_TE, layer), replay_TK)

        return noisy

    def _normal(self, logits_TE: Tensor, layer: int) -> Tensor:
        """(T, E) standard normal numbers (Box-Muller)."""
        assert self._key_T is not None
        experts = logits_TE.shape[1]
        number_E = torch.arange(experts, device=logits_TE.device) + layer * experts
        bits_TE = random_bits(random_bits(self._key_T, torch.full_like(self._key_T, self._seed))[:, None], number_E)
        radius, angle = 1.0 - uniform(bits_TE), uniform(random_bits(bits_TE, torch.zeros_like(bits_TE)))
        return ((-2.0 * radius.log()).sqrt() * (2.0 * math.pi * angle).cos()).to(logits_TE.dtype)
