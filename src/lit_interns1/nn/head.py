"""The language-model head: logits for generation, scores of given tokens for every loss.

    z = W h          logp = log softmax(z / τ)[target]          rank = |{v : z_v > z_target}|

Training never sees the logits of all tokens at once: cross-entropy, RL, preference and salience objectives read
`TokenScores`, which are made in chunks (`lit_interns1_kernels.linear_token_scores`). The weight is the head's own or
the embedding's; `logits_dtype=torch.float32` is the float32 head of Intern-S1-Pro's RL recipe, whose log-probabilities
must agree between training and rollout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.nn.initialization import Distribution, Normal
from lit_interns1_kernels.linear_token_scores import linear_token_scores


class TokenScores(NamedTuple):
    """What the head says about T given tokens. A NamedTuple, so that FSDP finds the tensors in it.

    Attributes:
        logp_T: (T,) float32, log-probability of the target in nats; 0 without gradient where the target is negative.
        logsumexp_T: (T,) float32, log of the sum of exp(z / τ) over the vocabulary; right for every position.
        entropy_T: (T,) float32, entropy of softmax(z / τ) in nats, or None if it was not asked for.
        rank_T: (T,) int64, vocabulary entries with a strictly larger logit than the target (0 = it is the best; 0 where
            the target is negative), or None if it was not asked for.
    """

    logp_T: Tensor
    logsumexp_T: Tensor
    entropy_T: Tensor | None = None
    rank_T: Tensor | None = None


class GradientHint:
    """A promise: the loss is, up to one scalar factor, Σ_t weight_T · (−logp_T) + z_loss · Σ_t weight_T · logsumexp_T².

    With it the head makes its gradients in forward. Backward checks the promise; a broken one costs time, never
    correctness. Neither a tuple nor a dataclass: FSDP would find the weights in it and round them to the dtype of its
    mixed precision, and no promise would be kept.

    Args:
        weight_T: (T,) floating point, no gradient.
        z_loss: Coefficient of the squared logsumexp.

    Raises:
        ValueError: If the weights are not such a vector or `z_loss` is not finite.
    """

    __slots__ = ("weight_T", "z_loss")

    def __init__(self, weight_T: Tensor, z_loss: float = 0.0) -> None:
        if weight_T.ndim != 1 or not weight_T.is_floating_point() or weight_T.requires_grad:
            raise ValueError(
                "GradientHint.weight_T must be a floating-point vector without gradient, got shape "
                f"{tuple(weight_T.shape)}, {weight_T.dtype}, requires_grad={weight_T.requires_grad}"
            )
        if not math.isfinite(z_loss):
            raise ValueError(f"GradientHint.z_loss = {z_loss} must be finite")
        self.weight_T, self.z_loss = weight_T, float(z_loss)


class LanguageModelHead(nn.Module):
    """A linear map to the vocabulary without bias.

    Call it as a module, so that the hooks of FSDP run. Do not put it under activation checkpointing: it already
    recomputes what it needs.

    Args:
        hidden_size: D.
        vocabulary_size: V.
        logits_dtype: None computes the logits in the dtype of the inputs (or of autocast); torch.float32 casts hidden
            states and weight first, whatever autocast says (V · D · 4 bytes more while the head is at work). Softmax
            and sums are float32 in any case.
        chunk_tokens: Tokens whose logits exist at the same time when targets are scored; default: 32 to 56 MiB of
            logits on a CPU, 512 MiB elsewhere.
        initializer_std: Standard deviation of the initial weights.

    Raises:
        ValueError: If a size is below 1 or `logits_dtype` is neither None nor torch.float32.
    """

    def __init__(
        self, hidden_size: int, vocabulary_size: int, *, logits_dtype: torch.dtype | None = None,
        chunk_tokens: int | None = None, initializer_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("vocabulary_size", vocabulary_size)):
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1, or None to choose by memory")
        if logits_dtype not in (None, torch.float32):
            raise ValueError(f"logits_dtype = {logits_dtype} must be None (dtype of the inputs) or torch.float32")
        self.logits_dtype, self.chunk_tokens, self.initializer_std = logits_dtype, chunk_tokens, initializer_std
        self.weight = nn.Parameter(torch.empty(vocabulary_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight again from the default random generator."""
        nn.init.normal_(self.weight, std=self.initializer_std)

    def parameter_distribution(self, name: str) -> Distribution:
        """Normal."""
        return Normal(self.initializer_std)

    def tie(self, embedding_weight: nn.Parameter) -> None:
        """Shares the Parameter of the embedding from now on; both gradients add up in it.

        Before `fully_shard`, and again after a move from the meta device, which separates shared parameters. Under
        FSDP embedding and head then are one unit: `fully_shard([embedding, head])`.

        Raises:
            ValueError: If the shape is not (V, D) of this head.
        """
        if embedding_weight.shape != self.weight.shape:
            raise ValueError(
                f"embedding weight {tuple(embedding_weight.shape)} cannot be tied to a head weight of "
                f"{tuple(self.weight.shape)} (vocabulary size, hidden size)"
            )
        self.weight = embedding_weight

    def forward(
        self,
        hidden_TD: Tensor,
        targets_T: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        rank: bool = False,
        gradient_hint: GradientHint | None = None,
    ) -> Tensor | TokenScores:
        """Logits, or the scores of the targets.

        Args:
            hidden_TD: (T, D); without targets any (..., D).
            targets_T: (T,) token ids to score, negative = none. Without them the logits (..., V) are returned as they
                are; temperature is the sampler's business then.
            temperature: τ > 0, divides the logits.
            entropy: Also give the entropy.
            rank: Also give the rank of the target.
            gradient_hint: What the loss will be; saves a quarter of the matrix products of a training step.

        Raises:
            ValueError: If an argument is out of range, shapes do not fit, or options for scores come without targets.
        """
        weight_VD: Tensor = self.weight
        enabled = torch.is_autocast_enabled(hidden_TD.device.type)
        if self.logits_dtype is not None:
            hidden_TD, weight_VD = hidden_TD.to(self.logits_dtype), weight_VD.to(self.logits_dtype)
            enabled = False
        with torch.autocast(hidden_TD.device.type, enabled=enabled):
            if targets_T is None:
                if temperature != 1.0 or entropy or rank or gradient_hint is not None:
                    raise ValueError("temperature, entropy, rank and gradient_hint need targets_T; without it: logits")
                return F.linear(hidden_TD, weight_VD)
            scores = linear_token_scores(
                hidden_TD, weight_VD, targets_T, temperature=temperature, entropy=entropy, rank=rank,
                loss_weight_T=None if gradient_hint is None else gradient_hint.weight_T,
                z_loss=0.0 if gradient_hint is None else gradient_hint.z_loss,
                chunk_tokens=self.chunk_tokens,
            )  # fmt: skip
        return TokenScores(*scores)

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        vocabulary_size, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, vocabulary_size={vocabulary_size}, logits_dtype={self.logits_dtype}"
