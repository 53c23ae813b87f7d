"""Interpolated n-gram models of token ids: the reference lines (bigram, 3-gram) that a trained model has to beat.

Kneser–Ney, interpolated, with three discounts per order (Chen & Goodman, Computer Speech & Language 13 (1999) 359):
  p_k(w | h) = max(c_k(hw) − D_k(c), 0) / c_k(h) + λ_k(h) p_{k−1}(w | h'),   p_0 = 1 / vocabulary,   h = (first, h')
with λ_k(h) = Σ_j D_kj N_j(h) / c_k(h), so that every distribution sums to one. c_n is the count; for k < n, c_k counts
the distinct tokens in front of hw (a document start is one of them). The discounts come from n_i, the number of k-grams
with c_k = i: Y = n_1 / (n_1 + 2 n_2), D_i = i − (i+1) Y n_{i+1} / n_i for i = 1, 2 and 3 (three or more).
Jelinek–Mercer (1980) mixes plain relative frequencies: p_k = μ_k c(hw) / c(h) + (1 − μ_k) p_{k−1}.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_COMPRESS_EVERY = 4_000_000
"""Keys that are held uncounted at most (32 MB)."""


@dataclass(frozen=True)
class _Level:
    """The k-grams of one order, G in number, with C distinct contexts; keys ascending, so contexts are too."""

    keys_G: Integers
    discounted_G: Floats  # share of the n-gram in its context, after discounting
    contexts_C: Integers
    backoff_C: Floats  # weight of the next lower order


class InterpolatedNGram:
    """An n-gram model, fitted by counting.

    Documents do not share context: the first token of a document is predicted from the document start, a symbol of its
    own that is never predicted. A context that was not seen leaves the word to the shorter one.

    Args:
        order: n, 1 to 4: a token is predicted from the n − 1 before it.
        vocab_size: Ids are 0 … vocab_size − 1. An n-gram must fit 63 bits: (vocab_size + 1)^order < 2^63.
        smoothing: `kneser_ney` or `jelinek_mercer`.
        weights: Jelinek–Mercer only: μ_1 … μ_n, from unigram to n-gram, each in (0, 1); one number serves all orders.

    Raises:
        ValueError: If an argument is out of range, or n-grams of this vocabulary do not fit 63 bits.
    """

    def __init__(
        self,
        order: int,
        vocab_size: int,
        smoothing: Literal["kneser_ney", "jelinek_mercer"] = "kneser_ney",
        weights: float | Sequence[float] = 0.75,
    ):
        if not 1 <= order <= 4:
            raise ValueError(f"order={order} is not in 1 … 4")
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} is not positive")
        if (vocab_size + 1) ** order >= 2**63:
            raise ValueError(f"an n-gram of order={order} over vocab_size={vocab_size} ids does not fit 63 bits")
        if smoothing not in ("kneser_ney", "jelinek_mercer"):
            raise ValueError(f"smoothing={smoothing!r} is neither 'kneser_ney' nor 'jelinek_mercer'")
        self.weights = (float(weights),) * order if isinstance(weights, (int, float)) else tuple(map(float, weights))
        if len(self.weights) != order or not all(0 < weight < 1 for weight in self.weights):
            raise ValueError(f"weights={weights} must be one number, or order={order} of them, each between 0 and 1")
        self.order, self.vocab_size, self.smoothing = order, vocab_size, smoothing
        self.num_tokens = 0
        """Tokens counted so far."""
        self._base, self._start = vocab_size + 1, vocab_size
        self._pending: list[Integers] = []
        self._pending_size = 0
        self._counted: list[tuple[Integers, Integers]] = []
        self._levels: list[_Level] | None = None

    # --- fitting -------------------------------------------------------------------------------------------------

    def update(self, ids: ArrayLike, cu_seqlens: ArrayLike | None = None) -> None:
        """Counts documents. May be called again at any time.

        Args:
            ids: (T,) integers, one document; or (R, T), each row a document.
            cu_seqlens: (D + 1,) cumulative document lengths, from 0 to T, if `ids` (T,) holds D documents one behind
                the other.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If an id is out of the vocabulary, or the shapes do not fit.
        """
        flat_T, position_T = self._documents(ids, cu_seqlens)
        if not flat_T.size:
            return
        self._pending.append(self._keys(flat_T, position_T, self.order))
        self._pending_size += flat_T.size
        self.num_tokens += flat_T.size
        self._levels = None
        if self._pending_size >= _COMPRESS_EVERY:
            self._compress()

    def _compress(self) -> None:
        if not self._pending:
            return
        keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._pending_size = [], 0
        self._counted.append((keys, counts.astype(np.int64)))
        # Like a binary counter: equal-sized tables are merged, so each key is merged a logarithmic number of times.
        while len(self._counted) > 1 and self._counted[-1][0].size * 2 > self._counted[-2][0].size:
            (keys_a, counts_a), (keys_b, counts_b) = self._counted.pop(), self._counted.pop()
            self._counted.append(_sum_by_key(np.concatenate([keys_a, keys_b]), np.concatenate([counts_a, counts_b])))

    def _fit(self) -> list[_Level]:
        if self._levels is not None:
            return self._levels
        if not self.num_tokens:
            raise ValueError("the n-gram model has seen no tokens: call update first")
        self._compress()
        keys = np.concatenate([keys for keys, _ in self._counted])
        counts = np.concatenate([counts for _, counts in self._counted])
        keys, counts = _sum_by_key(keys, counts) if len(self._counted) > 1 else (keys, counts)
        self._counted = [(keys, counts)]
        levels = [self._level(self.order, keys, counts)]
        for length in range(self.order - 1, 0, -1):
            shorter = keys % self._base**length
            raw_keys, raw_counts = _sum_by_key(shorter, counts)
            if self.smoothing == "kneser_ney":
                _, in_front = np.unique(shorter, return_counts=True)
                # Nothing stands in front of a document start: such k-grams keep their count.
                from_start = raw_keys // self._base ** (length - 1) == self._start
                levels.append(self._level(length, raw_keys, np.where(from_start, raw_counts, in_front)))
            else:
                levels.append(self._level(length, raw_keys, raw_counts))
            keys, counts = raw_keys, raw_counts
        self._levels = levels[::-1]
        return self._levels

    def _level(self, length: int, keys: Integers, counts: Integers) -> _Level:
        """Shares and back-off weights of the k-grams of one length."""
        if length > 1:  # of several starts in a row only the last one is a context
            kept = keys // self._base ** (length - 2) != self._start * self._base + self._start
            keys, counts = keys[kept], counts[kept]
        if not keys.size:  # all documents are shorter than the context
            return _Level(keys, np.zeros(0), keys, np.zeros(0))
        context_G = keys // self._base
        first_C = np.flatnonzero(np.concatenate([[True], context_G[1:] != context_G[:-1]]))
        size_C = np.diff(np.append(first_C, keys.size))
        total_C = np.add.reduceat(counts, first_C).astype(np.float64)
        if self.smoothing == "kneser_ney":
            discount_G = _discounts(counts)[np.minimum(counts, 3)]
            share_G = (counts - discount_G) / np.repeat(total_C, size_C)
            backoff_C = np.add.reduceat(discount_G, first_C) / total_C
        else:
            share_G = self.weights[length - 1] * counts / np.repeat(total_C, size_C)
            backoff_C = np.full(first_C.size, 1 - self.weights[length - 1])
        return _Level(keys, share_G, context_G[first_C], backoff_C)

    # --- use -----------------------------------------------------------------------------------------------------

    def log_prob(self, ids: ArrayLike, cu_seqlens: ArrayLike | None = None) -> Floats:
        """Log-probability of every token given those before it in its document.

        Args:
            ids: As in `update`.
            cu_seqlens: As in `update`.

        Returns:
            Natural logarithms (nats), float64, in the shape of `ids`.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If nothing was fitted, an id is out of the vocabulary, or the shapes do not fit.
        """
        flat_T, position_T = self._documents(ids, cu_seqlens)
        key_T, inverse_T = np.unique(self._keys(flat_T, position_T, self.order), return_inverse=True)
        return np.log(self._probability(key_T))[inverse_T].reshape(np.shape(ids))

    def probabilities(self, context: ArrayLike = ()) -> Floats:
        """The distribution of the next token.

        Args:
            context: (C,) ids of the document so far; empty = at its start.

        Returns:
            (vocab_size,) float64, all positive, sum 1.
        """
        seen_C, _ = self._documents(np.asarray(context, dtype=np.int64) if np.size(context) == 0 else context, None)
        starts = np.full(self.order, self._start, dtype=np.int64)
        key = 0
        for symbol in np.concatenate([starts, seen_C])[seen_C.size + 1 :]:  # the last order − 1 symbols
            key = key * self._base + int(symbol)
        return self._probability(key * self._base + np.arange(self.vocab_size, dtype=np.int64))

    def cross_entropy(self, documents: Iterable[ArrayLike]) -> float:
        """Mean negative log-probability over all tokens of the documents, in nats per token.

        Args:
            documents: Arrays of ids, each one document (T,) or documents in rows (R, T).

        Raises:
            ValueError: If the documents hold no token, or as `log_prob`.
        """
        total, tokens = 0.0, 0
        for document in documents:
            log_prob = self.log_prob(document)
            total, tokens = total - float(log_prob.sum()), tokens + log_prob.size
        if not tokens:
            raise ValueError("cross_entropy needs at least one token")
        return total / tokens

    def _probability(self, key_N: Integers) -> Floats:
        """Probabilities of the last symbols of n-gram keys, from the uniform distribution up to the full context."""
        probability_N = np.full(key_N.size, 1 / self.vocab_size)
        for length, level in enumerate(self._fit(), start=1):
            short_N = key_N % self._base**length
            context_N, seen_N = _look_up(level.contexts_C, short_N // self._base)
            index_N, found_N = _look_up(level.keys_G, short_N)
            if level.contexts_C.size:
                probability_N[seen_N] *= level.backoff_C[context_N[seen_N]]
                probability_N[found_N] += level.discounted_G[index_N[found_N]]
        return probability_N

    def _documents(self, ids: ArrayLike, cu_seqlens: ArrayLike | None) -> tuple[Integers, Integers]:
        """Flat ids (T,) and the position of each in its document (T,)."""
        array: NDArray[Any] = np.asarray(ids)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"token ids must be integers, not {array.dtype}")
        if array.ndim not in (1, 2) or (array.ndim == 2 and cu_seqlens is not None):
            raise ValueError(f"ids must be (T,), (R, T) or (T,) with cu_seqlens, not {array.shape}")
        if array.size and not (array.min() >= 0 and array.max() < self.vocab_size):
            raise ValueError(f"ids from {array.min()} to {array.max()} are not all in 0 … {self.vocab_size - 1}")
        flat_T = array.reshape(-1).astype(np.int64)
        if cu_seqlens is None:
            return flat_T, np.broadcast_to(np.arange(array.shape[-1]), array.shape).reshape(-1)
        limits = np.asarray(cu_seqlens, dtype=np.int64)
        if limits.ndim != 1 or not limits.size or limits[0] != 0 or limits[-1] != flat_T.size:
            raise ValueError(f"cu_seqlens must run from 0 to {flat_T.size}, the number of ids")
        lengths = np.diff(limits)
        if (lengths < 0).any():
            raise ValueError("cu_seqlens must not decrease")
        return flat_T, np.arange(flat_T.size) - np.repeat(limits[:-1], lengths)

    def _keys(self, flat_T: Integers, position_T: Integers, length: int) -> Integers:
        """The n-gram that ends at each token, as one number in base vocab_size + 1; starts where no token is."""
        key_T = flat_T.copy()
        for distance in range(1, length):
            before_T = np.full(flat_T.size, self._start, dtype=np.int64)
            before_T[distance:] = flat_T[:-distance] if distance < flat_T.size else ()
            before_T[position_T < distance] = self._start
            key_T += before_T * self._base**distance
        return key_T


def _sum_by_key(keys: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Distinct keys, ascending, and the sum of the counts of each."""
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


def _look_up(table: Integers, queries: Integers) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Index of each query in an ascending table, and whether it is there."""
    index = np.searchsorted(table, queries)
    found = np.zeros(queries.size, dtype=bool)
    inside = index < table.size
    found[inside] = table[index[inside]] == queries[inside]
    return index, found


def _discounts(counts: Integers) -> Floats:
    """(0, D_1, D_2, D_3+), estimated from counts of counts.

    Where a count of counts is zero, or an estimate falls outside (0, i], the usual 0.5, 1.0, 1.5 serve.
    """
    n_1, n_2, n_3, n_4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    discounts = np.array([0.0, 0.5, 1.0, 1.5])
    if n_1 and n_2:
        share = n_1 / (n_1 + 2 * n_2)
        for times, (here, above) in enumerate(((n_1, n_2), (n_2, n_3), (n_3, n_4)), start=1):
            estimate = times - (times + 1) * share * above / here if here and above else 0.0
            if 0 < estimate <= times:
                discounts[times] = estimate
    return discounts
