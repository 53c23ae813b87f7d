"""Which validation tokens there are, and in which contexts: hashes by which two runs know that they see the same.

    data hash      = Σ_t h(validation_token_id_t, position_t, input_id_t)  mod 2^64,  under two keys: 128 bits
    tokenizer hash = BLAKE2b, 128 bits, of the tokenizer as the `tokenizers` library serialises it

The sum runs over the positions that have a loss. It does not depend on order, so rows may be shuffled and packed in
batches of any size, and ranks add up their shares. The position inside the piece of a document is part of it: a loss
depends on what stands before the token, so documents that are cut elsewhere (another `row_length`) are other data.
h is the finaliser of splitmix64 (`order.mix`), chained; it guards against accidents, not against malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_interns1.data.order import IntArray, mix
from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.tokenizer import TextTokenizer

TOKEN_ID_FIELD = "validation_token_id"
HashLanes = NDArray[np.uint64]
"""(2,) the two sums of a data hash."""


class LossPositions(NamedTuple):
    """The positions of a batch that have a loss, N of its T tokens.

    Attributes:
        index_N: (N,) int64, where they stand in the flattened batch.
        token_id_N: (N,) int64 `validation_token_id`.
        num_positions: T.
    """

    index_N: Tensor
    token_id_N: Tensor
    num_positions: int


def batch_field(batch: Any, name: str) -> Tensor | None:
    """A per-token tensor of a `PackedBatch` or a mapping, flattened to (T,); None if there is none."""
    if isinstance(batch, PackedBatch):
        value = batch.token_fields.get(name, getattr(batch, name, None))
    else:
        value = batch.get(name) if isinstance(batch, Mapping) else None
    return value.flatten() if isinstance(value, Tensor) else None


def loss_positions(batch: Any) -> LossPositions:
    """Positions with a `validation_token_id` ≥ 0 and, where the batch has labels, a label other than −100.

    Args:
        batch: A `PackedBatch`, or a mapping with `validation_token_id` and optionally `labels`, the label that is
            predicted *at* each position.

    Raises:
        ValueError: If the batch carries no `validation_token_id`.
    """
    token_id_T, labels_T = batch_field(batch, TOKEN_ID_FIELD), batch_field(batch, "labels")
    if token_id_T is None:
        raise ValueError(
            f"the validation batch ({type(batch).__name__}) has no {TOKEN_ID_FIELD!r}: tokens are recognised by this "
            "stable number, which must be a token field of a PackedBatch or an entry of a mapping, shaped like the ids"
        )
    counts_T = token_id_T >= 0
    if labels_T is not None:
        counts_T = counts_T & (labels_T != IGNORED_LABEL)
    index_N = counts_T.nonzero().flatten()
    return LossPositions(index_N, token_id_T[index_N], token_id_T.numel())


class SeenTokens(NamedTuple):
    """What a pass over validation batches has seen.

    Attributes:
        token_id_N: (N,) int64 `validation_token_id` of every position with a loss, in the order of the pass.
        lanes: The sums of the data hash.
    """

    token_id_N: IntArray
    lanes: HashLanes


def seen_tokens(batches: Iterable[Any]) -> SeenTokens:
    """Reads batches without running a model.

    Raises:
        ValueError: If a batch has no `validation_token_id` or no `input_ids`.
    """
    ids: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    lanes = np.zeros(2, dtype=np.uint64)
    for batch in batches:
        positions = loss_positions(batch)
        input_T, offset_T = batch_field(batch, "input_ids"), batch_field(batch, "position_ids")
        if input_T is None:
            raise ValueError(f"the validation batch ({type(batch).__name__}) has no 'input_ids' to recognise it by")
        offset_T = torch.zeros_like(input_T) if offset_T is None else offset_T
        columns = [column[positions.index_N].cpu().numpy() for column in (offset_T, input_T)]
        ids.append(positions.token_id_N.cpu().numpy())
        lanes += hash_lanes(ids[-1], *columns)
    return SeenTokens(np.concatenate(ids), lanes)


def hash_lanes(token_id_N: IntArray, *columns: IntArray) -> HashLanes:
    """The two sums of a data hash over N tokens."""
    lanes = np.zeros(2, dtype=np.uint64)
    for lane in range(2):
        hash_N = mix(token_id_N.astype(np.uint64), lane)
        for column in columns:
            hash_N = mix(hash_N + column.astype(np.uint64))
        lanes[lane] = hash_N.sum(dtype=np.uint64)
    return lanes


def data_hash(lanes: HashLanes) -> str:
    """The data hash as 32 hexadecimal digits."""
    return "".join(f"{int(lane):016x}" for lane in lanes)


def tokenizer_hash(tokenizer: TextTokenizer) -> str:
    """The tokenizer hash as 32 hexadecimal digits. Copies of a `tokenizer.json` agree however they are laid out."""
    return hashlib.blake2b(tokenizer.definition().encode(), digest_size=16).hexdigest()


def bytes_per_token(tokenizer: TextTokenizer) -> IntArray | None:
    """(V,) UTF-8 bytes that each token of a byte-level BPE stands for; special tokens stand for none.

    None for other kinds of tokenizers, whose tokens do not say what bytes they become.
    """
    inner = tokenizer.tokenizer
    if type(inner.decoder).__name__ != "ByteLevel":
        return None
    bytes_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, index in inner.get_vocab(with_added_tokens=True).items():
        bytes_V[index] = len(token)  # byte-level tokens are written with one character per byte
    for index, added in inner.get_added_tokens_decoder().items():
        bytes_V[index] = 0 if added.special else len(added.content.encode("utf-8"))
    for index, piece in tokenizer.extra_pieces():
        bytes_V[index] = len(piece.encode("utf-8"))
    return bytes_V
