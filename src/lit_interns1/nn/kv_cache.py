"""Keys and values of past tokens, for generation: a slot per sequence, allocated once and used again and again.

    slot s:  k_0 … k_{n−1} of the sequence that holds it; what lies behind is masked

Sequences that decode sit in the first slots, so that attention reads views of the cache and copies nothing. A step may
also bring whole prompts, flat and without padding; they attend among themselves, and are written into free slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_interns1.nn.document_attention import AttentionBackend, DocumentAttention, grouped_attention


class KeyValueCache:
    """Preallocated keys and values. A layer's memory is taken when it is first written, in the dtype of its keys.

    Args:
        num_layers: Layers of the model.
        num_slots: Sequences side by side.
        max_length: Tokens per sequence that fit.

    Attributes:
        keys: By layer, (slots, tokens, key/value heads, d); None before the first write.
        values: As `keys`.
    """

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def write(self, layer: int, place_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values of tokens, and gives all of the layer's.

        Args:
            layer: Which.
            place_T: (T,) slot · max_length + position.
            k_TGd: (T, key/value heads, d).
            v_TGd: As `k_TGd`.
        """
        result = []
        for stored, new in ((self.keys, k_TGd), (self.values, v_TGd)):
            whole = stored[layer]
            if whole is None:
                # zeros, because what is masked still takes part in products: 0 · NaN would be NaN
                shape = (self.num_slots, self.max_length, *new.shape[1:])
                whole = stored[layer] = torch.zeros(shape, dtype=new.dtype, device=new.device)
            whole.view(-1, *new.shape[1:]).index_copy_(0, place_T, new)
            result.append(whole)
        return result[0], result[1]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot into others."""
        for whole in (*self.keys, *self.values):
            if whole is not None:
                for target in targets:
                    whole[target, :length] = whole[source, :length]


class CachedAttention:
    """Attention of one step: one new token for each of the first sequences, then whole prompts; writes both.

    Args:
        cache: Where the past is.
        past_B: (B,) int64, tokens that slots 0 … B−1 hold; their new tokens come first.
        longest: The largest of them, known to the host.
        prompts: (slot, tokens) of every prompt behind them.
        backend: Back-end for prompts.

    Attributes:
        position_ids_T: (T,) positions of the new tokens in their sequences.
        place_T: (T,) their places in the cache, slot · max_length + position.

    Raises:
        ValueError: If a sequence outgrows the cache.
    """

    def __init__(
        self, cache: KeyValueCache, past_B: Tensor, longest: int, prompts: Sequence[tuple[int, int]] = (),
        backend: AttentionBackend = "sdpa",
    ) -> None:  # fmt: skip
        self.cache, self._decoding, device = cache, len(past_B), past_B.device
        longest = longest + 1 if len(past_B) else 0
        if (needed := max(longest, *(length for _, length in prompts), 0)) > cache.max_length:
            raise ValueError(f"a sequence of {needed} tokens does not fit into a cache of {cache.max_length}")
        positions = [past_B]
        places = [torch.arange(len(past_B), device=device) * cache.max_length + past_B]
        for slot, length in prompts:
            positions.append(torch.arange(length, device=device))
            places.append(positions[-1] + slot * cache.max_length)
        self.position_ids_T, self.place_T = torch.cat(positions), torch.cat(places)
        self._longest = longest
        self._masked_BK = torch.arange(longest, device=device) > past_B[:, None]
        self._mask: Tensor | None = None
        self._prompts = None
        if prompts:
            ends = torch.tensor([0, *(length for _, length in prompts)]).cumsum(0)
            self._prompts = DocumentAttention(ends.to(device), backend)

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """(T, heads, d), (T, key/value heads, d) twice → (T, heads, d)."""
        keys, values = self.cache.write(layer, self.place_T, k_TGd, v_TGd)
        count, outputs = self._decoding, []
        if count:
            outputs.append(self._decode(q_THd[:count], keys, values))
        if self._prompts is not None:
            outputs.append(self._prompts(layer, q_THd[count:], k_TGd[count:], v_TGd[count:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, q_BHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self._mask is None or self._mask.dtype != q_BHd.dtype:  # additive, made once for all layers
            zeros = torch.zeros_like(self._masked_BK, dtype=q_BHd.dtype)
            self._mask = zeros.masked_fill_(self._masked_BK, -torch.inf)[:, None, None]
        past = slice(self._decoding), slice(self._longest)
        # query heads that share a key stand where query tokens do: (B, heads of a key, key/value heads, d)
        q = q_BHd.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
        return grouped_attention(q, keys[past], values[past], self._mask).transpose(1, 2).flatten(1, 2)
