"""The contract between a policy and whatever generates for it.

Order of a weight update for every engine: pause → update → flush the prefix cache → resume, with a new version. An
engine that holds the trained module itself has nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions

LogprobsKind = Literal["sampling", "raw", "none"]


class EngineError(RuntimeError):
    """An engine cannot do, or did not do, what was asked; the message names the engine and what to change."""


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine gives back.

    Attributes:
        logprobs: "sampling": log μ of the distribution that was drawn from; "raw": before temperature and truncation;
            "none".
        routed_experts: Whether it records routing.
        concurrent: Whether it generates while the trainer computes, so that rollouts may overlap with updates: its
            `generate` then calls no other rank, and may run in another thread.
        copies_weights: Whether it has weights of its own, which must be brought up to date.
    """

    logprobs: LogprobsKind = "sampling"
    routed_experts: bool = False
    concurrent: bool = False
    copies_weights: bool = False


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates samples. All calls are collective where the policy is divided over ranks."""

    capabilities: EngineCapabilities

    def connect(self, policy: nn.Module | Any, needs_routing: bool) -> None:
        """Called once, before anything else.

        Args:
            policy: The trained network, for engines that run it.
            needs_routing: Whether samples must carry routing.

        Raises:
            EngineError: If the engine cannot be reached, or cannot give what is needed.
        """

    def generate(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """The samples of each request, in order.

        Args:
            requests: May be empty on some ranks.
            options: How tokens are drawn.
            enough: Stop when so many requests are finished on this rank; samples of the others come back as "abort".

        Raises:
            EngineError: If it fails for good.
        """

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes over new weights.

        Args:
            weights: Names as in the Hugging Face layout, whole tensors, made one by one.
            version: What samples will be tagged with; it grows.
        """

    def close(self) -> None:
        """Gives back what it holds."""
