"""Reads what routers of other libraries decide, from outside.

    (logits_TE, _, ids_TK) = gate(x);    p = softmax(logits), or sigmoid(logits) / Σ_e sigmoid(logits)

A router of this package returns its statistics. A foreign one is a module whose output is looked at; which modules are
routers, and what their outputs mean, is what an adapter knows.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class GateReading(NamedTuple):
    """One forward pass of a foreign router.

    Attributes:
        logits_TE: (T, E) float32, detached.
        probabilities_TE: (T, E) float32, rows sum to 1.
        ids_TK: (T, K) experts used.
    """

    logits_TE: Tensor
    probabilities_TE: Tensor
    ids_TK: Tensor


@runtime_checkable
class GateAdapter(Protocol):
    """Knows the routers of a library."""

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the module, at this place in the model, is a router."""

    def num_experts(self, module: nn.Module) -> int:
        """E."""

    def read(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> GateReading:
        """What it decided, from the arguments and the output of its forward."""

    def bias(self, module: nn.Module) -> Tensor | None:
        """(E,) bias that steers its choice, if it has one."""


class TransformersGateAdapter:
    """Routers of transformers 5: modules that return (logits (T, E), weights, ids (T, K)).

    Qwen2/3-MoE, Mixtral, OLMoE, DeepSeek-V3, GLM-4-MoE and others. transformers itself is not needed.

    Args:
        class_name: Regular expression that the name of a router's class must contain.
        scores: How logits become probabilities: "softmax", or "sigmoid" over their sum (DeepSeek-V3, GLM-4-MoE).
        bias_name: Buffer that steers the choice, where there is one.

    Raises:
        ValueError: If `scores` is unknown.
    """

    def __init__(
        self, class_name: str = r"Top[kK]Router$", scores: Literal["softmax", "sigmoid"] = "softmax",
        bias_name: str = "e_score_correction_bias",
    ) -> None:  # fmt: skip
        if scores not in ("softmax", "sigmoid"):
            raise ValueError(f"TransformersGateAdapter.scores = {scores!r} must be softmax or sigmoid")
        self.class_name, self.scores, self.bias_name = re.compile(class_name), scores, bias_name

    def matches(self, name: str, module: nn.Module) -> bool:
        """By the class's name, and by a weight with a row per expert."""
        weight = getattr(module, "weight", None)
        return bool(self.class_name.search(type(module).__name__)) and isinstance(weight, Tensor) and weight.ndim == 2

    def num_experts(self, module: nn.Module) -> int:
        """Rows of the weight."""
        assert isinstance(module.weight, Tensor)
        return module.weight.shape[0]

    def read(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> GateReading:
        """Takes the first and the last of three outputs.

        Raises:
            TypeError: If the output is something else; the message names the class.
        """
        fits = isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)
        if not fits or output[2].is_floating_point() or output[0].shape[-1] != self.num_experts(module):
            raise TypeError(
                f"the router {type(module).__name__} does not return (logits, weights, ids): "
                "write a GateAdapter for it, or leave it out with TransformersGateAdapter(class_name=...)"
            )
        logits_TE = output[0].detach().float().flatten(0, -2)
        probabilities_TE = logits_TE.softmax(-1)
        if self.scores == "sigmoid":
            probabilities_TE = logits_TE.sigmoid()
            probabilities_TE = probabilities_TE / probabilities_TE.sum(-1, keepdim=True)
        return GateReading(logits_TE, probabilities_TE, output[2].detach().flatten(0, -2).long())

    def bias(self, module: nn.Module) -> Tensor | None:
        """The buffer called `bias_name`."""
        found = getattr(module, self.bias_name, None)
        return found if isinstance(found, Tensor) else None
