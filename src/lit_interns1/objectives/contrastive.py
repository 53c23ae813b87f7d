"""Contrastive losses over pairs of an image and its caption, exact over all ranks.

    s_ij = t · x_i·y_j + b        x, y: embeddings of length 1;   t: inverse temperature, b: bias, both learned
    softmax  L = −1/2N Σ_i (log softmax_j(s_ij)[i] + log softmax_j(s_ji)[i])         CLIP,   arXiv 2103.00020 §2.3
    sigmoid  L = −1/N Σ_i Σ_j log σ(z_ij s_ij),   z = 1 where i and j belong together, else −1    SigLIP, 2303.15343 §3

N counts the pairs of all ranks. Each rank computes the terms of its own images (softmax: also of its own captions)
against everybody's embeddings, which are gathered with their gradient; the terms add up to the loss of one process with
all pairs. Scores are made in blocks that backward computes again: chunk × N for softmax, chunk × chunk for sigmoid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_interns1.training.summed_loss import SummedLoss


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks behind one another; backward gives every rank the sum of what all ranks want of its rows."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group, ctx.rows = counts, group, x_ND.shape[0]
        longest = max(counts)
        padded = F.pad(x_ND, (0, 0, 0, longest - x_ND.shape[0])).contiguous()
        gathered = padded.new_empty(len(counts) * longest, x_ND.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.counts)
        parts = gradients[0].split(ctx.counts)
        padded = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[0])) for part in parts]).contiguous()
        own = padded.new_empty(longest, padded.shape[1])
        dist.reduce_scatter_tensor(own, padded, group=ctx.group)
        return own[: ctx.rows], None, None


class Pairs(NamedTuple):
    """Embeddings of this rank's pairs, and of all ranks'.

    Attributes:
        image_ND: Of this rank's images.
        text_ND: Of this rank's captions.
        key_N: (N,) which pairs of this rank have the same caption: those with the same key.
        all_image_MD: Of all ranks' images.
        all_text_MD: Of all ranks' captions.
        all_key_M: Keys of all ranks.
    """

    image_ND: Tensor
    text_ND: Tensor
    key_N: Tensor
    all_image_MD: Tensor
    all_text_MD: Tensor
    all_key_M: Tensor


def gather_pairs(
    image_ND: Tensor, text_ND: Tensor, key_N: Tensor | None = None, across_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Pairs:  # fmt: skip
    """The pairs of all ranks, with gradient; ranks may have different numbers of them.

    Args:
        image_ND: (N, D) embeddings of images, float32 or wider for exact sums.
        text_ND: (N, D) embeddings of their captions.
        key_N: (N,) integers, equal where captions are equal; None: every caption is its own. All ranks alike.
        across_ranks: False: this rank's pairs are all there are.
        group: The ranks; None = all.

    Raises:
        ValueError: If shapes do not fit together.
    """
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape:
        raise ValueError(
            f"embeddings must be two matrices of one shape (pairs, width), got {tuple(image_ND.shape)} of images and "
            f"{tuple(text_ND.shape)} of captions"
        )
    count, device = image_ND.shape[0], image_ND.device
    if key_N is not None and key_N.shape != (count,):
        raise ValueError(f"key_N has the shape {tuple(key_N.shape)} for {count} pairs")
    if not (across_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        key_N = torch.arange(count, device=device) if key_N is None else key_N
        return Pairs(image_ND, text_ND, key_N, image_ND, text_ND, key_N)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    counts_W = torch.zeros(ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts_W, torch.tensor([count], device=device), group=group)
    counts = counts_W.tolist()
    # one collective for both, so that backward has one, too: no order for ranks to disagree on
    both_M2D = _GatherRows.apply(torch.cat((image_ND, text_ND), dim=1), counts, group)
    all_image_MD, all_text_MD = both_M2D.chunk(2, dim=1)
    if key_N is None:
        all_key_M = torch.arange(sum(counts), device=device)
        key_N = all_key_M.split(counts)[rank]
    else:
        all_key_M = _GatherRows.apply(key_N.long()[:, None], counts, group).flatten()
    return Pairs(image_ND, text_ND, key_N, all_image_MD, all_text_MD, all_key_M)


def _softmax_block(x_cD: Tensor, y_MD: Tensor, scale: Tensor, key_c: Tensor, key_M: Tensor) -> Tensor:
    scores_cM = scale * (x_cD @ y_MD.T)
    right_cM = key_c[:, None] == key_M
    return (scores_cM.logsumexp(1) - (scores_cM * right_cM).sum(1) / right_cM.sum(1)).sum()


def _sigmoid_block(
    x_cD: Tensor, y_kD: Tensor, scale: Tensor, bias: Tensor, key_c: Tensor, key_k: Tensor
) -> Tensor:  # fmt: skip
    scores_ck = scale * (x_cD @ y_kD.T) + bias
    return -F.logsigmoid(torch.where(key_c[:, None] == key_k, scores_ck, -scores_ck)).sum()


def _recomputed(block: Any, *arguments: Tensor) -> Tensor:
    """A block whose scores are not kept for backward."""
    if not torch.is_grad_enabled():
        return block(*arguments)
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)


def softmax_pair_loss(pairs: Pairs, scale: Tensor, chunk_pairs: int) -> Tensor:
    """Σ over this rank's pairs of the softmax loss, not divided by anything.

    Where several captions are right for an image, the loss is the mean over them (as L_out of arXiv 2004.11362 §3.2).

    Args:
        pairs: Embeddings.
        scale: t, scalar.
        chunk_pairs: Rows of a block of scores.
    """
    total = scale.new_zeros(())
    for x_ND, y_MD in ((pairs.image_ND, pairs.all_text_MD), (pairs.text_ND, pairs.all_image_MD)):
        for x_cD, key_c in zip(x_ND.split(chunk_pairs), pairs.key_N.split(chunk_pairs), strict=True):
            total = total + _recomputed(_softmax_block, x_cD, y_MD, scale, key_c, pairs.all_key_M)
    return total / 2


def sigmoid_pair_loss(pairs: Pairs, scale: Tensor, bias: Tensor, chunk_pairs: int) -> Tensor:
    """Σ over this rank's images and all captions of the sigmoid loss, not divided by anything.

    Args:
        pairs: Embeddings.
        scale: t, scalar.
        bias: b, scalar.
        chunk_pairs: Rows and columns of a block of scores.
    """
    total = scale.new_zeros(())
    columns = list(zip(pairs.all_text_MD.split(chunk_pairs), pairs.all_key_M.split(chunk_pairs), strict=True))
    for x_cD, key_c in zip(pairs.image_ND.split(chunk_pairs), pairs.key_N.split(chunk_pairs), strict=True):
        for y_kD, key_k in columns:
            total = total + _recomputed(_sigmoid_block, x_cD, y_kD, scale, bias, key_c, key_k)
    return total


class ContrastiveLoss(ABC):
    """A loss over pairs, as a sum and its denominator.

    Args:
        chunk_pairs: Side of the blocks in which scores are made.
        shared_captions: Pairs whose captions are equal are right for one another. False: only a pair itself is right.

    Raises:
        ValueError: If `chunk_pairs` is not positive.
    """

    initial_scale: float
    """t at the start."""
    initial_bias: float | None
    """b at the start; None = the loss has no bias."""
    max_scale: float
    """t is held below this."""

    def __init__(self, chunk_pairs: int = 1024, shared_captions: bool = True) -> None:
        if chunk_pairs < 1:
            raise ValueError(f"chunk_pairs = {chunk_pairs} must be at least 1")
        self.chunk_pairs, self.shared_captions = chunk_pairs, shared_captions

    @abstractmethod
    def local_sum(self, pairs: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
        """The terms of this rank, added up."""

    def __call__(
        self, image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor | None = None,
        key_N: Tensor | None = None, across_ranks: bool = True, group: dist.ProcessGroup | None = None,
    ) -> tuple[SummedLoss, dict[str, Tensor]]:  # fmt: skip
        """The loss of the pairs of all ranks: this rank's part of it.

        Args:
            image_ND: (N, D) embeddings of images, of length 1.
            text_ND: (N, D) embeddings of their captions, of length 1.
            scale: t, scalar.
            bias: b, scalar; None = 0.
            key_N: (N,) integers, equal where captions are equal; for `shared_captions`.
            across_ranks: False: this rank's pairs are all there are.
            group: The ranks; None = all.

        Returns:
            The loss (sum of this rank's terms, its pairs), and a detached sum: `alignment`, Σ x_i·y_i.

        Raises:
            ValueError: If shapes do not fit together.
        """
        wide = torch.promote_types(image_ND.dtype, torch.float32)
        image_ND, text_ND, scale = image_ND.to(wide), text_ND.to(wide), scale.to(wide)
        bias = scale.new_zeros(()) if bias is None else bias.to(wide)
        with torch.autocast(image_ND.device.type, enabled=False):
            pairs = gather_pairs(image_ND, text_ND, key_N if self.shared_captions else None, across_ranks, group)
            total = self.local_sum(pairs, scale, bias)
        alignment = (image_ND.detach() * text_ND.detach()).sum()
        return SummedLoss(total, scale.new_tensor(float(len(image_ND))).detach()), {"alignment": alignment}


class SoftmaxContrastiveLoss(ContrastiveLoss):
    """InfoNCE in both directions. t begins at 1/0.07 and is held below 100, as in CLIP."""

    initial_scale, initial_bias, max_scale = 1 / 0.07, None, 100.0

    def local_sum(self, pairs: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
        """The terms of this rank's images and captions."""
        return softmax_pair_loss(pairs, scale, self.chunk_pairs)


class SigmoidContrastiveLoss(ContrastiveLoss):
    """Every image with every caption is a decision of its own. t begins at 10 and b at −10, as in SigLIP, where t has
    no upper limit."""

    initial_scale, initial_bias, max_scale = 10.0, -10.0, math.inf

    def local_sum(self, pairs: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
        """The terms of this rank's images."""
        return sigmoid_pair_loss(pairs, scale, bias, self.chunk_pairs)
