"""Keys and values of past tokens, for generation: a slot per sequence, allocated once and used again and again.

    slot s:  k_0 … k_{n−1} of the sequence that holds it; what lies behind is masked

Sequences that decode sit in the first slots, so that attention reads views of the cache and copies nothing. A step may
also bring whole prompts, flat and without padding; they attend among themselves, and are written into free slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.nn.document_attention import AttentionBackend, DocumentAttention


class KeyValueCache:
    """Preallocated keys and values. A layer's memory is taken when it is first written, in the dtype of its keys.

    Args:
        num_layers: Layers of the model.
        num_slots: Sequences side by side.
        max_length: Tokens per sequence that fit.

    Attributes:
        keys: By layer, (slots, key/value heads, tokens, d); None before the first write.
        values: As `keys`.
    """

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def write(self, layer: int, row_R: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values of tokens, and gives all of the layer's.

        Args:
            layer: Which.
            row_R: (T · key/value heads,) where each head of each token goes: (slot · heads + head) · max_length +
                position.
            k_TGd: (T, key/value heads, d).
            v_TGd: As `k_TGd`.
        """
        result = []
        for stored, new in ((self.keys, k_TGd), (self.values, v_TGd)):
            whole = stored[layer]
            if whole is None:
                # zeros, because what is masked still takes part in products: 0 · NaN would be NaN
                shape = (self.num_slots, new.shape[1], self.max_length, new.shape[2])
                whole = stored[layer] = torch.zeros(shape, dtype=new.dtype, device=new.device)
            whole.view(-1, new.shape[2]).index_copy_(0, row_R, new.reshape(-1, new.shape[2]))
            result.append(whole)
        return result[0], result[1]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot into others."""
        for whole in (*self.keys, *self.values):
            if whole is not None and targets:
                whole[list(targets), :, :length] = whole[source, :, :length].clone()


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
        slot_T: (T,) their slots.

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
        positions, slots = [past_B], [torch.arange(len(past_B), device=device)]
        for slot, length in prompts:
            positions.append(torch.arange(length, device=device))
            slots.append(torch.full((length,), slot, device=device))
        self.position_ids_T, self.slot_T = torch.cat(positions), torch.cat(slots)
        self._rows: Tensor | None = None
        self._longest = longest
        self._masked_BK = torch.arange(longest, device=device) > past_B[:, None]
        self._mask: Tensor | None = None
        self._prompts = None
        if prompts:
            ends = torch.tensor([0, *(length for _, length in prompts)]).cumsum(0)
            self._prompts = DocumentAttention(ends.to(device), backend)

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """(T, heads, d), (T, key/value heads, d) twice → (T, heads, d)."""
        heads = k_TGd.shape[1]
        if self._rows is None:
            head_TG = self.slot_T[:, None] * heads + torch.arange(heads, device=k_TGd.device)
            self._rows = (head_TG * self.cache.max_length + self.position_ids_T[:, None]).flatten()
        keys, values = self.cache.write(layer, self._rows, k_TGd, v_TGd)
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
        # query heads that share keys stand where query tokens do: (B, key/value heads, heads of a key, d)
        q = q_BHd.unflatten(1, (keys.shape[1], -1))
        past = slice(self._decoding), slice(None), slice(self._longest)
        return F.scaled_dot_product_attention(q, keys[past], values[past], attn_mask=self._mask).flatten(1, 2)
