"""Keys and values of past tokens, for generation.

Tokens stay flat, as in training: a step brings tokens of any sequences at any positions, `CachedAttention` writes their
keys and values into the slots of their sequences, and attends. Prompts of different lengths need no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_interns1.nn.document_attention import AttentionBackend, DocumentAttention, grouped_attention


class KeyValueCache:
    """Preallocated keys and values of a batch of sequences.

    Args:
        num_layers: Layers of the model.
        num_sequences: B, sequences side by side.
        max_length: Tokens per sequence that fit.
        num_kv_heads: Key/value heads.
        head_dim: d.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        lengths: (B,) int64, tokens stored per sequence.
    """

    def __init__(
        self, num_layers: int, num_sequences: int, max_length: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        shape = (num_layers, num_sequences, max_length, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)

    @property
    def max_length(self) -> int:
        """Tokens per sequence that fit."""
        return self.keys.shape[2]

    def select(self, sequences_B: Tensor) -> KeyValueCache:
        """A cache of only these sequences, in this order (repeats share a prompt's prefix among samples)."""
        selected = object.__new__(KeyValueCache)
        selected.keys = self.keys.index_select(1, sequences_B)
        selected.values = self.values.index_select(1, sequences_B)
        selected.lengths = self.lengths.index_select(0, sequences_B)
        return selected


class CachedAttention:
    """Attention of new tokens to their sequences' past and to one another; writes them into the cache.

    Args:
        cache: Where the past is; `lengths` is advanced by this object's construction.
        new_lengths: (B,) int64, new tokens per sequence. The flat tokens are ordered by sequence, then by position.
        backend: Back-end for prompts that start at an empty cache.

    Raises:
        ValueError: If a sequence outgrows the cache.
    """

    def __init__(self, cache: KeyValueCache, new_lengths: Tensor, backend: AttentionBackend = "sdpa") -> None:
        self.cache = cache
        past = cache.lengths.clone()
        total = past + new_lengths
        self._longest = int(total.max()) if total.numel() else 0
        if self._longest > cache.max_length:
            raise ValueError(f"a sequence of {self._longest} tokens does not fit into a cache of {cache.max_length}")
        device = cache.lengths.device
        self._sequence_T = torch.repeat_interleave(torch.arange(len(past), device=device), new_lengths)
        starts = torch.cumsum(new_lengths, 0) - new_lengths
        offset_T = torch.arange(len(self._sequence_T), device=device) - starts[self._sequence_T]
        self.position_ids_T = past[self._sequence_T] + offset_T
        """(T,) positions of the new tokens in their sequences."""
        self._one_each = bool((new_lengths == 1).all())
        self._prompts = None
        if bool((past == 0).all()):
            boundaries = torch.cat([starts, starts.new_tensor([len(self._sequence_T)])])
            self._prompts = DocumentAttention(boundaries, backend)
        else:
            self._row = torch.arange(int(new_lengths.max()), device=device)
            self._slot_T = self._sequence_T * len(self._row) + offset_T
            position_BQ = past[:, None] + self._row
            key = torch.arange(self._longest, device=device)
            self._mask = (key <= position_BQ[:, :, None])[:, None]  # (B, 1, new, past + new)
        cache.lengths = total

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """(T, heads, d), (T, key/value heads, d) twice → (T, heads, d)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self._sequence_T, self.position_ids_T] = k_TGd.to(keys.dtype)
        values[self._sequence_T, self.position_ids_T] = v_TGd.to(values.dtype)
        if self._prompts is not None:
            return self._prompts(layer, q_THd, k_TGd, v_TGd)
        k_past, v_past = (x[:, : self._longest].to(q_THd.dtype) for x in (keys, values))
        if self._one_each:
            return grouped_attention(q_THd[:, None], k_past, v_past, self._mask)[:, 0]
        padded = q_THd.new_zeros(len(keys) * len(self._row), *q_THd.shape[1:])
        padded[self._slot_T] = q_THd
        output = grouped_attention(padded.view(len(keys), len(self._row), *q_THd.shape[1:]), k_past, v_past, self._mask)
        return output.reshape(-1, *q_THd.shape[1:])[self._slot_T]
