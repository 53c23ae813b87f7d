"""What a server gives back for one sample, checked, and made a `Sample`.

tokens n, log-probabilities n, routing (P + n − 1, layers, K): any other count is an error, never cut or filled
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_interns1.rollout.engine import EngineError
from lit_interns1.rollout.samples import FinishReason, Sample, SamplingOptions

ABOVE_ZERO = 1e-3
"""A log-probability may be so far above 0 by rounding."""


class Answer(NamedTuple):
    """One sample as a dialect reads it.

    Attributes:
        ids: New tokens.
        logprobs: One per token.
        finish: "stop", "length" or "abort".
        routing: Expert ids, (tokens, layers, K) or flat; None = the server gave none.
        version: Of the server's weights, if it tells.
        request_id: The request that it answers, if it tells.
    """

    ids: list[int]
    logprobs: list[float]
    finish: str
    routing: Tensor | None = None
    version: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class RoutingShape:
    """What routing of the policy looks like.

    Attributes:
        layers: Numbers of its MoE layers among all layers.
        num_layers: All layers.
        experts_per_token: K.
        num_experts: E.
    """

    layers: tuple[int, ...]
    num_layers: int
    experts_per_token: int
    num_experts: int

    @classmethod
    def of(cls, config: Any) -> RoutingShape | None:
        """That of a language model's config; None if it is dense."""
        if config is None or config.moe is None:
            return None
        layers = tuple(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
        return cls(layers, config.num_layers, config.moe.experts_per_token, config.moe.num_experts)

    def checked(self, given: Tensor, rows: int) -> Tensor:
        """(rows, MoE layers, K) int16.

        Args:
            given: From the server, for the MoE layers or for all layers.
            rows: P + n − 1.

        Raises:
            EngineError: If it has another size, or ids are no experts.
        """
        per_row, rest = divmod(given.numel(), max(rows, 1))
        counts = (len(self.layers), self.num_layers)
        shape = tuple(given.shape)
        per_layer, uneven = divmod(per_row, self.experts_per_token)
        if rest or uneven or per_layer not in counts or (given.ndim == 3 and shape[0] != rows):
            wanted = " or ".join(f"({rows}, {count}, {self.experts_per_token})" for count in dict.fromkeys(counts))
            raise EngineError(f"routing of shape {shape} for {rows} tokens; wanted {wanted}")
        ids = given.reshape(rows, per_layer, self.experts_per_token)
        if per_layer != len(self.layers):
            ids = ids[:, list(self.layers)]
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= self.num_experts:
            raise EngineError(f"routing holds expert ids {low} … {high}, the policy has 0 … {self.num_experts - 1}")
        if self.experts_per_token > 1 and not bool(ids.any()):
            raise EngineError("routing is all zero: the server did not record it")
        return ids.to(torch.int16)


@dataclass(frozen=True)
class Wanted:
    """What an answer must fit.

    Attributes:
        options: How tokens are drawn. Greedy samples have no log-probabilities.
        version: What tokens are tagged with.
        shape: Routing that is needed; None = none.
        logprobs_flag: How a server is started so that it gives log-probabilities.
        routing_flag: How a server is started so that it gives routing.
        keep_logprobs: False: samples have no log-probabilities, whatever the server gives.
    """

    options: SamplingOptions
    version: int
    shape: RoutingShape | None
    logprobs_flag: str
    routing_flag: str
    keep_logprobs: bool = True

    def sample(self, answer: Answer, prompt_ids: Sequence[int], seed: int) -> Sample:
        """The sample.

        Raises:
            EngineError: If something does not fit together; it names the flag of the server that gives it.
        """
        count = len(answer.ids)
        if not 1 <= count <= self.options.max_new_tokens:
            raise EngineError(f"{count} tokens; 1 … {self.options.max_new_tokens} were asked for")
        if answer.finish not in ("stop", "length"):
            raise EngineError(f"it ends with {answer.finish!r}; stop or length is wanted")
        finish: FinishReason = "stop" if answer.finish == "stop" else "length"
        logprobs = self._logprobs(answer.logprobs, count)
        routing = self._routing(answer.routing, len(prompt_ids) + count - 1)
        versions = torch.full((count,), self.version)
        return Sample(tuple(prompt_ids), list(answer.ids), logprobs, finish, seed, versions, routing)

    def _logprobs(self, given: list[float], count: int) -> Tensor:
        if len(given) != count:
            raise EngineError(f"{count} tokens with {len(given)} log-probabilities: start it with {self.logprobs_flag}")
        if any(math.isnan(value) or value > ABOVE_ZERO for value in given):
            raise EngineError(
                f"log-probabilities up to {max(given):g}, which are none: start it with {self.logprobs_flag}"
            )
        logprobs = torch.tensor(given, dtype=torch.float32)
        return logprobs if self.keep_logprobs and self.options.temperature > 0 else logprobs.fill_(torch.nan)

    def _routing(self, given: Tensor | None, rows: int) -> Tensor | None:
        if self.shape is None:
            return None
        try:
            if given is None:
                raise EngineError("it has no routing")
            return self.shape.checked(given, rows)
        except EngineError as error:
            raise EngineError(f"{error}: start it with {self.routing_flag}") from None


def aborted(prompt_ids: Sequence[int], seed: int) -> Sample:
    """A sample that was not waited for."""
    none = torch.zeros(0)
    return Sample(tuple(prompt_ids), [], none, "abort", seed, none.long())
