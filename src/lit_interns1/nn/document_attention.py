"""Attention inside the documents of a packed micro-batch.

    token i attends to token j  ⇔  document(i) = document(j), and j ≤ i if it is causal

Back-ends, equal up to rounding:
  sdpa   documents are gathered into groups of similar length, padded on the right, and given to
         `scaled_dot_product_attention(is_causal=True)`. No mask is needed: a padded key comes after every real query.
         Without causality (images, whose tokens see one another) a group holds documents of one length and no padding.
         The work is Σ length² over documents, not (rows × row length)².
  flex   `flex_attention` with a block mask of the documents (compiled on CUDA; without backward on CPUs).
  dense  one boolean mask over all pairs of tokens: the reference, quadratic in the micro-batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "flex", "dense"]


class Attend(Protocol):
    """How the queries of a layer meet keys and values: packed documents, or a cache of them."""

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """(T, heads, d), (T, key/value heads, d) twice → (T, heads, d)."""
        ...


def restarting_positions(cu_seqlens: Tensor) -> Tensor:
    """(D+1,) document boundaries → (T,) positions that restart in every document."""
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    Args:
        q: (N, query length, heads, d).
        k: (N, key length, key/value heads, d).
        v: As `k`.
        mask: Boolean, broadcastable to (N, heads, query length, key length), True = may attend.
        causal: Without a mask: a query sees the keys up to its own place, otherwise all.

    Returns:
        (N, query length, heads, d).
    """
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return output.transpose(1, 2)


class _PadRows(torch.autograd.Function):
    """Gathers tokens into padded groups. Padding receives no gradient, so backward gathers the real rows back."""

    @staticmethod
    def forward(ctx, x: Tensor, padded_index: Tensor, real_index: Tensor) -> Tensor:
        ctx.save_for_backward(real_index)
        return x.index_select(0, padded_index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (real_index,) = ctx.saved_tensors
        return gradient.index_select(0, real_index), None, None


class _TakeRows(torch.autograd.Function):
    """Takes the real rows out of padded groups; backward writes zeros into the padding."""

    @staticmethod
    def forward(ctx, x: Tensor, real_index: Tensor) -> Tensor:
        ctx.save_for_backward(real_index)
        ctx.padded_rows = x.shape[0]
        return x.index_select(0, real_index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (real_index,) = ctx.saved_tensors
        padded = gradient.new_zeros(ctx.padded_rows, *gradient.shape[1:])
        return padded.index_copy_(0, real_index, gradient), None


def _length_groups(lengths: Tensor, tolerance: float = 0.75, floor: int = 32) -> list[tuple[int, Tensor]]:
    """Groups documents for padding: (padded length, document numbers), longest first.

    A document joins a group if it fills at least `tolerance` of the padded length; documents up to `floor` tokens stay
    together, since a call costs more than their padding.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].tolist()
    groups, start = [], 0
    for i in range(1, len(sizes) + 1):
        longest = sizes[start]
        if i == len(sizes) or (sizes[i] < tolerance * longest and longest > floor):
            groups.append((longest, order[start:i]))
            start = i
    return groups


class DocumentAttention:
    """Attention inside documents; built once per micro-batch and shared by all layers.

    Args:
        cu_seqlens: (D+1,) cumulative document lengths, from 0 to T. Empty documents are allowed.
        backend: See the module's docstring.
        causal: A token sees only those before it and itself; False: all of its document.

    Raises:
        ValueError: If the back-end is unknown, or cu_seqlens does not start with 0 or decreases.
    """

    def __init__(self, cu_seqlens: Tensor, backend: AttentionBackend = "sdpa", causal: bool = True) -> None:
        if backend not in ("sdpa", "flex", "dense"):
            raise ValueError(f"attention backend {backend!r} is unknown: choose sdpa, flex or dense")
        self.backend, self.causal = backend, causal
        self.device = cu_seqlens.device
        boundaries = cu_seqlens.detach().cpu().long()
        self._lengths = boundaries.diff()
        if boundaries.numel() < 1 or boundaries[0] != 0 or (self._lengths < 0).any():
            raise ValueError(f"cu_seqlens must start with 0 and never decrease, got {cu_seqlens.tolist()[:8]} …")
        self._starts = boundaries[:-1]
        self.num_tokens = int(boundaries[-1])

    @cached_property
    def _document_T(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self._lengths)), self._lengths).to(self.device)

    @cached_property
    def _padding_plan(self) -> tuple[list[tuple[int, int]], Tensor | None, Tensor | None]:
        """Groups as (documents, padded length), token index per padded row, padded row per token (None: a view)."""
        present = torch.nonzero(self._lengths > 0).flatten()
        lengths, starts = self._lengths[present], self._starts[present]
        if len(lengths) and bool((lengths == lengths[0]).all()):
            return [(len(lengths), int(lengths[0]))], None, None
        groups: list[tuple[int, int]] = []
        padded_index, real_rows, tokens, base = [], [], [], 0
        for longest, members in _length_groups(lengths) if self.causal else _length_groups(lengths, 1.0, 0):
            offset = torch.arange(longest)
            inside = offset < lengths[members, None]
            index = starts[members, None] + torch.minimum(offset, lengths[members, None] - 1)
            padded_index.append(index.flatten())
            tokens.append(index[inside])
            real_rows.append(base + torch.nonzero(inside.flatten()).flatten())
            groups.append((len(members), longest))
            base += index.numel()
        real_index = torch.empty(self.num_tokens, dtype=torch.long)
        if tokens:
            real_index[torch.cat(tokens)] = torch.cat(real_rows)
            return groups, torch.cat(padded_index).to(self.device), real_index.to(self.device)
        return groups, real_index.to(self.device), real_index.to(self.device)

    @cached_property
    def _block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        document_T = self._document_T

        def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = document_T[query] == document_T[key]
            return same & (key <= query) if self.causal else same

        return create_block_mask(same_document, None, None, self.num_tokens, self.num_tokens, device=str(self.device))

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """(T, heads, d), (T, key/value heads, d) twice → (T, heads, d). The same for every layer."""
        if q_THd.shape[0] != self.num_tokens:
            raise ValueError(f"cu_seqlens covers {self.num_tokens} tokens, the input has {q_THd.shape[0]}")
        if self.num_tokens == 0:
            # all three take part: a rank whose parameters got no gradient would not match the others' collectives
            return q_THd + k_TGd.sum() + v_TGd.sum()
        if self.backend == "flex":
            if not q_THd.is_cuda and q_THd.requires_grad:
                raise ValueError(
                    "attention backend 'flex' has no backward pass on CPUs (torch): choose 'sdpa' to train here"
                )
            from torch.nn.attention.flex_attention import flex_attention

            attention = _compiled_flex_attention() if q_THd.is_cuda else flex_attention
            q, k, v = (x.transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd))
            return attention(q, k, v, block_mask=self._block_mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(
                0, 1
            )
        if self.backend == "dense":
            mask = self._document_T[:, None] == self._document_T
            return grouped_attention(q_THd[None], k_TGd[None], v_TGd[None], mask.tril() if self.causal else mask)[0]

        groups, padded_index, real_index = self._padding_plan
        if padded_index is None or real_index is None:
            documents, length = groups[0]
            shape = (documents, length)
            q, k, v = (x.view(*shape, *x.shape[1:]) for x in (q_THd, k_TGd, v_TGd))
            return grouped_attention(q, k, v, causal=self.causal).reshape(q_THd.shape)
        q, k, v = (_PadRows.apply(x, padded_index, real_index) for x in (q_THd, k_TGd, v_TGd))
        outputs, start = [], 0
        for documents, length in groups:
            stop = start + documents * length
            part_q, part_k, part_v = (x[start:stop].view(documents, length, *x.shape[1:]) for x in (q, k, v))
            attended = grouped_attention(part_q, part_k, part_v, causal=self.causal)
            outputs.append(attended.reshape(documents * length, *q.shape[1:]))
            start = stop
        return _TakeRows.apply(torch.cat(outputs), real_index)


_COMPILED: dict[str, object] = {}


def _compiled_flex_attention():
    if "flex" not in _COMPILED:
        from torch.nn.attention.flex_attention import flex_attention

        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    return _COMPILED["flex"]
